"""Tensors of models of other widths against the equations, written out in float64."""

from __future__ import annotations

import json

import narrow
import pytest
import torch
from narrow import WIDER, change
from safetensors.torch import load_file, save_file

HEAD_DIM = 8
HIDDEN, WIDE = 32, 80
ROOT = (HIDDEN / WIDE) ** 0.5


def tensors(folder):
    """Return the tensors of a folder in float64."""
    return {k: v.double() for f in folder.glob("*.safetensors") for k, v in load_file(f).items()}


def config(folder):
    return json.loads((folder / "config.json").read_text())


def is_norm(name):
    return name.endswith(("layernorm.weight", "model.norm.weight"))


def writes(name):
    """Return whether the rows of a matrix, or the elements of a bias, are hidden."""
    return any(word in name for word in ("o_proj", "down_proj", "w2"))


def close(found, expected):
    """Hold a tensor to one rounding to float32 of each element, and of what it is a sum of."""
    torch.testing.assert_close(found, expected, rtol=2e-6, atol=2e-6)


def grown(tensor, *sizes):
    """Return a tensor in the first corner of zeros."""
    made = torch.zeros(*sizes, dtype=torch.float64)
    made[tuple(slice(0, n) for n in tensor.shape)] = tensor
    return made


def padded(name, tensor):
    """Return a tensor of a Llama as `pad` to WIDER should make it."""
    heads, kv, inner = 8 * HEAD_DIM, 4 * HEAD_DIM, 72
    outputs = {
        "q_proj": heads, "k_proj": kv, "v_proj": kv, "o_proj": WIDE,
        "gate_proj": inner, "up_proj": inner, "down_proj": WIDE,
    }  # fmt: skip
    inputs = {"o_proj": heads, "down_proj": inner}
    if is_norm(name):
        return grown(tensor, WIDE) * ROOT
    if name in ("model.embed_tokens.weight", "lm_head.weight"):
        return grown(tensor, narrow.VOCAB, WIDE)
    layer = name.split(".")[-2]
    if tensor.ndim == 1:
        return grown(tensor, outputs[layer])
    return grown(tensor, outputs[layer], inputs.get(layer, WIDE))


def test_pad_puts_zeros_behind_and_scales_norms(tmp_path):
    model = narrow.save("llama", tmp_path / "model")
    change("pad", model, tmp_path / "out", **WIDER)
    found, before = tensors(tmp_path / "out"), tensors(model)
    assert found.keys() == before.keys()
    for name, tensor in before.items():
        expected = padded(name, tensor)
        if is_norm(name):
            close(found[name], expected)
        else:
            assert torch.equal(found[name], expected), name
    eps = config(tmp_path / "out")["rms_norm_eps"]
    assert eps == pytest.approx(1e-6 * HIDDEN / WIDE, rel=1e-12)


def test_new_heads_of_a_fused_projection_stand_behind_those_of_their_kind(tmp_path):
    model = narrow.save("phi3", tmp_path / "model")
    sizes = {"num_attention_heads": 6, "num_key_value_heads": 3, "intermediate_size": 50}
    change("pad", model, tmp_path / "out", **sizes)
    found, before = tensors(tmp_path / "out"), tensors(model)
    name = "model.layers.1.self_attn.qkv_proj.weight"
    q, k, v = before[name].split([32, 16, 16])
    zeros = torch.zeros(8, HIDDEN, dtype=torch.float64)
    assert torch.equal(found[name], torch.cat([q, zeros, zeros, k, zeros, v, zeros]))
    name = "model.layers.1.mlp.gate_up_proj.weight"
    gate, up = before[name].split(48)
    assert torch.equal(found[name], torch.cat([gate, zeros[:2], up, zeros[:2]]))


def test_crop_keeps_the_first_and_scales_norms_back(tmp_path):
    model = narrow.save("qwen2", tmp_path / "model")
    sizes = {"hidden_size": 12, "num_attention_heads": 2, "num_key_value_heads": 1}
    change("crop", model, tmp_path / "out", intermediate_size=30, **sizes)
    found, before = tensors(tmp_path / "out"), tensors(model)
    layer = "model.layers.0."
    assert torch.equal(
        found[layer + "mlp.down_proj.weight"], before[layer + "mlp.down_proj.weight"][:12, :30]
    )
    k = "self_attn.k_proj."
    assert torch.equal(found[layer + k + "weight"], before[layer + k + "weight"][:8, :12])
    assert torch.equal(found[layer + k + "bias"], before[layer + k + "bias"][:8])
    close(found["model.norm.weight"], before["model.norm.weight"][:12] * (32 / 12) ** 0.5)
    eps = config(tmp_path / "out")["rms_norm_eps"]
    assert eps == pytest.approx(1e-6 * 32 / 12, rel=1e-12)


def test_queries_and_keys_that_are_normalised_take_the_factor_too(tmp_path):
    """With q' = f q and eps' = f^2 eps, q'/sqrt(mean(q'^2) + eps') is q/sqrt(mean(q^2) + eps)."""
    model = narrow.save("qwen3", tmp_path / "model")
    change("pad", model, tmp_path / "out", hidden_size=WIDE)
    found, before = tensors(tmp_path / "out"), tensors(model)
    for which, factor in (("q", ROOT), ("k", ROOT), ("v", 1.0)):
        name = f"model.layers.0.self_attn.{which}_proj.weight"
        close(found[name], grown(before[name], before[name].shape[0], WIDE) * factor)
    name = "model.layers.0.self_attn.q_norm.weight"
    assert torch.equal(found[name], before[name])


def singular(embedding, rows):
    """Return right singular vectors by falling values, the largest number of each positive."""
    _, _, vectors = torch.linalg.svd(embedding, full_matrices=False)
    largest = vectors.abs().argmax(dim=1)
    vectors = vectors * vectors[torch.arange(len(vectors)), largest].sign()[:, None]
    kept = vectors[:rows]
    return grown(kept, rows, embedding.shape[1])


def norm_before(name):
    """Return the name of the norm in front of a matrix."""
    if name == "lm_head.weight":
        return "model.norm.weight"
    layer = name.split(".")[2]
    which = "input" if "self_attn" in name else "post_attention"
    return f"model.layers.{layer}.{which}_layernorm.weight"


def projected(name, tensor, before, onto, back, matched=()):
    """Return a tensor as it should be in the basis `onto`."""
    root = (onto.shape[1] / onto.shape[0]) ** 0.5
    if is_norm(name):
        return torch.full((onto.shape[0],), root, dtype=torch.float64)
    if name == "model.embed_tokens.weight":
        return tensor @ onto.T
    if writes(name):
        return onto @ tensor
    if tensor.ndim == 1:
        return tensor  # biases of what is not hidden; norms over heads
    factor = root if any(word in name for word in matched) else 1.0
    return (tensor * before[norm_before(name)]) @ back * factor


@pytest.mark.parametrize("hidden", [20, 32, 48])
@pytest.mark.parametrize("kind", ["llama", "mixtral", "qwen3"])
def test_project_folds_norms_and_turns_hidden_states(kind, hidden, tmp_path):
    more = {"tie_word_embeddings": False} if kind == "qwen3" else {}
    model = narrow.save(kind, tmp_path / "model", **more)
    change("project", model, tmp_path / "out", hidden_size=hidden)
    found, before = tensors(tmp_path / "out"), tensors(model)
    onto = singular(before["model.embed_tokens.weight"], hidden)
    matched = ("q_proj", "k_proj") if kind == "qwen3" else ()
    assert found.keys() == before.keys()
    for name, tensor in before.items():
        close(found[name], projected(name, tensor, before, onto, onto.T, matched))


def test_a_tied_head_becomes_one_of_its_own(tmp_path):
    model = narrow.save("tied_llama", tmp_path / "model")
    done = change("project", model, tmp_path / "out", hidden_size=24)
    found, before = tensors(tmp_path / "out"), tensors(model)
    assert "lm_head.weight" not in before
    embedding = before["model.embed_tokens.weight"]
    onto = singular(embedding, 24)
    close(found["model.embed_tokens.weight"], embedding @ onto.T)
    close(found["lm_head.weight"], (embedding * before["model.norm.weight"]) @ onto.T)
    assert config(model)["tie_word_embeddings"] is True
    assert config(tmp_path / "out")["tie_word_embeddings"] is False
    assert any("tied head becomes" in note for note in done.plan.notes)


@pytest.mark.parametrize("rows", [20, 32, 48])
@pytest.mark.parametrize("form", ["orthonormal", "any"])
def test_a_basis_of_a_file_is_used_with_its_pseudo_inverse(form, rows, tmp_path):
    model = narrow.save("llama", tmp_path / "model")
    matrix = torch.randn(rows, HIDDEN, generator=torch.Generator().manual_seed(3))
    matrix = matrix.double()
    if form == "orthonormal":
        left, _, right = torch.linalg.svd(matrix, full_matrices=False)
        matrix = left @ right
    other = torch.zeros(2, 2)
    save_file({"onto": matrix, "other": other}, tmp_path / "basis.safetensors")
    change("project", model, tmp_path / "out", basis=f"{tmp_path}/basis.safetensors:onto")
    found, before = tensors(tmp_path / "out"), tensors(model)
    back = torch.linalg.pinv(matrix)
    if form == "orthonormal":
        torch.testing.assert_close(back, matrix.T)
    for name, tensor in before.items():
        expected = projected(name, tensor, before, matrix, back)
        torch.testing.assert_close(found[name], expected, rtol=1e-5, atol=1e-5)
    assert config(tmp_path / "out")["hidden_size"] == rows


def test_the_same_bits_for_any_number_of_threads_and_any_slab(tmp_path):
    from merge_kit.engine.run import run_plan  # noqa: PLC0415
    from merge_kit.plan.build import build_plan  # noqa: PLC0415
    from merge_kit.recipe.parse import parse_recipe  # noqa: PLC0415

    model = narrow.save("mixtral", tmp_path / "model")
    text = json.dumps(
        {
            "merge_method": "project",
            "models": [{"model": str(model)}],
            "parameters": {"hidden_size": 20, "intermediate_size": 60},
        }
    )
    made = []
    for threads, blocks in ((1, 1), (2, 1), (3, None)):
        plan = build_plan(parse_recipe(text), threads=threads, slab_blocks=blocks)
        folder = tmp_path / f"{threads}-{blocks}"
        folder.mkdir()
        run_plan(plan, folder)
        made.append(load_file(folder / "model.safetensors"))
    for other in made[1:]:
        assert all(torch.equal(made[0][name], other[name]) for name in made[0])
