"""Refusals point at the value that is wrong, and hint at what would be right."""

from __future__ import annotations

import pytest
import torch

from merge_kit.errors import MergeKitError
from tests.toys import plan, toy, write


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Write models of two widths, of two vocabularies, and with two numbers of experts."""
    root = tmp_path_factory.mktemp("hints")
    dense(root / "a")
    dense(root / "wide", wide=8)
    dense(root / "words", words=5)
    fused(root / "three", 3)
    fused(root / "four", 4)
    return root


def dense(folder, words=3, wide=6):
    tensors = {
        "model.embed_tokens.weight": torch.zeros(words, 4),
        "model.layers.0.mlp.up_proj.weight": torch.zeros(wide, 4),
        "model.layers.0.mlp.down_proj.weight": torch.zeros(4, wide),
        "lm_head.weight": torch.zeros(words, 4),
    }
    sizes = {"hidden_size": 4, "intermediate_size": wide, "vocab_size": words}
    sizes |= {"num_attention_heads": 2}
    write(folder, tensors, settings("llama", **sizes))


def fused(folder, count):
    tensors = {
        "model.embed_tokens.weight": torch.zeros(5, 4),
        "model.layers.0.mlp.gate.weight": torch.zeros(count, 4),
        "model.layers.0.mlp.experts.gate_up_proj": torch.zeros(count, 12, 4),
        "model.layers.0.mlp.experts.down_proj": torch.zeros(count, 4, 6),
    }
    write(folder, tensors, settings("qwen3_moe", num_experts=count, hidden_size=4))


def settings(kind, **more):
    return {"model_type": kind, "num_hidden_layers": 1, "tie_word_embeddings": False, **more}


def refused(text, folder):
    with pytest.raises(MergeKitError) as caught:
        plan(text, folder)
    return str(caught.value)


def linear(*names):
    listed = "".join(f"  - {{model: {name}, parameters: {{weight: 1}}}}\n" for name in names)
    return f"merge_method: linear\nmodels:\n{listed}"


def test_mixtures_of_other_numbers_of_experts_are_told_these(folder):
    said = refused(linear("three", "four"), folder)
    assert "num_experts is 3 and 4" in said
    assert "hint: only mixtures of as many experts can be merged one by one" in said
    assert "vocabular" not in said


def test_mlps_of_other_widths_are_sent_to_pad_and_crop(folder):
    said = refused(linear("a", "wide"), folder)
    assert "intermediate_size is 6 and 8" in said
    assert "hint: pad, crop or project one of them" in said
    assert "vocabular" not in said


def test_embeddings_and_heads_are_asked_about_vocabularies(folder):
    said = refused(linear("a", "words"), folder)
    assert said.count("do the vocabularies differ?") == 2


def test_a_config_that_cannot_follow_is_named_with_its_model(tmp_path):
    pattern = {"model_type": "gemma2", "sliding_window": 4, "sliding_window_pattern": 2}
    toy(tmp_path / "x", layers=4, **(pattern | {"model_type": "gemma3_text"}))
    text = "merge_method: passthrough\nslices:\n  - sources: [{model: x, layers: [1, 0, 2]}]\n"
    said = refused(text, tmp_path)
    assert said.startswith("input-1:x/config.json: sliding_window_pattern cannot follow")


@pytest.mark.parametrize("method", ["depth_upscale", "sparse_upcycle", "moe_to_dense"])
def test_methods_of_a_base_alone_ask_for_one(method, tmp_path):
    said = refused(f"merge_method: {method}\n", tmp_path)
    assert "found neither models nor a base_model" in said
    assert "hint: write base_model: NAME, or models:" in said


@pytest.mark.parametrize("method", ["pad", "crop", "project", "match_experts"])
def test_methods_that_only_compare_with_a_base_ask_for_models(method, tmp_path):
    said = refused(f"merge_method: {method}\n", tmp_path)
    assert "found no models, expected one\n  hint: write models:" in said


@pytest.mark.parametrize("method", ["linear", "passthrough"])
def test_other_methods_ask_for_models(method, tmp_path):
    said = refused(f"merge_method: {method}\n", tmp_path)
    assert "found no models, slices or modules" in said
    assert "hint: write for example models:" in said


def test_one_model_without_a_reference_is_one(folder):
    said = refused("merge_method: match_experts\nmodels: [{model: three}]\n", folder)
    assert "found 1 model and no base_model" in said


@pytest.mark.parametrize(
    "parameters",
    ["target_layers: true", "overlap: true", "overlap: false"],
)
def test_true_and_false_are_no_numbers_of_layers(parameters, folder):
    text = f"merge_method: depth_upscale\nmodels: [{{model: a}}]\nparameters: {{{parameters}}}\n"
    said = refused(text, folder)
    assert "expected a whole number" in said
    assert said.startswith("<recipe>:3:")


def test_a_basis_of_nearly_the_name_of_a_file_is_told_it(folder):
    (folder / "turns.safetensors").write_bytes(b"")
    text = "merge_method: project\nmodels: [{model: a}]\nparameters: {basis: turn.safetensors}\n"
    said = refused(text, folder)
    assert "did you mean 'turns.safetensors'?" in said
    assert "basis is svd, or the path of a safetensors file" in said


def mixtral(folder, count, **more):
    lead = "model.layers.0.block_sparse_moe"
    tensors = {"model.embed_tokens.weight": torch.zeros(5, 4)}
    tensors[f"{lead}.gate.weight"] = torch.zeros(count, 4)
    for i in range(count):
        tensors |= {f"{lead}.experts.{i}.w{w}.weight": torch.zeros(4, 4) for w in (1, 2, 3)}
    write(folder, tensors, settings("mixtral", hidden_size=4, **more))


@pytest.mark.parametrize("counted", [True, False])
@pytest.mark.parametrize(("base", "model"), [(3, 4), (4, 3)])
def test_what_a_mixture_lacks_is_the_only_thing_said_of_it(base, model, counted, tmp_path):
    for count in (3, 4):
        more = {"num_local_experts": count} if counted else {}
        mixtral(tmp_path / f"m{count}", count, vocab_size=count, **more)
    text = f"merge_method: ties\nbase_model: m{base}\nmodels: [{{model: m{model}}}]\n"
    said = refused(text + "parameters: {weight: 1}\n", tmp_path)
    assert "lacks 3 tensors" in said
    assert "hint: only mixtures of as many experts can be merged one by one" in said
    assert "needs a base_model" not in said
    assert "found 0" not in said
    assert "vocabular" not in said
