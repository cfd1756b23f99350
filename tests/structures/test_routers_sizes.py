"""A config of other sizes than the weights is refused before a library builds a model of it."""

from __future__ import annotations

import json

import pytest

from merge_kit.errors import MergeKitError, MismatchError
from tests.structures import prompted

KINDS = ("llama", "mistral", "qwen2", "qwen3")


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return prompted.save("llama", tmp_path_factory.mktemp("base") / "llama")


@pytest.fixture
def edited(base):
    """Return what edits the config, as long as the test runs."""
    path = base / "config.json"
    before = path.read_text(encoding="utf-8")

    def edit(**values):
        path.write_text(json.dumps({**json.loads(before), **values}), encoding="utf-8")
        return base

    yield edit
    path.write_text(before, encoding="utf-8")


@pytest.mark.parametrize("router", ["cheap_embed", "hidden"])
@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("num_hidden_layers", 10**9),
        ("num_hidden_layers", 1),
        ("hidden_size", 10**12),
        ("head_dim", 10**9),
        ("num_key_value_heads", 10**9),
        ("partial_rotary_factor", 10**9),
    ],
)
def test_a_size_that_the_weights_do_not_have_is_refused_by_the_plan(router, key, value, edited):
    site, _ = prompted.planned(edited(**{key: value}), router)
    with pytest.raises(MergeKitError) as caught:
        site.findings.raise_any()
    assert isinstance(caught.value, MismatchError)
    assert f"{key} is {value} in config.json" in caught.value.problem
    assert "repair config.json" in caught.value.hint


@pytest.mark.parametrize("kind", KINDS)
def test_configs_as_they_are_written_have_the_sizes_of_the_weights(kind, tmp_path):
    site, _ = prompted.planned(prompted.save(kind, tmp_path / kind), "hidden")
    site.findings.raise_any()
