"""Adapters of one model that name its modules with other words in front, or store them turned."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

import merge_kit as mk
from merge_kit import MergeKitError, merge, plan
from merge_kit.io.adapter import open_adapter
from merge_kit.plan.adapters.heads import verdict
from tests.plan.adapters_by_hand import adapter, factors

ATTENTION, DOWN = "self_attn.q_proj", "mlp.down_proj"
SHAPES = {ATTENTION: (6, 5), DOWN: (5, 7)}
NEW, OLD = "model.language_model.layers", "language_model.model.layers"


def on(head, *suffixes, start=1, layers=2):
    """Return the factors of an adapter that changes these modules of a stack."""
    found = {}
    for i in range(layers):
        for suffix in suffixes or (ATTENTION,):
            found |= factors(f"{head}.{i}.{suffix}", *SHAPES[suffix], start=start + i)
    return found


def changes(path):
    """Return scale * b @ a by module."""
    found = open_adapter(path)
    held = {}
    for file in found.checkpoint.components[0].files:
        held |= load_file(file.path)
    return {
        one.module: one.scale * held[one.b.spec.name] @ held[one.a.spec.name]
        for one in found.updates
    }


def recipe(*folders, method="lora_concat", **parameters):
    models = [{"model": str(folder)} for folder in folders]
    return {"merge_method": method, "models": models, "parameters": parameters}


def problem_of(*folders):
    with pytest.raises(MergeKitError) as caught:
        plan(recipe(*folders))
    return caught.value


def kohya(path, *modules, start=1):
    held = {}
    for module in modules:
        a, b = factors(module, 6, 5, start=start).values()
        held[f"{module}.lora_down.weight"], held[f"{module}.lora_up.weight"] = a, b
        held[f"{module}.alpha"] = torch.tensor(4.0)
    save_file(held, path)
    return path


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (NEW, OLD),
        ("model.layers", NEW),
        ("model.layers", OLD),
        ("model.layers", "layers"),
        ("transformer.h", "h"),
        ("bert.encoder.layer", "encoder.layer"),
        (
            "vision_tower.vision_model.encoder.layers",
            "model.vision_tower.vision_model.encoder.layers",
        ),
        ("model.visual.blocks", "visual.blocks"),
    ],
)
@pytest.mark.parametrize("suffix", [ATTENTION, DOWN])
def test_one_stack_by_two_names_is_one_whatever_modules_are_changed(tmp_path, one, other, suffix):
    first = adapter(tmp_path / "first", on(one, ATTENTION))
    second = adapter(tmp_path / "second", on(other, suffix, start=4))
    for two, head, its in (((first, second), one, other), ((second, first), other, one)):
        out = tmp_path / f"out-{two[0].name}"
        done = merge(recipe(*two), out, threads=1)
        assert "taken for the same" in done.plan.notes[0]
        found = changes(out)
        kept, renamed = changes(two[0]), changes(two[1])
        for module, change in renamed.items():
            name = module.replace(its, head, 1)
            assert torch.equal(found.pop(name), change + kept.pop(name, torch.tensor(0.0)))
        assert found.keys() == kept.keys()


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("model.layers", "model.visual.layers"),
        ("model.layers", "vision_tower.encoder.layers"),
        ("layers", "audio_tower.layers"),
        ("text_model.encoder.layers", "vision_model.encoder.layers"),
        ("model.encoder.layers", "model.decoder.layers"),
        ("encoder.block", "decoder.block"),
        ("text_encoder.layers", "text_decoder.layers"),
        ("unet.down_blocks", "unet.up_blocks"),
        ("unet.down_blocks", "controlnet.down_blocks"),
        ("transformer.blocks", "transformer_2.blocks"),
        ("text_encoder.encoder.layers", "text_encoder_2.encoder.layers"),
        ("transformer_blocks", "single_transformer_blocks"),
        ("model.layers", "mtp.layers"),
        ("model.layers", "model.perceiver.layers"),
    ],
)
def test_stacks_that_a_model_has_beside_one_another_stay_two(tmp_path, one, other):
    for i, two in enumerate(((one, other), (other, one))):
        folders = [adapter(tmp_path / f"{i}{j}", on(head)) for j, head in enumerate(two)]
        made = plan(recipe(*folders))
        assert made.notes == ()
        assert {rank.key.split(".0.")[0].split(".1.")[0] for rank in made.ranks} == {one, other}


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("transformer.layers", "model.layers"),
        ("left.blocks", "right.blocks"),
        ("model.layers", "model.inner.layers"),
        ("text_encoder_2.encoder.layers", "encoder.layers"),
        ("down_blocks", "input_blocks"),
    ],
)
@pytest.mark.parametrize("suffix", [ATTENTION, DOWN])
def test_what_names_do_not_tell_is_refused_with_a_module_of_each(tmp_path, one, other, suffix):
    first = adapter(tmp_path / "first", on(one, ATTENTION))
    second = adapter(tmp_path / "second", on(other, suffix))
    problem = problem_of(first, second)
    for part in ("input-1:first", f"{one}.0.{ATTENTION}", "input-2:second", f"{other}.0.{suffix}"):
        assert part in str(problem)
    assert "base+one+two" in (problem.hint or "")
    with pytest.raises(MergeKitError, match="do not tell"):
        mk.compare_adapters([first, second])


def test_an_adapter_that_has_both_stacks_shows_that_they_are_two(tmp_path):
    left, right = (adapter(tmp_path / s, on(f"{s}.blocks")) for s in ("left", "right"))
    both = adapter(tmp_path / "both", on("left.blocks") | on("right.blocks"))
    assert len(plan(recipe(left, right, both)).ranks) == 4


def test_two_stacks_of_one_adapter_are_not_both_taken_for_one(tmp_path):
    bare = adapter(tmp_path / "bare", on("layers"))
    both = adapter(tmp_path / "both", on("one.layers") | on("two.layers"))
    for order in ((bare, both), (both, bare)):
        assert "do not tell" in str(problem_of(*order))


def test_each_tower_follows_its_own_change_of_prefix(tmp_path):
    old = on("model.layers") | on("visual.layers") | factors("model.embed_x", 6, 5)
    new = on(NEW, DOWN) | on("model.visual.layers", DOWN) | factors("model.visual.merger", 6, 5)
    one, other = adapter(tmp_path / "old", old), adapter(tmp_path / "new", new)
    found = {rank.key for rank in plan(recipe(one, other)).ranks}
    assert f"model.layers.1.{DOWN}" in found
    assert f"visual.layers.1.{DOWN}" in found
    assert "visual.merger" in found
    assert not any(name.startswith(("model.language_model", "model.visual")) for name in found)
    back = {rank.key for rank in plan(recipe(other, one)).ranks}
    assert "model.language_model.embed_x" in back


def test_what_is_held_whole_and_a_head_follow_the_stack(tmp_path):
    whole = {"model.norm.weight": torch.ones(5), "lm_head.weight": torch.ones(6, 5)}
    held = {"modules_to_save": ["norm", "lm_head"]}
    bare = adapter(tmp_path / "bare", on("layers"))
    full = adapter(tmp_path / "full", on("model.layers") | whole, **held)
    merge(recipe(bare, full), tmp_path / "out", threads=1)
    names = load_file(tmp_path / "out" / "adapter_model.safetensors").keys()
    assert {"base_model.model.norm.weight", "base_model.model.lm_head.weight"} <= names


def test_modules_outside_layers_are_found_by_their_ends(tmp_path):
    one = adapter(tmp_path / "one", on(NEW) | factors("lm_head", 6, 5))
    other = adapter(tmp_path / "other", factors("language_model.lm_head", 6, 5))
    made = plan(recipe(one, other))
    assert {rank.key: rank.rank for rank in made.ranks}["lm_head"] == 4
    assert "'language_model.lm_head'" in made.notes[0]


def test_comparing_finds_an_adapter_under_another_prefix_alike(tmp_path):
    one, other = adapter(tmp_path / "one", on(NEW)), adapter(tmp_path / "other", on(OLD))
    found = mk.compare_adapters([one, other])
    assert found.pair().cosine == pytest.approx(1.0)
    assert [row.name for row in found.modules] == [f"{NEW}.{i}.{ATTENTION}" for i in range(2)]


# kohya -------------------------------------------------------------------------------------------

TEXT = "text_model_encoder_layers_{}_mlp_fc1"


@pytest.mark.parametrize("leads", [("lora_te_", "lora_te1_"), ("lora_unet_", "lora_transformer_")])
@pytest.mark.parametrize("layer", [0, 1])
def test_kohyas_prefixes_of_one_component_are_one(tmp_path, leads, layer):
    for i, (first, second) in enumerate((leads, leads[::-1])):
        name = f"{second}{TEXT.format(layer)}"
        one = kohya(tmp_path / f"{i}-1.safetensors", f"{first}{TEXT.format(0)}")
        two = kohya(tmp_path / f"{i}-2.safetensors", name, start=3)
        done = merge(recipe(one, two), tmp_path / f"out{i}", threads=1)
        found = changes(tmp_path / f"out{i}")
        assert all(module.startswith(first) for module in found)
        assert len(found) == 1 + layer
        assert f"'{second}' in front" in done.plan.notes[0]
        wanted = changes(two)[name] + (0 if layer else next(iter(changes(one).values())))
        assert torch.equal(found[f"{first}{TEXT.format(layer)}"], wanted)


def test_two_text_encoders_of_kohya_stay_two(tmp_path):
    one = kohya(tmp_path / "1.safetensors", f"lora_te1_{TEXT.format(0)}")
    two = kohya(tmp_path / "2.safetensors", f"lora_te2_{TEXT.format(0)}")
    assert len(plan(recipe(one, two)).ranks) == 2
    alone = kohya(tmp_path / "alone.safetensors", f"lora_te_{TEXT.format(0)}")
    assert "do not tell" in str(problem_of(two, alone))
    assert "do not tell" in str(problem_of(alone, two))
    assert len(plan(recipe(one, two, alone)).ranks) == 2


def test_blocks_that_two_programs_name_are_not_taken_for_different_ones(tmp_path):
    one = kohya(tmp_path / "1.safetensors", "lora_unet_input_blocks_4_1_transformer_blocks_0_to_q")
    two = kohya(tmp_path / "2.safetensors", "lora_unet_down_blocks_1_attentions_0_proj_in")
    up = kohya(tmp_path / "3.safetensors", "lora_unet_up_blocks_1_attentions_0_proj_in")
    assert "lora_unet_input_blocks_4_1" in str(problem_of(one, two))
    assert len(plan(recipe(two, up)).ranks) == 2


def test_the_verdict_does_not_depend_on_the_order():
    heads = [NEW, OLD, "layers", "left.layers", "encoder.layers", "visual.layers", "unet.layers"]
    for one in heads:
        for other in heads:
            assert verdict(one, other) == verdict(other, one)


# fan_in_fan_out ----------------------------------------------------------------------------------

C_ATTN = "transformer.h.0.attn.c_attn"


@pytest.mark.parametrize("flags", [(True, False), (False, True)])
@pytest.mark.parametrize(
    ("method", "parameters"),
    [("lora_concat", {}), ("lora_linear", {}), ("lora_ties", {"density": 1.0, "normalize": False})],
)
def test_how_a_weight_is_stored_does_not_keep_changes_apart(tmp_path, flags, method, parameters):
    held = factors(C_ATTN, 9, 3), factors(C_ATTN, 9, 3, start=3)
    folders = [
        adapter(tmp_path / f"{i}", tensors, fan_in_fan_out=flag)
        for i, (tensors, flag) in enumerate(zip(held, flags, strict=True))
    ]
    out = tmp_path / "out"
    merge(recipe(*folders, method=method, **parameters), out, threads=1)
    one, two = (changes(folder)[C_ATTN] for folder in folders)
    wanted = one + two
    if method == "lora_ties":  # where the signs differ, the larger stays, or none of two equal ones
        against = one * two < 0
        larger = torch.where(one.abs() > two.abs(), one, two)
        wanted = torch.where(against, larger, wanted)
        tied = against & (one == -two)
        wanted = torch.where(tied, changes(out)[C_ATTN], wanted)
        assert not tied.all()
    assert torch.allclose(changes(out)[C_ATTN], wanted, atol=1e-4)
    assert mk.compare_adapters(folders).pair().shared == 1
    assert json.loads((out / "adapter_config.json").read_text())["fan_in_fan_out"] is flags[0]


def test_an_adapter_that_counts_alone_has_one_naming_in_factors_and_config(tmp_path):
    named = {
        "target_modules": [f"{OLD}.0.{ATTENTION}"],
        "rank_pattern": {f"^{OLD}.0.{ATTENTION}": 1},
        "r": 2,
    }
    one = adapter(tmp_path / "one", on(NEW))
    alone = factors(f"{OLD}.0.{ATTENTION}", 6, 5, rank=1)
    other = adapter(tmp_path / "other", alone, **named)
    models = [
        {"model": str(folder), "parameters": {"weight": weight}}
        for folder, weight in ((one, 0.0), (other, 1.0))
    ]
    merge({"merge_method": "lora_concat", "models": models}, tmp_path / "out", threads=1)
    text = (tmp_path / "out" / "adapter_config.json").read_text()
    assert OLD not in text
    (wanted,), found = changes(other).values(), changes(tmp_path / "out")
    assert torch.equal(found[f"{NEW}.0.{ATTENTION}"], wanted)


@pytest.mark.parametrize(
    ("one", "other", "more", "name"),
    [
        ("model.encoder.layers", "encoder.layers", "decoder.layers", "model.decoder.layers"),
        ("encoder.layers", "model.encoder.layers", "model.decoder.layers", "decoder.layers"),
        ("unet.down_blocks", "down_blocks", "up_blocks", "unet.up_blocks"),
        ("unet.down_blocks", "down_blocks", "text_model.layers", "text_model.layers"),
        ("model.visual.blocks", "visual.blocks", "visual.merger.mlp", "model.visual.merger.mlp"),
        ("visual.blocks", "model.visual.blocks", "model.visual.merger.mlp", "visual.merger.mlp"),
        (OLD, NEW, "model.vision_tower.layers", "vision_tower.layers"),
        (NEW, OLD, "vision_tower.layers", "model.vision_tower.layers"),
        (NEW, "model.layers", "visual.blocks", "model.visual.blocks"),
        ("model.layers", NEW, "model.visual.blocks", "visual.blocks"),
        (NEW, OLD, "model.vision_tower.layers", "model.vision_tower.layers"),
        ("model.layers", "layers", "mtp.layers", "mtp.layers"),
        ("model.layers", "layers", "visual.blocks", "visual.blocks"),
    ],
)
def test_a_stack_that_one_adapter_has_alone_is_named_as_its_others_are(
    tmp_path, one, other, more, name
):
    first = adapter(tmp_path / "first", on(one))
    second = adapter(tmp_path / "second", on(other, start=4) | on(more, start=9))
    merge(recipe(first, second), tmp_path / "out", threads=1)
    found, own = changes(tmp_path / "out"), changes(second)
    assert {module.rpartition(f".{ATTENTION}")[0][:-2] for module in found} == {one, name}
    for i in range(2):
        alone = found[f"{name}.{i}.{ATTENTION}"]
        assert torch.equal(alone, own[f"{more}.{i}.{ATTENTION}"])


@pytest.mark.parametrize(
    ("one", "other", "module", "name"),
    [
        (OLD, NEW, "model.multi_modal_projector.linear", "multi_modal_projector.linear"),
        (NEW, OLD, "multi_modal_projector.linear", "model.multi_modal_projector.linear"),
    ],
)
def test_a_projector_is_named_as_the_text_part_is(tmp_path, one, other, module, name):
    first = adapter(tmp_path / "first", on(one))
    second = adapter(tmp_path / "second", on(other, start=4) | factors(module, 6, 5))
    merge(recipe(first, second), tmp_path / "out", threads=1)
    assert {m for m in changes(tmp_path / "out") if "projector" in m} == {name}


def table(module):
    """Return the factors of an embedding of 4 tokens."""
    a, b = factors("x", 5, 4).values()
    return {f"{module}.lora_embedding_A": a, f"{module}.lora_embedding_B": b}


@pytest.mark.parametrize("lead", ["", "model."])
@pytest.mark.parametrize("layers_first", [True, False])
@pytest.mark.parametrize("both", [False, True])
def test_layers_and_an_embedding_of_two_adapters_lie_in_one_model(
    tmp_path, lead, layers_first, both
):
    other = "" if lead else "model."
    own = on(f"{lead}layers") | (table(f"{lead}embed_tokens") if both else {})
    adapter(tmp_path / "layers", own)
    adapter(tmp_path / "table", table(f"{other}embed_tokens"))
    order = [tmp_path / "layers", tmp_path / "table"]
    merge(recipe(*order[:: 1 if layers_first else -1]), tmp_path / "out")
    name = lead if layers_first else other
    expected = {f"{name}layers.{i}.{ATTENTION}" for i in range(2)} | {f"{name}embed_tokens"}
    assert set(changes(tmp_path / "out")) == expected


def test_an_embedding_of_a_tower_stays_where_it_is(tmp_path):
    adapter(tmp_path / "one", on("vision_tower.encoder.layers"))
    adapter(tmp_path / "two", table("language_model.embed_tokens"))
    merge(recipe(tmp_path / "one", tmp_path / "two"), tmp_path / "out")
    assert "language_model.embed_tokens" in changes(tmp_path / "out")
    assert f"vision_tower.encoder.layers.0.{ATTENTION}" in changes(tmp_path / "out")
