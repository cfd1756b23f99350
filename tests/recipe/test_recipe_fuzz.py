"""Whatever is in a recipe's text: it is read, or refused by an error of ours."""

from __future__ import annotations

import contextlib

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from merge_kit.errors import MergeKitError
from merge_kit.recipe import load_recipe, parse_recipe, recipe_from_mapping, yaml_text

SEED = b"""name: one
merge_method: slerp
base_model: a
slices:
  - sources:
      - {model: a, layer_range: [0, 4]}
      - {model: b@r+l, layer_range: ["0", 4.0], parameters: {weight: 1e-3}}
parameters:
  t: [{filter: mlp, value: [0, 1]}, {value: 0.5}]
dtype: bfloat16
---
merge_method: linear
base_model: &x {model: {path: one}}
models: [{model: one, parameters: &p {weight: [0, .5]}}, {model: c, parameters: *p}]
parameters: {normalize: true, int8_mask: 1}
tensors: [{match: "*.a", copy: c}, {match: b, drop: true}, {match: c, models: [{model: d}]}]
tokenizer: {source: union}
seed: 3
shard_size: 5GB
"""
WORDS = (b"&x", b"*x", b"<<: ", b"[", b"]", b"{", b"}", b": ", b"- ", b"!!int ", b"null", b".nan")


@st.composite
def mutated(draw):
    """The seed with a few bytes, words and lines put in, taken out or doubled."""
    text = bytearray(SEED)
    for _ in range(draw(st.integers(1, 6))):
        at = draw(st.integers(0, len(text)))
        kind = draw(st.sampled_from(("byte", "delete", "word", "double")))
        if kind == "byte":
            text[at : at + 1] = draw(st.binary(min_size=1, max_size=2))
        elif kind == "delete":
            del text[at : at + draw(st.integers(1, 30))]
        elif kind == "word":
            text[at:at] = draw(st.sampled_from(WORDS))
        else:
            lines = bytes(text).split(b"\n")
            line = draw(st.integers(0, len(lines) - 1))
            text = bytearray(b"\n".join([*lines[: line + 1], *lines[line:]]))
    return bytes(text)


@settings(max_examples=300, deadline=None)
@given(mutated())
def test_mutated_recipes_are_read_or_refused(content):
    with contextlib.suppress(MergeKitError):
        parse_recipe(content.decode("utf-8", "surrogateescape"))


@settings(max_examples=60, deadline=None)
@given(mutated())
def test_the_reader_in_python_refuses_as_well(content):
    fast, yaml_text.LOADER = yaml_text.LOADER, yaml.SafeLoader
    try:
        with contextlib.suppress(MergeKitError):
            parse_recipe(content.decode("latin-1"))
    finally:
        yaml_text.LOADER = fast


@settings(max_examples=60, deadline=None)
@given(content=st.binary(max_size=200) | mutated())
def test_files_of_any_bytes_are_read_or_refused(tmp_path_factory, content):
    path = tmp_path_factory.getbasetemp() / "fuzz.yaml"
    path.write_bytes(content)
    with contextlib.suppress(MergeKitError):
        load_recipe(path)


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner),
    max_leaves=10,
)
KEYS = st.sampled_from(
    ("merge_method", "models", "slices", "modules", "tensors", "parameters", "base_model", "seed")
)


@settings(max_examples=150, deadline=None)
@given(st.dictionaries(KEYS, VALUES))
def test_any_mapping_is_read_or_refused(mapping):
    with contextlib.suppress(MergeKitError):
        recipe_from_mapping(mapping)


@settings(max_examples=150, deadline=None)
@given(st.text(max_size=30), KEYS, VALUES)
def test_any_override_is_applied_or_refused(path, key, value):
    text = "merge_method: linear\nmodels: [{model: a, parameters: {weight: 1}}]\n"
    for override in (path, f"{key}={value!r}", f"{key}.0.{path}=1"):
        with contextlib.suppress(MergeKitError):
            parse_recipe(text, overrides=[override])


def test_the_seed_itself_is_read():
    recipe = parse_recipe(SEED.decode())
    assert len(recipe.stages) == 2


@pytest.mark.parametrize(
    "piece", ["[", "{", "? ", "- ", "a:\n", "&a [*a, ", "a, ", "[a, ", "'", "!"]
)
def test_a_megabyte_of_anything_is_refused(piece):
    with pytest.raises(MergeKitError):
        parse_recipe("x: [" + piece * (990_000 // len(piece)))
