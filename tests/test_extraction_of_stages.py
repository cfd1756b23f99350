"""A merge that is a stage or an expression, as an adapter: what its saved folder would give."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

import merge_kit as mk
from merge_kit.errors import NonFiniteError

Q, UP, NORM = "model.layers.0.q_proj.weight", "model.layers.0.up_proj.weight", "model.norm.weight"
K = "model.layers.0.k_proj.weight"
SHAPES = {Q: (12, 8), K: (12, 8), UP: (20, 8), NORM: (8,)}
CONFIG = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "num_hidden_layers": 1}


def write(folder, held):
    folder.mkdir()
    save_file(held, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(CONFIG))
    return folder


@pytest.fixture
def models(tmp_path):
    """Return a base and two models that have left all of it but k_proj, norm by whole numbers."""
    draw = torch.Generator().manual_seed(7)
    base = {name: torch.randn(shape, generator=draw) for name, shape in SHAPES.items()}
    folders = [write(tmp_path / "base", base)]
    for name in ("one", "two"):
        tuned = {k: v + torch.randn(v.shape, generator=draw) * (k != K) for k, v in base.items()}
        folders.append(write(tmp_path / name, tuned))
    return folders


def stage(method, models, **parameters):
    base, *others = map(str, models)
    entries = [{"model": one, "parameters": {"weight": 1.0}} for one in others]
    if method == "slerp":
        entries = [{"model": others[0]}]
    made = {"merge_method": method, "models": entries, "parameters": parameters}
    return made if method == "linear" else {**made, "base_model": base}


def extraction(base, model, **parameters):
    return {
        "merge_method": "lora_extract",
        "base_model": str(base),
        "models": [{"model": str(model)}],
        "parameters": parameters,
    }


METHODS = {
    "ties": {"density": 0.5},
    "slerp": {"t": 0.5},
    "della": {"density": 0.5, "epsilon": 0.1},
    "iso_c": {},
    "magnitude": {"density": 0.5, "scope": "model"},
    "linear": {},
}


@pytest.mark.parametrize("asked", [{"rank": 3}, {"energy": 0.9}], ids=["rank", "energy"])
@pytest.mark.parametrize("method", METHODS)
def test_a_stage_gives_the_adapter_of_its_saved_folder(tmp_path, models, method, asked):
    first = {"name": "m", **stage(method, models, **METHODS[method])}
    whole = {"merge_method": "passthrough", "models": [{"model": "m"}]}
    mk.merge([first, whole], tmp_path / "saved")
    mk.merge(extraction(models[0], tmp_path / "saved", **asked), tmp_path / "wanted")
    staged = [first, extraction(models[0], "m", **asked)]
    done = mk.merge(staged, tmp_path / "found")
    found, wanted = (
        load_file(tmp_path / name / "adapter_model.safetensors") for name in ("found", "wanted")
    )
    assert found.keys() == wanted.keys()
    assert not any("k_proj" in name for name in found)  # what comes out as the base has it
    assert all(torch.equal(found[name], wanted[name]) for name in found)
    fates = {f.tensor: f.what for f in done.plan.fates if f.model == "input-2"}
    assert fates[Q] == "merged"


def test_an_expression_gives_the_adapter_of_its_stage(tmp_path, models):
    base, *others = models
    made = mk.ties(base, others, density=0.5)
    found = mk.extract(made, base, rank=4).state_dict()
    staged = [{"name": "m", **stage("ties", models, density=0.5)}, extraction(base, "m", rank=4)]
    mk.merge(staged, tmp_path / "out")
    wanted = load_file(tmp_path / "out/adapter_model.safetensors")
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], wanted[name]) for name in found)


def test_values_that_are_not_finite_in_a_stage_are_named_with_their_model(tmp_path, models):
    held = load_file(models[2] / "model.safetensors")
    held[UP][2, 3] = torch.nan
    write(tmp_path / "bad", held)
    first = stage("ties", [*models[:2], tmp_path / "bad"], density=0.5)
    for asked in ({"rank": 2}, {"energy": 0.5}):
        staged = [{"name": "m", **first}, extraction(models[0], "m", **asked)]
        with pytest.raises(NonFiniteError) as caught:
            mk.merge(staged, tmp_path / "out")
        assert "1 NaN or infinite values in the inputs: 1 in input-2:bad" in str(caught.value)
        assert "up_proj" in caught.value.where


@pytest.mark.parametrize("asked", [{"rank": 2}, {"energy": 0.5}], ids=["rank", "energy"])
def test_values_that_are_not_finite_are_written_and_counted_where_that_is_allowed(
    tmp_path, models, asked
):
    held = load_file(models[1] / "model.safetensors")
    held[UP][2, 3] = torch.nan
    bad = write(tmp_path / "bad", held)
    done = mk.merge(extraction(models[0], bad, **asked), tmp_path / "out", allow_nonfinite=True)
    written = load_file(tmp_path / "out/adapter_model.safetensors")
    rank = asked.get("rank", 8)
    a, b = (written[f"base_model.model.{UP.removesuffix('.weight')}.lora_{s}.weight"] for s in "AB")
    assert (a.shape, b.shape) == ((rank, 8), (20, rank))
    assert a.isnan().any()
    assert any("up_proj" in key for key in done.report.nonfinite)
