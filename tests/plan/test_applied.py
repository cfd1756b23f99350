"""Adapters applied on the fly: what each tensor is then made of."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from merge_kit.errors import MismatchError
from merge_kit.plan.describe import summary
from merge_kit.plan.describe_json import plan_json
from merge_kit.plan.describe_steps import rule_lines
from tests.plan.adapters_by_hand import (
    EMBEDDING,
    HEAD,
    HIDDEN,
    NORM,
    ON_Q,
    ON_UP,
    PREFIX,
    SAVED,
    TOKENS,
    Q,
    adapter,
    base,
    before,
    change,
    changed_by,
    dora,
    factors,
    fates,
    numbers,
    passed,
    rows,
    weighed,
    write_models,
)
from tests.toys import merge, plan, write


@pytest.fixture
def models(tmp_path):
    return write_models(tmp_path)


# one adapter --------------------------------------------------------------------------------------


def test_the_change_is_alpha_over_rank_times_b_a(models):
    result = merge(passed("base+a"), models)
    name = f"{Q.format(0)}.weight"
    wanted = before(models)[name] + change(ON_Q, Q.format(0)).float()
    assert torch.equal(result[name], wanted)
    assert changed_by(result, before(models)) == {name}


def test_only_what_changes_is_computed(models):
    made = plan(passed("base+a"), models)
    computed = {step.outputs[0].key for step in made.steps if step.action == "merge"}
    assert computed == {f"{Q.format(0)}.weight"}
    assert made.counts() == (1, 6, 0)


def test_every_tensor_of_base_and_adapter_has_its_fate(models):
    made = plan(passed("base+a"), models)
    name = f"{Q.format(0)}.weight"
    own = fates(made, "input-1")
    assert own.pop(name) == ("merged", "")
    assert set(own.values()) == {("copied", "")}
    assert fates(made, "input-2") == {PREFIX + name: ("merged", "") for name in ON_Q}


def test_the_base_is_one_input_however_it_is_named(models):
    recipe = """
merge_method: linear
base_model: base
parameters: {weight: 1}
models: [{model: base+a}, {model: base+b}, {model: base+a+b}]
"""
    made = plan(recipe, models)
    assert [(one.key, one.name, one.text) for one in made.inputs] == [
        ("input-1", "base", "base"),
        ("input-2", "a", "a"),
        ("input-3", "b", "b"),
    ]
    assert [one.is_base for one in made.inputs] == [True, False, False]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_the_result_has_the_dtype_of_the_base(tmp_path, dtype):
    base(tmp_path / "base", dtype=dtype)
    adapter(tmp_path / "a", ON_Q)
    result = merge(passed("base+a"), tmp_path)
    assert {tensor.dtype for tensor in result.values()} == {dtype}
    computed = next(s for s in plan(passed("base+a"), tmp_path).steps if s.action == "merge")
    assert computed.compute == ("F64" if dtype == torch.float64 else "F32")


def test_a_dtype_that_is_named_is_that_of_every_tensor(models):
    recipe = json.loads(passed("base+a")) | {"dtype": "bfloat16"}
    result = merge(json.dumps(recipe), models)
    assert {tensor.dtype for tensor in result.values()} == {torch.bfloat16}


def test_a_plan_of_adapters_can_be_described(models):
    made = plan(passed("base+a+b"), models)
    assert any("2 by passthrough" in row.text for row in summary(made, None))
    assert any("input-1:base+input-2:a+input-3:b" in line for line in rule_lines(made))
    assert json.loads(json.dumps(plan_json(made)))["tensors"]["copied"] == 5


# several, and their weights -----------------------------------------------------------------------


def test_changes_of_several_adapters_add_up_in_any_order(models):
    adapter(models / "c", factors(Q.format(0), HIDDEN, HIDDEN, start=6), lora_alpha=1)
    one, other = merge(passed("base+a+b+c"), models), merge(passed("base+c+b+a"), models)
    assert not changed_by(one, other)
    extra = factors(Q.format(0), HIDDEN, HIDDEN, start=6)
    name = f"{Q.format(0)}.weight"
    total = change(ON_Q, Q.format(0)) + change(extra, Q.format(0), 0.5)
    assert torch.equal(one[name], before(models)[name] + total.float())


def test_a_weight_multiplies_the_change(models):
    result = merge(passed(weighed("base", a=-0.5)), models)
    name = f"{Q.format(0)}.weight"
    assert torch.equal(result[name], before(models)[name] - change(ON_Q, Q.format(0), 1.0).float())


def test_an_adapter_that_is_named_twice_counts_twice(models):
    twice = merge(passed("base+a+a"), models)
    assert not changed_by(twice, merge(passed(weighed("base", a=2)), models))


def test_an_adapter_less_itself_changes_no_byte_and_is_dropped(models):
    both = {"model": "base", "lora": ["a", {"path": "a", "weight": -1}]}
    made = plan(passed(both), models)
    assert made.counts() == (0, 7, 2)
    assert set(fates(made, "input-2").values()) == {("dropped", "its weight is 0")}
    assert not changed_by(merge(passed(both), models), before(models))


# other layouts of a weight ------------------------------------------------------------------------


def test_a_weight_that_is_stored_with_inputs_first_takes_the_transpose(tmp_path):
    module = "transformer.h.0.attn.c_attn"
    weight = numbers(HIDDEN, 6)
    write(tmp_path / "base", {f"{module}.weight": weight}, {"model_type": "gpt2"})
    parts = factors(module, 6, HIDDEN)
    adapter(tmp_path / "a", parts, fan_in_fan_out=True)
    result = merge(passed("base+a"), tmp_path)
    assert torch.equal(result[f"{module}.weight"], weight + change(parts, module).float().T)


@pytest.mark.parametrize("flag", [True, False])
@pytest.mark.parametrize(("model_type", "turned"), [("gpt2", True), ("llama", False)])
def test_a_square_weight_lies_as_its_module_has_it_whatever_the_flag(
    tmp_path, flag, model_type, turned
):
    module, other = "transformer.h.0.attn.c_proj", "transformer.h.0.mlp.other"
    weight = numbers(HIDDEN, HIDDEN)
    tensors = {f"{module}.weight": weight, f"{other}.weight": numbers(5, HIDDEN)}
    write(tmp_path / "base", tensors, {"model_type": model_type})
    parts = factors(module, HIDDEN, HIDDEN)
    adapter(tmp_path / "a", parts | factors(other, 5, HIDDEN), fan_in_fan_out=flag)
    wanted = change(parts, module).float()
    result = merge(passed("base+a"), tmp_path)
    assert torch.equal(result[f"{module}.weight"], weight + (wanted.T if turned else wanted))


def test_an_embedding_takes_the_transpose(models):
    a, b = numbers(2, TOKENS), numbers(HIDDEN, 2, start=4)
    module = "model.embed_tokens"
    tensors = {f"{module}.lora_embedding_A": a, f"{module}.lora_embedding_B": b}
    adapter(models / "e", tensors)
    result = merge(passed("base+e"), models)
    assert torch.equal(result[EMBEDDING], before(models)[EMBEDDING] + 2 * (b @ a).T)


@pytest.mark.parametrize("kernel", [(2, 3), (1, 1), (3,)])
def test_a_convolution_takes_the_product_of_flattened_factors(tmp_path, kernel):
    weight = numbers(4, 2, *kernel)
    write(tmp_path / "base", {"conv.weight": weight, "x.weight": numbers(2)}, {"model_type": "n"})
    a, b = numbers(2, 2, *kernel), numbers(4, 2, *(1 for _ in kernel))
    adapter(tmp_path / "a", {"conv.lora_A.weight": a, "conv.lora_B.weight": b})
    result = merge(passed("base+a"), tmp_path)
    wanted = 2 * (b.flatten(1) @ a.flatten(1)).reshape(weight.shape)
    assert torch.equal(result["conv.weight"], weight + wanted)


def test_a_bias_changes_by_the_scale_times_that_of_b(tmp_path):
    bias = {f"{Q.format(0)}.bias": numbers(HIDDEN, start=2)}
    base(tmp_path / "base", tensors=bias)
    more = {f"{Q.format(0)}.lora_B.bias": torch.tensor([1.0, -2.0, 3.0])}
    adapter(tmp_path / "a", ON_Q | more, lora_bias=True)
    result = merge(passed(weighed("base", a=0.5)), tmp_path)
    name = f"{Q.format(0)}.bias"
    assert torch.equal(result[name], bias[name] + torch.tensor([1.0, -2.0, 3.0]))


def test_lengths_of_dora_are_those_of_its_own_sum(tmp_path):
    base(tmp_path / "base", dtype=torch.float64)
    lengths = torch.tensor([1.0, 2.0, 4.0])
    adapter(tmp_path / "a", ON_Q | dora(Q.format(0), lengths), use_dora=True)
    adapter(tmp_path / "c", factors(Q.format(0), HIDDEN, HIDDEN, start=6))
    weight = before(tmp_path)[f"{Q.format(0)}.weight"]
    whole = weight + change(ON_Q, Q.format(0))
    normed = lengths[:, None] * whole / whole.norm(dim=1, keepdim=True)
    plain = change(factors(Q.format(0), HIDDEN, HIDDEN, start=6), Q.format(0))
    for recipe, wanted in (
        (passed("base+a"), normed),
        (passed(weighed("base", a=0.25)), weight + 0.25 * (normed - weight)),
        (passed("base+a+c"), normed + plain),
        (passed("base+c+a"), normed + plain),
    ):
        result = merge(recipe, tmp_path)[f"{Q.format(0)}.weight"]
        assert torch.allclose(result, wanted, rtol=0, atol=1e-13)


# tensors that an adapter holds whole --------------------------------------------------------------


def test_a_tensor_that_is_held_whole_is_copied_and_the_bases_is_dropped(models):
    adapter(models / "s", ON_Q | SAVED, modules_to_save=["norm"])
    made = plan(passed("base+s"), models)
    assert merge(passed("base+s"), models)[NORM].tolist() == [7, 8, 9]
    assert fates(made, "input-1")[NORM] == ("dropped", "input-2:s holds it whole")
    assert fates(made, "input-2")[PREFIX + NORM] == ("copied", "")
    step = next(step for step in made.steps if step.outputs[0].key == NORM)
    assert step.action == "copy"


def test_a_tensor_that_is_held_whole_takes_the_dtype_of_the_base(tmp_path):
    base(tmp_path / "base", dtype=torch.bfloat16)
    adapter(tmp_path / "s", ON_Q | SAVED, modules_to_save=["norm"])
    recipe = f"base_model: base\ntensors: [{{match: '{NORM}', copy: base+s}}]\n"
    for text in (passed("base+s"), recipe):
        result = merge(text, tmp_path)[NORM]
        assert result.dtype == torch.bfloat16
        assert result.tolist() == [7, 8, 9]
    assert fates(plan(passed("base+s"), tmp_path), "input-2")[PREFIX + NORM] == ("merged", "")


def test_the_weight_of_what_is_held_whole_is_that_of_the_difference(models):
    adapter(models / "s", ON_Q | SAVED, modules_to_save=["norm"])
    norm = before(models)[NORM]
    result = merge(passed(weighed("base", s=0.5)), models)[NORM]
    assert torch.equal(result, norm + 0.5 * (SAVED[NORM] - norm))
    assert fates(plan(passed(weighed("base", s=0.5)), models), "input-1")[NORM][0] == "merged"


def test_rows_of_tokens_take_the_place_of_the_bases(models):
    first, at = rows("model.embed_tokens", [2, 0], 1)
    adapter(models / "t", ON_Q | first, **at)
    second, at = rows("model.embed_tokens", [1], 4)
    adapter(models / "u", ON_UP | second, **at)
    (one,), (other,) = first.values(), second.values()
    own = before(models)[EMBEDDING]
    result = merge(passed("base+t"), models)[EMBEDDING]
    assert torch.equal(result, torch.stack([one[1], own[1], one[0], own[3]]))
    result = merge(passed("base+t+u"), models)[EMBEDDING]
    assert torch.equal(result, torch.stack([one[1], other[0], one[0], own[3]]))
    half = merge(passed(weighed("base", t=0.5)), models)[EMBEDDING]
    assert torch.equal(half[2], own[2] + 0.5 * (one[0] - own[2]))
    assert torch.equal(half[1], own[1])


def test_what_two_adapters_hold_whole_has_no_sum(models):
    for name in ("s", "z"):
        adapter(models / name, ON_Q | SAVED, modules_to_save=["norm"])
    with pytest.raises(MismatchError, match=r"input-3:z: holds model.norm.weight whole") as caught:
        plan(passed("base+s+z"), models)
    assert "input-2:s" in caught.value.problem
    held, at = rows("model.embed_tokens", [2, 0], 1)
    adapter(models / "t", ON_Q | held, **at)
    adapter(models / "u", ON_UP | held, **at)
    with pytest.raises(MismatchError, match=r"holds model.embed_tokens.weight whole"):
        plan(passed("base+t+u"), models)


def test_a_vocabulary_of_another_size_is_refused_with_both_shapes(models):
    larger = {EMBEDDING: numbers(TOKENS + 2, HIDDEN), HEAD: numbers(TOKENS + 2, HIDDEN)}
    saved = ["embed_tokens", "lm_head"]
    adapter(models / "v", ON_Q | larger, modules_to_save=saved)
    with pytest.raises(MismatchError, match=r"in 2 tensors") as caught:
        plan(passed("base+v"), models)
    said = f"{EMBEDDING}: the adapter has F32 [6, 3], the base has F32 [4, 3]"
    assert said in caught.value.problem
    assert "to 6 rows first, as resize_token_embeddings(6)" in caught.value.hint


def test_a_saved_head_of_other_classes_is_no_matter_of_the_vocabulary(models):
    path = models / "base/model.safetensors"
    save_file({**load_file(path), "score.weight": numbers(2, HIDDEN)}, path)
    adapter(models / "c", ON_Q | {"score.weight": numbers(3, HIDDEN)}, modules_to_save=["score"])
    with pytest.raises(MismatchError, match=r"score.weight: the adapter has F32") as caught:
        plan(passed("base+c"), models)
    assert "rows" not in caught.value.hint


# experts ------------------------------------------------------------------------------------------

EXPERTS = "model.layers.0.mlp.experts"


def on_experts(name: str, out: int, into: int, count: int = 3, rank: int = 2):
    """Return the factors of fused experts, and each expert's product."""
    a, b = numbers(rank * count, into), numbers(out, rank * count, start=5)
    tensors = {f"{EXPERTS}.lora_A.weight": a, f"{EXPERTS}.lora_B.weight": b}
    products = [b[:, e::count] @ a[e * rank : (e + 1) * rank] for e in range(count)]
    settings = {"target_parameters": [f"mlp.experts.{name}"], "target_modules": None}
    return tensors, settings, 2 * torch.stack(products)


@pytest.mark.parametrize(("shape", "turned"), [((3, 4, 6), False), ((3, 6, 4), True)])
def test_fused_experts_take_a_product_each(tmp_path, shape, turned):
    weight = {f"{EXPERTS}.gate_up_proj": numbers(*shape)}
    base(tmp_path / "base", tensors=weight)
    tensors, settings, wanted = on_experts("gate_up_proj", 4, 6)
    adapter(tmp_path / "a", tensors, **settings)
    result = merge(passed("base+a"), tmp_path)[f"{EXPERTS}.gate_up_proj"]
    wanted = wanted.mT if turned else wanted
    assert torch.equal(result, weight[f"{EXPERTS}.gate_up_proj"] + wanted)


@pytest.mark.parametrize(("up", "turned"), [((3, 8, 4), False), ((3, 4, 8), True)])
def test_square_experts_lie_as_their_siblings_do(tmp_path, up, turned):
    weight = {f"{EXPERTS}.gate_up_proj": numbers(*up), f"{EXPERTS}.down_proj": numbers(3, 4, 4)}
    base(tmp_path / "base", tensors=weight)
    tensors, settings, wanted = on_experts("down_proj", 4, 4)
    adapter(tmp_path / "a", tensors, **settings)
    result = merge(passed("base+a"), tmp_path)[f"{EXPERTS}.down_proj"]
    wanted = wanted.mT if turned else wanted
    assert torch.equal(result, weight[f"{EXPERTS}.down_proj"] + wanted)


def test_square_experts_without_siblings_are_refused(tmp_path):
    base(tmp_path / "base", tensors={f"{EXPERTS}.down_proj": numbers(3, 4, 4)})
    tensors, settings, _ = on_experts("down_proj", 4, 4)
    adapter(tmp_path / "a", tensors, **settings)
    with pytest.raises(MismatchError, match="nothing tells its inputs from its outputs"):
        plan(passed("base+a"), tmp_path)


def test_experts_that_are_stored_apart_take_their_rows_of_the_product(tmp_path):
    apart = {
        f"{EXPERTS}.{e}.{part}.weight": numbers(2, 6, start=e)
        for e in range(3)
        for part in ("gate_proj", "up_proj")
    }
    base(tmp_path / "base", tensors=apart)
    tensors, settings, wanted = on_experts("gate_up_proj", 4, 6)
    adapter(tmp_path / "a", tensors, **settings)
    result = merge(passed("base+a"), tmp_path)
    for e in range(3):
        for part, change_of in zip(("gate_proj", "up_proj"), wanted[e].split(2), strict=True):
            name = f"{EXPERTS}.{e}.{part}.weight"
            assert torch.equal(result[name], apart[name] + change_of)


def test_a_parameter_that_is_no_experts_is_a_matrix(tmp_path):
    weight = {"model.layers.0.mlp.table": numbers(4, 6)}
    base(tmp_path / "base", tensors=weight)
    parts = factors("model.layers.0.mlp", 4, 6)
    more = {"target_parameters": ["mlp.table"], "target_modules": []}
    adapter(tmp_path / "a", parts, **more)
    result = merge(passed("base+a"), tmp_path)["model.layers.0.mlp.table"]
    wanted = change(parts, "model.layers.0.mlp").float()
    assert torch.equal(result, weight["model.layers.0.mlp.table"] + wanted)


def test_experts_of_another_number_are_refused_with_both_shapes(tmp_path):
    base(tmp_path / "base", tensors={f"{EXPERTS}.down_proj": numbers(2, 4, 6)})
    tensors, settings, _ = on_experts("down_proj", 4, 6)
    adapter(tmp_path / "a", tensors, **settings)
    with pytest.raises(MismatchError, match=r"a weight of \[3, 4, 6\], .*down_proj is \[2, 4, 6\]"):
        plan(passed("base+a"), tmp_path)


# components and other styles ----------------------------------------------------------------------


def pipeline(folder: Path) -> dict[str, torch.Tensor]:
    """Write a pipeline of two components, and return their tensors."""
    found = {}
    for component, stem, name in (
        ("unet", "diffusion_pytorch_model", "down_blocks.0.proj_in.weight"),
        ("text_encoder", "model", "text_model.encoder.layers.0.q_proj.weight"),
    ):
        (folder / component).mkdir(parents=True)
        tensors = {name: numbers(5, HIDDEN), "norm.weight": numbers(HIDDEN)}
        save_file(tensors, folder / component / f"{stem}.safetensors")
        (folder / component / "config.json").write_text("{}")
        found |= {f"{component}/{key}": tensor for key, tensor in tensors.items()}
    (folder / "model_index.json").write_text("{}")
    return found


A, B = numbers(2, HIDDEN), numbers(5, 2, start=4)
MODULES = {
    "kohya": ("lora_unet_down_blocks_0_proj_in", "lora_te_text_model_encoder_layers_0_q_proj"),
    "diffusers": ("unet.down_blocks.0.proj_in", "text_encoder.text_model.encoder.layers.0.q_proj"),
}
PARTS = {
    "kohya": {"lora_down.weight": A, "lora_up.weight": B, "alpha": torch.tensor(4.0)},
    "diffusers": {"lora_A.weight": A, "lora_B.weight": 2 * B},
}
STYLES = {
    style: {f"{module}.{part}": tensor.clone() for part, tensor in PARTS[style].items()}
    | {f"{other}.{part}": tensor.clone() for part, tensor in PARTS[style].items()}
    for style, (module, other) in MODULES.items()
}


@pytest.mark.parametrize("style", STYLES)
def test_single_files_change_the_components_of_a_pipeline(tmp_path, style):
    original = pipeline(tmp_path / "base")
    save_file(STYLES[style], tmp_path / "a.safetensors")
    result = merge(passed("base+a.safetensors"), tmp_path)
    changed = {name for name in original if "norm" not in name}
    assert changed_by(result, original) == changed
    for name in changed:
        assert torch.equal(result[name], original[name] + 2 * B @ A)
    made = plan(passed("base+a.safetensors"), tmp_path)
    assert set(fates(made, "input-2")) == set(STYLES[style])
    assert {what for what, _ in fates(made, "input-2").values()} == {"merged"}


# notes --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("folder", "made_for", "noted"),
    [
        ("Llama-3-8B", "meta-llama/Llama-3-8B", False),
        ("Llama-3-8B", "/data/models/llama-3-8b/", False),
        ("Llama-3-8B", "C:\\models\\Llama-3-8B", False),
        ("meta-llama_Llama-3-8B", "meta-llama/Llama-3-8B", False),
        ("models--meta-llama--Llama-3-8B/snapshots/0123456789abcdef0123", "x/Llama-3-8B", False),
        ("Llama-3-8B", "/root/.cache/models--x--Llama-3-8B/snapshots/0123456789abcdef", False),
        ("Llama-3-8B", "", False),
        ("Llama-3-8B", "output/checkpoint-500", False),
        ("base", "meta-llama/Llama-3-8B", False),
        ("Llama-3-8B", "mistralai/Mistral-7B", True),
        ("models--x--Llama-3-8B/snapshots/0123456789abcdef", "mistralai/Mistral-7B", True),
    ],
)
def test_an_adapter_of_another_base_is_noted_where_names_tell(tmp_path, folder, made_for, noted):
    base(tmp_path / folder)
    adapter(tmp_path / "a", ON_Q, base_model_name_or_path=made_for)
    notes = plan(passed(f"{folder}+a"), tmp_path).notes
    assert any("was made for" in note for note in notes) is noted
