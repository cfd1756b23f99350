"""Adapters that are extracted from fine-tunes: loaded by peft."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import save_file

from merge_kit import MergeKitError, merge
from tests.adapters.claims import reported, truncation
from tests.adapters.makers import (
    answers,
    changed,
    load_adapted,
    load_base,
    make,
    make_base,
    tensors,
)
from tests.oracles import adapters as oracle


def extracted(base, tuned, out, **parameters):
    recipe = {
        "merge_method": "lora_extract",
        "base_model": str(base),
        "models": [{"model": str(tuned)}],
        "parameters": parameters,
    }
    return merge(recipe, out)


@pytest.fixture(scope="module")
def tuned(tmp_path_factory):
    """Return a base, what an adapter of rank 2 to 7 makes of it, and the adapter."""
    folder = tmp_path_factory.mktemp("tuned")
    base, adapter = make("both_patterns", folder)
    changed("llama", base, oracle.changes(adapter)).save_pretrained(folder / "tuned")
    return base, folder / "tuned", adapter


def test_a_known_change_is_recovered(tmp_path, tuned):
    base, whole, adapter = tuned
    extracted(base, whole, tmp_path / "out", rank=7)
    found, wanted = oracle.changes(tmp_path / "out"), oracle.changes(adapter)
    assert found.keys() == wanted.keys()
    for name, change in wanted.items():
        assert float((found[name] - change).norm()) <= 1e-5 * float(change.norm()), name
    logits = answers(load_adapted("llama", base, tmp_path / "out"))
    assert float((logits - answers(load_base("llama", whole))).abs().max()) <= 1e-4
    config = json.loads((tmp_path / "out/adapter_config.json").read_text())
    assert config["r"] == config["lora_alpha"]


def test_energy_finds_the_true_ranks(tmp_path, tuned):
    base, whole, adapter = tuned
    extracted(base, whole, tmp_path / "out", energy=1 - 1e-9)
    found, had = oracle.read(tmp_path / "out").tensors, oracle.read(adapter).tensors
    factors = [name for name in had if "lora_A" in name]
    assert {n: len(found[n]) for n in factors} == {n: len(had[n]) for n in factors}


def test_what_extraction_leaves_out_is_the_tail(tmp_path, tuned):
    base, whole, adapter = tuned
    done = extracted(base, whole, tmp_path / "out", rank=1)
    wanted = oracle.changes(adapter)
    ranks = dict.fromkeys(wanted, 1)
    truncation(tmp_path / "out", wanted, ranks)
    reported(done, wanted, ranks)


@pytest.mark.parametrize("kind", ["gpt2", "net", "llama_biased", "llama_tied", "mixtral"])
def test_every_base_is_extracted_whole(tmp_path, kind):
    base = make_base(kind, tmp_path / "base", torch.float32)
    make_base(kind, tmp_path / "tuned", torch.float32, seed=2)
    extracted(base, tmp_path / "tuned", tmp_path / "out", rank=64, rest="save")
    found = answers(load_adapted(kind, base, tmp_path / "out"))
    wanted = answers(load_base(kind, tmp_path / "tuned"))
    assert float((found - wanted).abs().max()) <= 1e-3 * float(wanted.abs().max())


def norms_changed(base, folder):
    """Return a copy of a base with another final norm and another projection."""
    shutil.copytree(base, folder)
    held = tensors(base)
    held["model.norm.weight"] = held["model.norm.weight"] * 1.5
    name = "model.layers.0.self_attn.q_proj.weight"
    generator = torch.Generator().manual_seed(5)
    held[name] = held[name] + 0.1 * torch.randn(16, 16, generator=generator, dtype=held[name].dtype)
    save_file(held, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def test_what_has_no_low_rank_is_saved_refused_or_dropped_as_asked(tmp_path):
    base = make_base("llama", tmp_path / "base", torch.float32)
    whole = norms_changed(base, tmp_path / "tuned")
    extracted(base, whole, tmp_path / "save", rank=16, rest="save")
    name = "base_model.model.model.norm.weight"
    norm = tensors(whole)["model.norm.weight"]
    assert torch.equal(tensors(tmp_path / "save")[name], norm)
    found = answers(load_adapted("llama", base, tmp_path / "save"))
    assert float((found - answers(load_base("llama", whole))).abs().max()) <= 1e-4
    with pytest.raises(MergeKitError, match=r"model\.norm"):
        extracted(base, whole, tmp_path / "refuse", rank=16, rest="refuse")
    done = extracted(base, whole, tmp_path / "drop", rank=16, rest="drop")
    assert name not in tensors(tmp_path / "drop")
    dropped = [f.tensor for f in done.plan.fates if f.what == "dropped"]
    assert any("model.norm.weight" in tensor for tensor in dropped)


def test_an_extracted_adapter_goes_back_into_its_base(tmp_path, tuned):
    base, whole, _ = tuned
    extracted(base, whole, tmp_path / "out", rank=7)
    models = [{"model": f"{base}+{tmp_path / 'out'}"}]
    merge({"merge_method": "passthrough", "models": models}, tmp_path / "back")
    wanted = tensors(whole)
    for name, tensor in tensors(tmp_path / "back").items():
        assert float((tensor - wanted[name]).norm()) <= 1e-5 * float(wanted[name].norm()), name
