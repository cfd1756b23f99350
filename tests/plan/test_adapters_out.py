"""Adapters made of adapters, from recipe to folder, on factors written by hand."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from merge_kit import InterruptedRun, MergeKitError, merge, plan
from merge_kit.api import merging
from merge_kit.io.adapter import open_adapter
from merge_kit.plan.describe_adapters import adapter_lines, ranks_line
from merge_kit.plan.describe_steps import rule_lines
from merge_kit.plan.values import ModuleRank
from merge_kit.publish.verify import verify

PREFIX = "base_model.model."
Q, UP = "model.layers.0.attn.q_proj", "model.layers.0.mlp.up_proj"
SHAPES = {Q: (6, 5), UP: (9, 5), "model.layers.9.q_proj": (6, 5)}
FILE = "adapter_model.safetensors"


def random(*shape, seed):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def adapter(folder, ranks, *, seed=0, more=None, **config):
    """Write an adapter of peft's with random factors of these ranks, by module."""
    held = dict(more or {})
    for i, (module, rank) in enumerate(ranks.items()):
        rows, columns = SHAPES.get(module) or SHAPES[f"model.{module}"]
        held[f"{PREFIX}{module}.lora_A.weight"] = random(rank, columns, seed=seed + 2 * i)
        held[f"{PREFIX}{module}.lora_B.weight"] = random(rows, rank, seed=seed + 2 * i + 1)
    folder.mkdir()
    save_file(held, folder / FILE)
    leaves = sorted({module.rpartition(".")[2] for module in ranks})
    settings = {"peft_type": "LORA", "base_model_name_or_path": "org/base", "bias": "none"}
    settings |= {"r": 2, "lora_alpha": 4, "target_modules": leaves, "use_rslora": False}
    settings["rank_pattern"] = {f"^{m}": r for m, r in ranks.items() if r != 2}
    (folder / "adapter_config.json").write_text(json.dumps(settings | config))
    return folder


def changes(folder):
    """Return scale * b @ a by module, in float64, as the package reads it back."""
    found, held = {}, load_file(folder / FILE)
    for update in open_adapter(folder).updates:
        a, b = (held[t.spec.name].double() for t in (update.a, update.b))
        found[update.module] = update.scale * b @ a
    return found


def combine(method, folders, out, *, weights=None, parameters=None, **more):
    weights = weights or [1.0] * len(folders)
    models = [
        {"model": str(folder), "parameters": {"weight": weight}}
        for folder, weight in zip(folders, weights, strict=True)
    ]
    recipe = {"merge_method": method, "models": models, "parameters": parameters or {}}
    return merge({**recipe, **more}, out, threads=1)


@pytest.fixture
def two(tmp_path):
    one = adapter(tmp_path / "one", {Q: 2, UP: 3}, seed=10)
    return one, adapter(tmp_path / "two", {Q: 4}, seed=20, lora_alpha=3)


def test_factors_are_laid_side_by_side_and_scales_folded(tmp_path, two):
    done = combine("lora_concat", two, tmp_path / "out", weights=[0.5, -4.0])
    held, parts = load_file(tmp_path / "out" / FILE), [load_file(folder / FILE) for folder in two]
    a, b = (f"{PREFIX}{Q}.lora_{side}.weight" for side in "AB")
    # scales are 4 / 2 and 3 / 4, so that the terms count 1 and -3: the second is copied, negated
    assert torch.equal(held[a], torch.cat([parts[0][a], parts[1][a]]))
    assert torch.equal(held[b][:, 2:], -parts[1][b])
    assert torch.allclose(held[b][:, :2], parts[0][b] / 3, rtol=2.0**-23, atol=0)
    (q,) = [u for u in open_adapter(tmp_path / "out").updates if u.module == Q]
    assert (q.rank, q.scale, q.alpha) == (6, 3.0, 18.0)
    ranks = {one.key: one.rank for one in done.plan.ranks}
    assert ranks == {Q: 6, UP: 3}


def test_every_tensor_of_every_adapter_is_accounted_for(tmp_path, two):
    norm = {f"{PREFIX}model.norm.weight": random(5, seed=31)}
    saved = {"more": norm, "modules_to_save": ["norm"], "seed": 30}
    third = adapter(tmp_path / "three", {Q: 2, "model.layers.9.q_proj": 2}, **saved)
    done = combine("lora_concat", [*two, third], tmp_path / "out", weights=[1.0, 0.5, 0.0])
    fates = {(f.model, f.tensor): (f.what, f.why) for f in done.plan.fates}
    assert len(fates) == 4 + 2 + 5
    assert {fate for (model, _), fate in fates.items() if model == "input-3"} == {
        ("dropped", "its weight is 0")
    }
    q = f"{PREFIX}{Q}.lora_A.weight"
    assert fates["input-1", q] == ("merged", "")
    assert fates["input-1", f"{PREFIX}{UP}.lora_A.weight"] == ("copied", "")


def test_weights_that_cancel_leave_zeros(tmp_path, two):
    one = two[0]
    combine("lora_concat", [one, one, two[1]], tmp_path / "out", weights=[1.0, -1.0, 1.0])
    assert changes(tmp_path / "out").keys() == {Q}  # the other adapter alone
    combine("lora_concat", [one, one], tmp_path / "zero", weights=[0.25, -0.25])
    held = load_file(tmp_path / "zero" / FILE)
    for name, tensor in load_file(one / FILE).items():
        assert held[name].shape == tensor.shape
        assert torch.equal(held[name], tensor) if "lora_A" in name else not held[name].any()


def test_one_adapter_in_two_ways_of_writing_it_counts_once(tmp_path, two, monkeypatch):
    monkeypatch.chdir(tmp_path)
    combine("lora_concat", ["one", "./one"], tmp_path / "out", weights=[0.5, 0.5])
    assert (tmp_path / "out" / "adapter_config.json").read_bytes() == (
        two[0] / "adapter_config.json"
    ).read_bytes()


def test_adapters_with_and_without_the_models_prefix_are_taken_for_the_same(tmp_path, two):
    bare = Q.removeprefix("model.")
    other = adapter(tmp_path / "bare", {bare: 2}, seed=40)
    for order in ([two[0], other], [other, two[0]]):
        out = tmp_path / f"out-{order[0].name}"
        done = combine("lora_concat", order, out)
        assert any("taken for the same" in note for note in done.plan.notes)
        found = changes(out)
        name = Q if order[0] is two[0] else bare
        wanted = changes(two[0])[Q] + changes(other)[bare]
        assert len(found) == 2
        assert torch.allclose(found[name], wanted, atol=1e-6, rtol=0)


def test_names_are_those_that_peft_looks_for_whatever_a_file_has(tmp_path, two):
    held = {name.removeprefix(PREFIX): t for name, t in load_file(two[0] / FILE).items()}
    save_file(held, two[0] / FILE)
    combine("lora_concat", two, tmp_path / "out")
    assert load_file(tmp_path / "out" / FILE).keys() == {f"{PREFIX}{name}" for name in held}
    combine("lora_concat", two[:1], tmp_path / "same")
    assert load_file(tmp_path / "same" / FILE).keys() == held.keys()


def test_towers_of_one_model_are_not_mixed_up(tmp_path, two):
    SHAPES["vision.layers.0.attn.q_proj"] = SHAPES[Q]
    other = adapter(tmp_path / "vision", {"vision.layers.0.attn.q_proj": 2}, seed=50)
    combine("lora_concat", [two[0], other], tmp_path / "out")
    assert changes(tmp_path / "out").keys() == {Q, UP, "vision.layers.0.attn.q_proj"}


# fits --------------------------------------------------------------------------------------------


ENERGY = {"parameters": {"energy": 0.9}}


def test_a_plan_shows_bounds_and_the_record_values(tmp_path, two):
    models = [{"model": str(folder)} for folder in two]
    bounds = plan({"merge_method": "lora_svd", "models": models, **ENERGY})
    assert adapter_lines(bounds) == ["rank at most 5 for 1 module, at most 3 for 1"]
    assert len(bounds.fits) == 2
    done = combine("lora_svd", two, tmp_path / "out", **ENERGY)
    assert not done.plan.fits
    record = json.loads((tmp_path / "out/merge_kit.json").read_text())
    held = load_file(tmp_path / "out" / FILE)
    for module, rank in record["ranks"].items():
        assert len(held[f"{PREFIX}{module}.lora_A.weight"]) == rank
        assert 0 < record["residuals"][module]["relative"] < 0.1**0.5
    assert verify(tmp_path / "out").is_intact


def test_a_run_that_stops_while_it_looks_at_the_weights_goes_on(tmp_path, two):
    combine("lora_svd", two, tmp_path / "whole", **ENERGY)
    stop, seen = threading.Event(), []

    def halt(progress):
        seen.append(progress)
        stop.set()

    models = [{"model": str(folder), "parameters": {"weight": 1.0}} for folder in two]
    recipe = {"merge_method": "lora_svd", "models": models, **ENERGY}
    with pytest.raises(InterruptedRun):
        merge(recipe, tmp_path / "out", threads=1, stop=stop, on_progress=halt)
    journal = tmp_path / "out.partial" / ".merge_kit" / "fitted.jsonl"
    assert len(journal.read_text().splitlines()) == len(seen) == 1
    merge(recipe, tmp_path / "out", threads=1)
    for file in (FILE, "adapter_config.json", "merge_kit.json", "README.md"):
        assert (tmp_path / "out" / file).read_bytes() == (tmp_path / "whole" / file).read_bytes()


KILLED = """
import os, sys
from merge_kit import merge
calls = []
def die(progress):
    calls.append(progress)
    if len(calls) == int(sys.argv[3]):
        os.kill(os.getpid(), 9)
models = [{"model": f, "parameters": {"weight": 1.0}} for f in sys.argv[4:]]
recipe = {"merge_method": "lora_svd", "models": models, "parameters": {"energy": 0.9}}
merge(recipe, sys.argv[2], threads=1, on_progress=die)
"""


@pytest.mark.parametrize("call", [2, 4])
def test_a_run_that_is_killed_goes_on_to_the_same_bytes(tmp_path, two, call):
    combine("lora_svd", two, tmp_path / "whole", **ENERGY)
    words = [sys.executable, "-c", KILLED, "", str(tmp_path / "out"), str(call), *map(str, two)]
    words[3:4] = ["x"]
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    assert subprocess.run(words, env=env, check=False).returncode == -9
    assert (tmp_path / "out.partial").is_dir()
    combine("lora_svd", two, tmp_path / "out", **ENERGY)
    for file in (FILE, "adapter_config.json", "merge_kit.json"):
        assert (tmp_path / "out" / file).read_bytes() == (tmp_path / "whole" / file).read_bytes()


def test_a_module_that_is_not_changed_is_left_out_by_name(tmp_path, two):
    held = load_file(two[1] / FILE)
    b, name = load_file(two[0] / FILE), f"{PREFIX}{Q}.lora_{{}}.weight"
    held |= {name.format("A"): b[name.format("A")], name.format("B"): -b[name.format("B")]}
    save_file(held, two[1] / FILE)
    settings = json.loads((two[1] / "adapter_config.json").read_text())
    settings |= {"rank_pattern": {}, "lora_alpha": 4}
    (two[1] / "adapter_config.json").write_text(json.dumps(settings))
    done = combine("lora_linear", two, tmp_path / "out")
    assert changes(tmp_path / "out").keys() == {UP}
    why = {f.why for f in done.plan.fates if Q in f.tensor}
    assert why == {"not changed"}
    config = json.loads((tmp_path / "out/adapter_config.json").read_text())
    assert config["target_modules"] == [UP]  # by its whole name: q_proj has no factors


# several at once ---------------------------------------------------------------------------------


def test_uses_share_one_step_for_a_module(tmp_path, two):
    recipe = {"merge_method": "lora_svd", "models": [{"model": str(folder)} for folder in two]}
    recipe |= {"uses": {"a": [1, 0.5], "b": [-1, 2], "c": [1, 0]}, "parameters": {"rank": 4}}
    planned = plan(recipe)
    (shared,) = [step for step in planned.steps if step.shape == SHAPES[Q]]
    assert [target.key.partition("/")[0] for target in shared.outputs] == ["a", "a", "b", "b"]
    assert shared.weights == (1.0, 0.5, -1.0, 2.0)
    lines = [line for line in rule_lines(planned) if f"{Q}.lora_A" in line]
    assert "one * 1, input-2:two * 0.5" in lines[0]
    assert "one * -1, input-2:two * 2" in lines[1]
    merge(recipe, tmp_path / "out", threads=1)
    same = tmp_path / "out/c"
    assert load_file(same / FILE).keys() == load_file(two[0] / FILE).keys()
    assert (same / "adapter_config.json").read_text() == (
        two[0] / "adapter_config.json"
    ).read_text()
    assert verify(tmp_path / "out").is_intact


# refusals ----------------------------------------------------------------------------------------


def refused(recipe, *parts):
    with pytest.raises(MergeKitError) as caught:
        plan(recipe)
    message = str(caught.value)
    assert [part for part in parts if part not in message] == [], message
    assert caught.value.code() in (2, 3)


def listing(*folders, **more):
    return {"merge_method": "lora_concat", "models": [{"model": str(f)} for f in folders], **more}


def test_what_does_not_fit_is_refused_by_name(tmp_path, two):
    base = tmp_path / "base"
    base.mkdir()
    save_file({f"{Q}.weight": random(6, 5, seed=1)}, base / "model.safetensors")
    (base / "config.json").write_text('{"model_type": "x"}')
    refused(listing(two[0], base), "input-2:base is a model", "mergekit extract")
    refused(listing(*two, base_model=str(base)), "takes no base_model")
    tied = adapter(tmp_path / "tied", {UP: 2}, ensure_weight_tying=True)
    refused(listing(*two, tied), "ensure_weight_tying is None in input-1:one, True in input-3:tied")
    rule = {"match": "*", "merge_method": "lora_concat"}
    merging = {"merge_method": "linear", "models": [{"model": str(base)}], "base_model": str(base)}
    refused({**merging, "tensors": [rule]}, "lora_concat makes an adapter")
    stages = [
        {**listing(*two), "name": "sum"},
        {"merge_method": "linear", "models": [{"model": "sum"}, {"model": str(base)}]},
    ]
    refused(stages, "only the last document can")


def test_bases_are_told_apart_by_name(tmp_path, two):
    other = adapter(tmp_path / "other", {Q: 2}, base_model_name_or_path="org/BASE-v2")
    refused(listing(two[0], other), "org/base", "org/BASE-v2", "input-2:other")
    cached = "/x/hub/models--org--Base/snapshots/0123456789abcdef"
    for i, name in enumerate(("/models/Base", "C:\\models\\base", cached)):
        same = adapter(tmp_path / f"same{i}", {Q: 2}, base_model_name_or_path=name)
        assert plan(listing(two[0], same)).notes == ()
    silent = adapter(tmp_path / "silent", {Q: 2}, base_model_name_or_path=None)
    assert "does not say" in plan(listing(two[0], silent)).notes[0]


def test_shapes_of_one_module_are_both_named(tmp_path, two):
    SHAPES[Q] = (7, 5)
    try:
        other = adapter(tmp_path / "other", {Q: 2})
    finally:
        SHAPES[Q] = (6, 5)
    refused(listing(two[0], other), Q, "[6, 5]", "[7, 5]", "input-2:other")


# what is held whole ------------------------------------------------------------------------------

ROWS = f"{PREFIX}model.embed.token_adapter.trainable_tokens_delta"


def with_rows(folder, tokens, seed):
    rows = random(len(tokens), 5, seed=seed)
    return adapter(
        folder, {Q: 2}, more={ROWS: rows}, trainable_token_indices={"embed": tokens}, seed=seed
    ), rows


def test_rows_of_different_tokens_are_all_kept(tmp_path):
    (one, first), (two, second) = (
        with_rows(tmp_path / f"m{i}", tokens, 60 + i) for i, tokens in enumerate(([3, 1], [7]))
    )
    combine("lora_concat", [one, two], tmp_path / "out")
    assert torch.equal(load_file(tmp_path / "out" / FILE)[ROWS], torch.cat([first, second]))
    config = json.loads((tmp_path / "out/adapter_config.json").read_text())
    assert config["trainable_token_indices"] == {"model.embed": [3, 1, 7]}
    overlapping, _ = with_rows(tmp_path / "m2", [1, 9], 70)
    refused(listing(one, overlapping), "different rows of model.embed")


def test_an_adapter_without_factors_is_part_of_the_result(tmp_path, two):
    rows = {ROWS: random(1, 5, seed=97)}
    more = {"more": rows, "trainable_token_indices": {"embed": [4]}, "target_modules": ["q_proj"]}
    bare = adapter(tmp_path / "bare", {}, **more)
    for weights in ([1.0, 1.0], [0.0, 1.0]):
        out = tmp_path / f"out{weights[0]:g}"
        combine("lora_concat", [two[0], bare], out, weights=weights)
        assert torch.equal(load_file(out / FILE)[ROWS], rows[ROWS])
    assert (out / "adapter_config.json").read_text() == (bare / "adapter_config.json").read_text()


def test_what_one_holds_and_another_changes_is_refused_by_name(tmp_path):
    SHAPES["model.embed"] = (8, 5)
    one, _ = with_rows(tmp_path / "one", [3, 1], 90)
    other = adapter(tmp_path / "two", {"model.embed": 2})
    whole = {f"{PREFIX}model.embed.weight": random(8, 5, seed=91)}
    third = adapter(tmp_path / "three", {Q: 2}, more=whole, modules_to_save=["embed"])
    for second in (other, third):
        refused(listing(one, second), "model.embed.weight", "input-1:one holds it")
    refused(listing(third, other), "model.embed.weight", "input-1:three holds it")


def test_what_is_averaged_is_the_mean(tmp_path):
    made = [with_rows(tmp_path / f"m{i}", [3, 1], 80 + i) for i in range(2)]
    folders, rows = [folder for folder, _ in made], [rows for _, rows in made]
    for saved, wanted in (("mean", (rows[0] + rows[1]) / 2), ("first", rows[0])):
        out = tmp_path / saved
        done = combine("lora_concat", folders, out, parameters={"saved": saved})
        assert torch.allclose(load_file(out / FILE)[ROWS], wanted, atol=1e-7, rtol=0)
        fates = {f.model: (f.what, f.why) for f in done.plan.fates if f.tensor == ROWS}
        dropped = ("dropped", "saved: first takes input-1:m0")
        assert fates["input-2"] == (("merged", "") if saved == "mean" else dropped)


# single files ------------------------------------------------------------------------------------

TO_Q = "unet.mid_block.attn.to_q"


def diffusers_file(path, rank, alpha, seed):
    held = {
        f"{TO_Q}.lora_A.weight": random(rank, 5, seed=seed),
        f"{TO_Q}.lora_B.weight": random(6, rank, seed=seed + 1),
    }
    config = {"r": rank, "lora_alpha": alpha, "use_rslora": False, "target_modules": ["to_q"]}
    packed = {f"unet.{key}": value for key, value in config.items()}
    save_file(held, path, metadata={"lora_adapter_metadata": json.dumps(packed)})
    return path


def test_files_of_diffusers_say_their_scales_in_their_metadata(tmp_path):
    files = [diffusers_file(tmp_path / f"{i}.safetensors", 2 + i, 3.0, 90 + i) for i in range(2)]
    combine("lora_concat", files, tmp_path / "out", weights=[1.0, 0.5])
    (made,) = (tmp_path / "out").glob("*.safetensors")
    assert made.name == "pytorch_lora_weights.safetensors"
    assert not (tmp_path / "out/adapter_config.json").exists()
    (update,) = open_adapter(made).updates
    assert (update.module, update.rank, update.scale) == (TO_Q, 5, 1.5)
    with safe_open(made, "pt") as file:
        packed = json.loads(file.metadata()["lora_adapter_metadata"])
    assert (packed["unet.r"], packed["unet.lora_alpha"]) == (5, 7.5)
    assert packed["unet.target_modules"] == ["mid_block.attn.to_q"]


def named(path, down, up, rank, seed, alpha=None):
    module = "lora_unet_mid_block_attn_to_q" if alpha else f"{TO_Q}_lora"
    held = {
        f"{module}.{down}.weight": random(rank, 5, seed=seed),
        f"{module}.{up}.weight": random(6, rank, seed=seed + 1),
    }
    if alpha:
        held[f"{module}.alpha"] = torch.tensor(alpha)
    save_file(held, path)
    return path


def sum_of(files, weights):
    total = torch.zeros(6, 5, dtype=torch.float64)
    for file, weight in zip(files, weights, strict=True):
        (update,) = open_adapter(file).updates
        held = load_file(file)
        a, b = (held[t.spec.name].double() for t in (update.a, update.b))
        total += weight * update.scale * b @ a
    return total


@pytest.mark.parametrize("method", ["lora_concat", "lora_linear", "lora_svd"])
@pytest.mark.parametrize("dtype", [None, "bfloat16"])
def test_kohyas_alpha_is_that_of_the_result_to_the_last_digit(tmp_path, method, dtype):
    files = [
        named(tmp_path / f"{i}.safetensors", "lora_down", "lora_up", 2 + i, 20 + i, 1.7)
        for i in range(2)
    ]
    parameters = {"rank": 5} if method == "lora_svd" else {}
    more = {"parameters": parameters, **({"dtype": dtype} if dtype else {})}
    combine(method, files, tmp_path / "out", weights=[1.0, -0.3], **more)
    (made,) = (tmp_path / "out").glob("*.safetensors")
    held = load_file(made)
    assert held["lora_unet_mid_block_attn_to_q.alpha"].dtype == torch.float32
    wanted = sum_of(files, [1.0, -0.3])
    slack = 2.0**-6 if dtype else 1e-6
    assert torch.allclose(sum_of([made], [1.0]), wanted, atol=slack * float(wanted.abs().max()))


def test_old_files_that_say_no_scale_come_out_with_scale_1(tmp_path):
    files = [named(tmp_path / f"{i}.safetensors", "down", "up", 2 + i, 30 + i) for i in range(2)]
    combine("lora_concat", files, tmp_path / "out", weights=[3.0, -0.3])
    (made,) = (tmp_path / "out").glob("*.safetensors")
    assert load_file(made).keys() == load_file(files[0]).keys()
    wanted = sum_of(files, [3.0, -0.3])
    assert torch.allclose(sum_of([made], [1.0]), wanted, atol=1e-5, rtol=0)


def test_styles_are_not_mixed(tmp_path, two):
    file = diffusers_file(tmp_path / "x.safetensors", 2, 2.0, 95)
    refused(listing(two[0], file), "peft", "diffusers", "input-2:x")


# words -------------------------------------------------------------------------------------------


def test_ranks_in_words():
    def line(*ranks, **more):
        return ranks_line([ModuleRank(str(i), rank, **more) for i, rank in enumerate(ranks)])

    assert line(8) == "rank 8 for 1 module"
    assert line(8, 8, 4) == "rank 8 for 2 modules, 4 for 1"
    assert line(1, 2, 3, 16) == "rank 1 to 16 for 4 modules"
    assert line(8, 8, fitted=True) == "rank at most 8 for 2 modules"


def test_an_adapter_is_one_file(tmp_path, two):
    done = combine("lora_concat", two, tmp_path / "out", shard_size=100)
    assert [shard.name for shard in done.plan.shards] == [FILE]
    assert any("one file" in note for note in done.plan.notes)


def test_weights_may_differ_by_layer_and_by_part(tmp_path):
    layers = [f"model.layers.{i}.attn.q_proj" for i in range(3)]
    SHAPES.update(dict.fromkeys(layers, (6, 5)))
    folders = [
        adapter(tmp_path / f"deep{i}", dict.fromkeys([*layers, UP], 2), seed=100 + 10 * i)
        for i in range(2)
    ]
    weight = [{"filter": "q_proj", "value": [0.5, 2.5]}, {"value": -1.0}]
    models = [{"model": str(folders[0])}, {"model": str(folders[1]), "parameters": {}}]
    models[1]["parameters"]["weight"] = weight
    merge({"merge_method": "lora_concat", "models": models}, tmp_path / "out", threads=1)
    found, (one, two) = changes(tmp_path / "out"), map(changes, folders)
    for module, factor in zip([*layers, UP], [0.5, 1.5, 2.5, -1.0], strict=True):
        assert torch.allclose(found[module], one[module] + factor * two[module], atol=1e-5, rtol=0)


def test_an_adapter_that_changes_between_the_looks_is_noticed(tmp_path, two, monkeypatch):
    real = merging._fit

    def fit(*args):
        found = real(*args)
        held = {name: tensor * 2 for name, tensor in load_file(two[0] / FILE).items()}
        save_file(held, two[0] / FILE)
        return found

    monkeypatch.setattr(merging, "_fit", fit)
    with pytest.raises(MergeKitError, match="changed while its weights were looked at"):
        combine("lora_svd", two, tmp_path / "out", **ENERGY)
    assert not (tmp_path / "out").exists()
