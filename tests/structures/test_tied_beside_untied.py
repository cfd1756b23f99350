"""Models with tied heads and with heads of their own in one stack: vocabularies must agree."""

from __future__ import annotations

import json

import plain_models
import pytest
import torch
from safetensors.torch import load_file, save_file

from merge_kit.errors import MismatchError
from tests.toys import plan

WORDS = 14


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Write models of 10 and of 14 words, each with a tied head and with one of its own."""
    root = tmp_path_factory.mktemp("vocabularies")
    for seed, (name, tied) in enumerate({"tied": True, "own": False}.items()):
        plain_models.write(root / name, "llama", 2, seed, torch.float32, tied=tied)
        more = root / f"{name}_words"
        plain_models.write(more, "llama", 2, seed, torch.float32, tied=tied)
        tensors = load_file(more / "model.safetensors")
        wider = {n: torch.ones(WORDS, t.shape[1]) for n, t in tensors.items() if len(t) == 10}
        save_file(tensors | wider, more / "model.safetensors", {"format": "pt"})
        config = json.loads((more / "config.json").read_text(encoding="utf-8"))
        text = json.dumps(config | {"vocab_size": WORDS})
        (more / "config.json").write_text(text, encoding="utf-8")
    return root


def stacked(below: str, above: str, base: str = "") -> str:
    lead = f"base_model: {base}\n" if base else ""
    sources = "".join(
        f"  - sources: [{{model: {name}, layer_range: [0, 2]}}]\n" for name in (below, above)
    )
    return f"{lead}merge_method: passthrough\nslices:\n{sources}"


def upscaled(below: str, above: str, base: str = "") -> str:
    lead = f"base_model: {base}\n" if base else ""
    return (
        f"{lead}merge_method: depth_upscale\nmodels: [{{model: {below}}}, {{model: {above}}}]\n"
        "parameters: {overlap: 0}\n"
    )


REFUSED = [
    ("tied", "own_words", ""),
    ("tied_words", "own", ""),
    ("own", "tied_words", ""),
    ("own_words", "tied", ""),
    ("own", "own_words", ""),
    ("tied", "own_words", "tied"),
    ("tied", "own_words", "own"),
    ("own", "tied_words", "own"),
    ("tied", "tied_words", "own"),
    ("own_words", "own", "tied"),
]


@pytest.mark.parametrize("written", [stacked, upscaled])
@pytest.mark.parametrize(("below", "above", "base"), REFUSED)
def test_a_head_of_another_vocabulary_than_the_embedding_is_refused(
    folder, written, below, above, base
):
    with pytest.raises(MismatchError) as caught:
        plan(written(below, above, base), folder)
    assert "[14, 8]" in caught.value.problem
    assert "[10, 8]" in caught.value.problem
    assert "vocab_size differs" in caught.value.problem
    assert "vocabulary" in caught.value.hint


def test_the_refusal_says_that_the_head_is_the_embedding(folder):
    with pytest.raises(MismatchError) as caught:
        plan(stacked("tied", "own_words"), folder)
    assert caught.value.problem.startswith(
        "lm_head.weight of input-2:own_words has shape [14, 8], model.embed_tokens.weight, the "
        "tied head of input-1:tied, whose config is taken, [10, 8]"
    )
    assert caught.value.where == "<recipe>:4:5"


@pytest.mark.parametrize("written", [stacked, upscaled])
@pytest.mark.parametrize(("below", "above"), [("tied", "own"), ("own", "tied"), ("tied", "tied")])
def test_models_of_one_vocabulary_may_be_mixed(folder, written, below, above):
    """The result has a head of its own unless both are tied."""
    names = {step.outputs[0].key for step in plan(written(below, above), folder).steps}
    assert ("lm_head.weight" in names) is ("own" in (below, above))


def test_of_two_tied_models_only_the_embedding_of_the_first_counts(folder):
    plan(stacked("tied", "tied_words"), folder)
