"""Adapters on a head that is its embedding, and on either of the two."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from merge_kit import merge as run
from merge_kit.errors import MismatchError
from tests.adapters.makers import answers, load_adapted, load_base, make_adapter, make_base
from tests.plan.adapters_by_hand import (
    EMBEDDING,
    HEAD,
    HIDDEN,
    ON_Q,
    TOKENS,
    Q,
    adapter,
    base,
    before,
    change,
    changed_by,
    factors,
    fates,
    numbers,
    passed,
    problem_of,
    rows,
)
from tests.toys import merge, plan


def tied(folder: Path, **more) -> torch.Tensor:
    """Write a tied model, and return its embedding."""
    base(folder / "base", tie_word_embeddings=True, **more)
    return before(folder)[EMBEDDING]


def result_of(folder: Path, recipe: str):
    made = plan(recipe, folder)
    config = next(file.text for file in made.side_files if file.name == "config.json")
    return merge(recipe, folder), json.loads(config or "")["tie_word_embeddings"]


ON_EMBEDDING = {
    "model.embed_tokens.lora_embedding_A": numbers(2, TOKENS),
    "model.embed_tokens.lora_embedding_B": numbers(HIDDEN, 2, start=4),
}
CHANGE = 2 * (numbers(HIDDEN, 2, start=4) @ numbers(2, TOKENS)).T


def test_an_embedding_that_changes_leaves_the_tied_head_as_it_was(tmp_path):
    own = tied(tmp_path)
    adapter(tmp_path / "a", ON_EMBEDDING)
    result, is_tied = result_of(tmp_path, passed("base+a"))
    assert torch.equal(result[EMBEDDING], own + CHANGE)
    assert torch.equal(result[HEAD], own)
    assert is_tied is False
    notes = plan(passed("base+a"), tmp_path).notes
    assert any("lm_head.weight is no longer tied" in note for note in notes)


def test_a_tied_head_that_changes_leaves_the_embedding_as_it_was(tmp_path):
    own = tied(tmp_path)
    parts = factors("lm_head", TOKENS, HIDDEN)
    adapter(tmp_path / "a", parts)
    result, is_tied = result_of(tmp_path, passed("base+a"))
    assert torch.equal(result[EMBEDDING], own)
    assert torch.equal(result[HEAD], own + change(parts, "lm_head").float())
    assert is_tied is False
    assert fates(plan(passed("base+a"), tmp_path), "input-1")[EMBEDDING] == ("merged", "")


def test_rows_of_tokens_are_those_of_the_tied_head_too(tmp_path):
    tied(tmp_path)
    held, at = rows("model.embed_tokens", [1], 1)
    adapter(tmp_path / "a", ON_Q | held, **at)
    result, is_tied = result_of(tmp_path, passed("base+a"))
    assert HEAD not in result
    assert is_tied is True


def test_a_tie_that_the_adapter_ensures_is_kept(tmp_path):
    own = tied(tmp_path)
    adapter(tmp_path / "a", ON_EMBEDDING, ensure_weight_tying=True)
    result, is_tied = result_of(tmp_path, passed("base+a"))
    assert HEAD not in result
    assert is_tied is True
    assert torch.equal(result[EMBEDDING], own + CHANGE)


def test_a_tied_head_that_is_stored_as_well_follows_rows_and_is_kept_otherwise(tmp_path):
    own = tied(tmp_path, tensors={HEAD: numbers(TOKENS, HIDDEN)})
    held, at = rows("model.embed_tokens", [1], 1)
    adapter(tmp_path / "t", ON_Q | held, **at)
    adapter(tmp_path / "e", ON_EMBEDDING)
    result, is_tied = result_of(tmp_path, passed("base+t"))
    assert is_tied is True
    assert torch.equal(result[HEAD], result[EMBEDDING])
    result, is_tied = result_of(tmp_path, passed("base+e"))
    assert is_tied is False
    assert torch.equal(result[HEAD], own)


def test_what_lies_below_an_update_of_a_tied_embedding_is_the_heads_too(tmp_path):
    tied(tmp_path)
    below = numbers(TOKENS, HIDDEN, start=6)
    adapter(tmp_path / "a", ON_EMBEDDING | {"model.embed_tokens.base_layer.weight": below})
    result, is_tied = result_of(tmp_path, passed("base+a"))
    assert is_tied is False
    assert torch.equal(result[EMBEDDING], below + CHANGE)
    assert torch.equal(result[HEAD], below)


def test_a_tied_model_and_an_untied_overlay_of_it_merge_with_a_head(tmp_path):
    own = tied(tmp_path)
    adapter(tmp_path / "a", factors("lm_head", TOKENS, HIDDEN))
    recipe = """
merge_method: task_arithmetic
base_model: base
models: [{model: a, parameters: {weight: 0.5}}]
"""
    result, is_tied = result_of(tmp_path, recipe)
    assert is_tied is False
    assert torch.equal(result[EMBEDDING], own)
    half = change(factors("lm_head", TOKENS, HIDDEN), "lm_head", 1.0)
    assert torch.equal(result[HEAD], own + half.float())


@pytest.mark.parametrize(
    ("config", "why"),
    [
        ({"is_encoder_decoder": True}, "an encoder and a decoder share it"),
        ({"architectures": None}, "names no class whose head is known"),
    ],
)
def test_a_tie_that_cannot_be_parted_is_refused(tmp_path, config, why):
    tied(tmp_path, **config)
    adapter(tmp_path / "a", ON_EMBEDDING)
    with pytest.raises(MismatchError, match=why) as caught:
        plan(passed("base+a"), tmp_path)
    assert "trainable_token_indices" in caught.value.hint


def test_without_a_config_nothing_tells_whether_a_head_is_tied(tmp_path):
    own = tied(tmp_path)
    (tmp_path / "base/config.json").unlink()
    adapter(tmp_path / "a", ON_EMBEDDING)
    assert "no config.json tells" in problem_of(passed("base+a"), tmp_path).problem
    held, at = rows("model.embed_tokens", [1], 1)
    adapter(tmp_path / "t", ON_Q | held, **at)
    result = merge(passed("base+t"), tmp_path)
    assert changed_by(result, before(tmp_path)) == {EMBEDDING, f"{Q.format(0)}.weight"}
    assert torch.equal(result[EMBEDDING][2:], own[2:])


def test_a_model_without_a_head_needs_none(tmp_path):
    own = tied(tmp_path, architectures=["LlamaModel"])
    adapter(tmp_path / "a", ON_EMBEDDING)
    result, _ = result_of(tmp_path, passed("base+a"))
    assert torch.equal(result[EMBEDDING], own + CHANGE)
    assert HEAD not in result


# against peft ------------------------------------------------------------------------------------

TIED = {
    "embedding": ("llama_tied", {"target_modules": ["embed_tokens"]}),
    "head": ("llama_tied", {"target_modules": ["lm_head"]}),
    "both": ("llama_tied", {"target_modules": ["embed_tokens", "lm_head"]}),
    "ensured": ("llama_tied", {"target_modules": ["embed_tokens"], "ensure_weight_tying": True}),
    "embedding saved": ("llama_tied", {"modules_to_save": ["embed_tokens"]}),
    "head saved": ("llama_tied", {"modules_to_save": ["lm_head"]}),
    "both saved": ("llama_tied", {"modules_to_save": ["lm_head", "embed_tokens"]}),
    "other rows": (
        "llama_tied",
        {"trainable_token_indices": {"embed_tokens": [3, 4], "lm_head": [5]}},
    ),
    "GPT-2's embedding": ("gpt2", {"target_modules": ["wte", "c_proj"]}),
    "GPT-2's head": ("gpt2", {"target_modules": ["lm_head"]}),
    "lengths of GPT-2's embedding": ("gpt2", {"target_modules": ["wte"], "use_dora": True}),
}


@pytest.mark.parametrize("name", TIED)
def test_a_tied_model_answers_as_it_does_in_peft(tmp_path, name):
    kind, settings = TIED[name]
    folder = make_base(kind, tmp_path / "base")
    settings = {"r": 4, "lora_alpha": 6, "target_modules": ["q_proj"], **settings}
    made = make_adapter(kind, folder, tmp_path / "a", **settings)
    run({"merge_method": "passthrough", "models": [{"model": f"{folder}+{made}"}]}, tmp_path / "o")
    wanted, found = load_adapted(kind, folder, made), load_base(kind, tmp_path / "o")
    assert float((answers(found) - answers(wanted)).abs().max()) <= 1e-9  # of numbers near 10
    assert json.loads((tmp_path / "o/config.json").read_text())["tie_word_embeddings"] is False


def test_the_head_of_a_gpt2_whose_names_have_no_prefix(tmp_path):
    folder = make_base("gpt2", tmp_path / "base")
    settings = {"target_modules": ["wte", "c_attn"], "r": 4, "lora_alpha": 6}
    made = make_adapter("gpt2", folder, tmp_path / "a", **settings)
    wanted = answers(load_adapted("gpt2", folder, made))
    bare = {k.removeprefix("transformer."): v for k, v in load_file(weights(folder)).items()}
    save_file(bare, weights(folder), metadata={"format": "pt"})
    run({"merge_method": "passthrough", "models": [{"model": f"{folder}+{made}"}]}, tmp_path / "o")
    found = answers(load_base("gpt2", tmp_path / "o"))
    assert float((found - wanted).abs().max()) <= 1e-9


def weights(folder: Path) -> Path:
    return folder / "model.safetensors"
