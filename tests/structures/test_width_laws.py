"""Laws of changes of width, and their place among other stages."""

from __future__ import annotations

import json
from math import log2
from pathlib import Path

import narrow
import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from narrow import KINDS, WIDER, change
from safetensors.torch import load_file, save_file

from merge_kit.api import merge, plan

HEAD_DIM = 4
TIMES_FOUR = {
    "hidden_size": 128,
    "intermediate_size": 72,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
}
"""Weights of norms take the factor 1/2."""


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return narrow.save("llama", tmp_path_factory.mktemp("llama") / "llama")


def tensors(folder):
    return {k: v for f in folder.glob("*.safetensors") for k, v in load_file(f).items()}


def sizes_of(folder):
    config = json.loads((folder / "config.json").read_text())
    return {key: config[key] for key in WIDER}


@pytest.mark.parametrize("kind", KINDS)
def test_crop_undoes_pad_bit_for_bit_where_the_factor_is_a_power_of_two(kind, tmp_path):
    model = narrow.save(kind, tmp_path / "model")
    change("pad", model, tmp_path / "wide", **TIMES_FOUR)
    change("crop", tmp_path / "wide", tmp_path / "out", like=model)
    found, before = tensors(tmp_path / "out"), tensors(model)
    assert found.keys() == before.keys()
    assert all(torch.equal(found[name], before[name]) for name in before)
    one, other = (json.loads((f / "config.json").read_text()) for f in (model, tmp_path / "out"))
    one["head_dim"] = one.get("head_dim") or 8  # which is told now
    assert {key: other[key] for key in one} == one


def test_what_is_not_changed_in_a_config_stays_as_it_is_written(llama, tmp_path):
    change("pad", llama, tmp_path / "out", intermediate_size=72)
    before = (llama / "config.json").read_text()
    after = (tmp_path / "out" / "config.json").read_text()
    assert after == before.replace('"intermediate_size": 48', '"intermediate_size": 72')


def test_a_head_dim_is_written_where_the_sizes_no_longer_give_it(llama, tmp_path):
    text = json.loads((llama / "config.json").read_text())
    del text["head_dim"]
    (tmp_path / "model").mkdir()
    save_file(tensors(llama), tmp_path / "model" / "model.safetensors")
    (tmp_path / "model" / "config.json").write_text(json.dumps(text))
    done = {"hidden_size": 64, "num_attention_heads": 8, "num_key_value_heads": 4}
    change("pad", tmp_path / "model", tmp_path / "told", **done)
    assert "head_dim" not in json.loads((tmp_path / "told" / "config.json").read_text())
    change("pad", tmp_path / "model", tmp_path / "untold", hidden_size=64)
    assert json.loads((tmp_path / "untold" / "config.json").read_text())["head_dim"] == 8


def test_sizes_of_another_model(llama, tmp_path):
    like = narrow.save("llama", tmp_path / "like", **WIDER, head_dim=8)
    done = change("pad", llama, tmp_path / "out", like=like)
    assert sizes_of(tmp_path / "out") == WIDER
    lent = [fate for fate in done.plan.fates if fate.model == "input-2"]
    assert {(fate.what, fate.why) for fate in lent} == {
        ("dropped", "input-2:like lends its sizes only")
    }
    assert len(lent) == len(tensors(like))
    change("pad", llama, tmp_path / "own", like=like, intermediate_size=56)
    assert sizes_of(tmp_path / "own") == {**WIDER, "intermediate_size": 56}


def test_every_tensor_is_accounted_for(llama, tmp_path):
    done = change("pad", llama, tmp_path / "inner", intermediate_size=72)
    fates = {fate.tensor: fate.what for fate in done.plan.fates}
    assert fates["model.layers.0.mlp.down_proj.weight"] == "merged"
    assert fates["model.layers.0.mlp.down_proj.bias"] == "copied"
    done = change("project", llama, tmp_path / "out", hidden_size=20)
    fates = {fate.tensor: fate.what for fate in done.plan.fates}
    assert fates.keys() == tensors(llama).keys()
    assert fates["model.norm.weight"] == "merged"  # it is in the head
    assert "dropped" not in fates.values()


@pytest.mark.parametrize(
    ("method", "sizes", "said"),
    [
        ("pad", {"hidden_size": 64}, None),
        ("crop", {"hidden_size": 20}, "hidden_size 32 to 20: the first are kept; unless"),
        ("project", {"hidden_size": 20}, "projected on 20 directions, and what lies in the others"),
        ("project", {"intermediate_size": 56}, "48 to 56: padded with zeros, as by pad"),
        ("project", {"intermediate_size": 40}, "48 to 40: the first are kept"),
    ],
)
def test_what_is_lost_is_said(method, sizes, said, llama):
    recipe = {"merge_method": method, "models": [{"model": str(llama)}], "parameters": sizes}
    notes = plan(recipe).notes
    assert any(said in note for note in notes) if said else not notes


def test_a_padded_model_is_merged_with_a_wider_one(llama, tmp_path):
    wide = narrow.save("llama", tmp_path / "wide", 2, **WIDER, head_dim=8)
    padded = {"name": "padded", "merge_method": "pad", "base_model": str(wide)}
    both = [{"model": "padded"}, {"model": str(wide)}]
    recipe = [
        {**padded, "models": [{"model": str(llama)}]},
        {"merge_method": "linear", "models": both, "parameters": {"weight": 0.5}},
    ]
    done = merge(recipe, tmp_path / "out")
    change("pad", llama, tmp_path / "alone", like=wide)
    one, other, found = tensors(tmp_path / "alone"), tensors(wide), tensors(tmp_path / "out")
    for name in found:
        torch.testing.assert_close(found[name], (one[name] + other[name]) / 2)
    narrow.load("llama", tmp_path / "out")
    assert not [fate for fate in done.plan.fates if fate.what == "dropped"]


@pytest.mark.parametrize("method", ["pad", "crop", "project"])
def test_an_earlier_stage_is_changed_as_if_it_were_a_model(method, llama, tmp_path):
    other = narrow.save("llama", tmp_path / "other", 2)
    mean = {
        "merge_method": "linear",
        "models": [{"model": str(llama)}, {"model": str(other)}],
        "parameters": {"weight": 0.5},
    }
    size = 20 if method == "crop" else 48
    last = {"merge_method": method, "models": [{"model": "mean"}], "parameters": {}}
    last["parameters"] = {"hidden_size": size}
    merge([{"name": "mean", **mean}, last], tmp_path / "at_once")
    merge(mean, tmp_path / "mean")
    change(method, tmp_path / "mean", tmp_path / "in_turn", hidden_size=size)
    found, expected = tensors(tmp_path / "at_once"), tensors(tmp_path / "in_turn")
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in found)


def test_a_dtype_of_the_stage_is_that_of_the_output(llama, tmp_path):
    recipe = {
        "merge_method": "project",
        "models": [{"model": str(llama)}],
        "parameters": {"hidden_size": 48},
        "dtype": "bfloat16",
    }
    merge(recipe, tmp_path / "out")
    assert {t.dtype for t in tensors(tmp_path / "out").values()} == {torch.bfloat16}
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "bfloat16"


def fused(model, folder):
    """Return a mixture of experts with its experts in two tensors of three axes a layer."""
    held, made = tensors(model), {}
    for name in held:
        layer, found, rest = name.partition("block_sparse_moe.experts.")
        if not found:
            made[name.replace("block_sparse_moe", "mlp")] = held[name]
        elif rest == "0.w1.weight":
            w1, w2, w3 = (
                torch.stack([held[f"{layer}{found}{e}.{w}.weight"] for e in range(3)])
                for w in ("w1", "w2", "w3")
            )
            made[f"{layer}mlp.experts.gate_up_proj"] = torch.cat([w1, w3], dim=1)
            made[f"{layer}mlp.experts.down_proj"] = w2
    folder.mkdir()
    save_file(made, folder / "model.safetensors")
    (folder / "config.json").write_text((model / "config.json").read_text())
    return folder


@pytest.mark.parametrize(("method", "hidden", "inner"), [("pad", 48, 64), ("project", 20, 40)])
def test_fused_experts_are_the_same_as_split_ones(method, hidden, inner, tmp_path):
    split = narrow.save("mixtral", tmp_path / "split")
    whole = fused(split, tmp_path / "fused")
    sizes = {"hidden_size": hidden, "intermediate_size": inner}
    change(method, split, tmp_path / "one", **sizes)
    change(method, whole, tmp_path / "other", **sizes)
    expected = tensors(fused(tmp_path / "one", tmp_path / "one_fused"))
    found = tensors(tmp_path / "other")
    assert found.keys() == expected.keys()
    for name in found:  # products of other shapes round otherwise
        torch.testing.assert_close(found[name], expected[name], rtol=1e-6, atol=1e-6)


def write(folder, sizes, seed):
    """Write a Llama of one layer and a small vocabulary."""
    hidden, inner, groups = sizes
    heads, kv = 2 * groups * HEAD_DIM, groups * HEAD_DIM
    generator = torch.Generator().manual_seed(seed)
    shapes = {
        "model.embed_tokens.weight": (6, hidden),
        "model.norm.weight": (hidden,),
        "model.layers.0.input_layernorm.weight": (hidden,),
        "model.layers.0.self_attn.q_proj.weight": (heads, hidden),
        "model.layers.0.self_attn.k_proj.weight": (kv, hidden),
        "model.layers.0.self_attn.v_proj.weight": (kv, hidden),
        "model.layers.0.self_attn.o_proj.weight": (hidden, heads),
        "model.layers.0.post_attention_layernorm.weight": (hidden,),
        "model.layers.0.mlp.gate_proj.weight": (inner, hidden),
        "model.layers.0.mlp.down_proj.weight": (hidden, inner),
    }
    folder.mkdir()
    made = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    save_file(made, folder / "model.safetensors")
    config = {
        "model_type": "mistral",
        "head_dim": HEAD_DIM,
        "rms_norm_eps": 1e-6,
        **given_sizes(sizes),
    }
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def given_sizes(sizes):
    hidden, inner, groups = sizes
    return {
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_attention_heads": 2 * groups,
        "num_key_value_heads": groups,
    }


narrower = st.tuples(st.integers(1, 9), st.integers(1, 9), st.integers(1, 3))
more = st.tuples(st.integers(0, 9), st.integers(0, 9), st.integers(0, 3))


@settings(max_examples=15, deadline=None)
@given(narrower, more, more, st.integers(0, 1000))
def test_widths_compose_and_are_undone(tmp_path_factory, first, step, further, seed):
    root = tmp_path_factory.mktemp("law")
    middle = tuple(a + b for a, b in zip(first, step, strict=True))
    last = tuple(a + b for a, b in zip(middle, further, strict=True))
    model = write(root / "model", first, seed)
    change("pad", model, root / "middle", **given_sizes(middle))
    change("pad", root / "middle", root / "last", **given_sizes(last))
    change("pad", model, root / "at_once", **given_sizes(last))
    change("crop", root / "last", root / "back", **given_sizes(first))
    ends, at_once = tensors(root / "last"), tensors(root / "at_once")
    for name in ends:
        torch.testing.assert_close(ends[name], at_once[name], rtol=4e-7, atol=0)
    back, before = tensors(root / "back"), tensors(model)
    exact = all(log2(a / b) % 2 == 0 for a, b in ((middle[0], first[0]), (last[0], middle[0])))
    for name in before:
        if exact or not name.endswith("norm.weight"):
            assert torch.equal(back[name], before[name])
        else:
            torch.testing.assert_close(back[name], before[name], rtol=4e-7, atol=0)
    assert sizes_of(root / "back") == given_sizes(first)


@settings(max_examples=10, deadline=None)
@given(narrower, more, st.integers(0, 1000))
def test_projections_keep_products(tmp_path_factory, first, step, seed):
    """What is written to hidden states and read from them is as before: W2' W1' = W2 g W1."""
    root = tmp_path_factory.mktemp("law")
    last = tuple(a + b for a, b in zip(first, step, strict=True))
    model = write(root / "model", first, seed)
    change("project", model, root / "out", hidden_size=last[0])
    found, before = tensors(root / "out"), tensors(model)
    layer = "model.layers.0."
    for writes, norm, reads in (
        ("model.embed_tokens.weight", "input_layernorm.weight", "self_attn.q_proj.weight"),
        (layer + "mlp.down_proj.weight", "input_layernorm.weight", "self_attn.k_proj.weight"),
        (
            layer + "self_attn.o_proj.weight",
            "post_attention_layernorm.weight",
            "mlp.gate_proj.weight",
        ),
    ):
        one, other = before[writes].double(), found[writes].double()
        if writes.startswith("model.embed"):
            one, other = one.T, other.T
        was = (before[layer + reads].double() * before[layer + norm].double()) @ one
        now = found[layer + reads].double() @ other
        torch.testing.assert_close(now, was, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("method", ["pad", "project"])
def test_a_model_with_an_adapter_is_changed_as_the_merged_one(method, tmp_path):
    demo = Path(__file__).parents[2] / "recipes" / "demo"
    applied = f"{demo / 'base'}+{demo / 'adapter-sort'}"
    merge({"merge_method": "passthrough", "models": [{"model": applied}]}, tmp_path / "merged")
    dtypes = {t.dtype for t in tensors(tmp_path / "merged").values()}
    for model, name in ((applied, "at_once"), (tmp_path / "merged", "in_turn")):
        change(method, model, tmp_path / name, hidden_size=160)
    found, expected = tensors(tmp_path / "at_once"), tensors(tmp_path / "in_turn")
    assert found.keys() == expected.keys()
    step = 2.0**-7 if dtypes == {torch.bfloat16} else 1e-6  # the merged one is rounded between
    for name in found:
        torch.testing.assert_close(found[name], expected[name], rtol=2 * step, atol=2 * step)


def test_a_head_over_classes_takes_the_final_norm(tmp_path):
    kind = transformers.LlamaForSequenceClassification
    settings = {**narrow.SIZES, "num_labels": 3, "tie_word_embeddings": False}
    torch.manual_seed(0)
    model = kind(transformers.LlamaConfig(**settings)).eval()
    with torch.no_grad():
        model.model.norm.weight.uniform_(0.5, 2.0)
    model.save_pretrained(tmp_path / "model")
    change("project", tmp_path / "model", tmp_path / "out", hidden_size=48)
    found, info = kind.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info.values())
    expected = narrow.logits(model)
    torch.testing.assert_close(narrow.logits(found.eval()), expected, rtol=1e-5, atol=1e-5)


def test_a_tied_head_that_is_stored_all_the_same_is_left_out(tmp_path):
    model = narrow.save("tied_llama", tmp_path / "model")
    held = tensors(model)
    stale = torch.zeros_like(held["model.embed_tokens.weight"])
    save_file({**held, "lm_head.weight": stale}, model / "model.safetensors")
    done = change("project", model, tmp_path / "out", hidden_size=48)
    assert tensors(tmp_path / "out")["lm_head.weight"].abs().max() > 0
    dropped = {f.tensor: f.why for f in done.plan.fates if f.what == "dropped"}
    assert dropped == {"lm_head.weight": "a tied head is its embedding"}
