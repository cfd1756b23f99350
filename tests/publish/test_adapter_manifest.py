"""The record and the card of adapters that were made."""

from __future__ import annotations

import json

import pytest
import torch
import yaml
from safetensors.torch import save_file

from merge_kit import merge
from merge_kit.plan.describe_adapters import largest, residual_table, residuals
from merge_kit.publish.manifest import read_manifest
from merge_kit.publish.verify import verify

MODULES = [f"layers.{i}.q_proj" for i in range(3)]


def adapter(folder, seed, base="org/base"):
    held = {}
    for i, module in enumerate(MODULES):
        generator = torch.Generator().manual_seed(10 * seed + i)
        for side, shape in (("A", (3, 6)), ("B", (5, 3))):
            name = f"base_model.model.{module}.lora_{side}.weight"
            held[name] = torch.randn(shape, generator=generator)
    folder.mkdir()
    save_file(held, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 3, "lora_alpha": 3, "target_modules": ["q_proj"]}
    config["base_model_name_or_path"] = base
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture
def made(tmp_path):
    models = [{"model": str(adapter(tmp_path / f"a{i}", i))} for i in range(2)]
    recipe = {"merge_method": "lora_svd", "models": models, "parameters": {"rank": 2}}
    return merge(recipe, tmp_path / "out", threads=1)


def test_ranks_and_residuals_are_on_record(made):
    record = read_manifest(made.output)
    assert record.ranks == dict.fromkeys(MODULES, 2)
    for module, found in record.residuals.items():
        fact = made.report.facts[module]
        assert found.relative == pytest.approx(fact["residual"] / fact["norm"], rel=1e-5)
        assert found.norm == pytest.approx(fact["norm"], rel=1e-5)
    assert record.residuals.keys() == set(MODULES)


def test_a_record_of_before_there_were_adapters_still_verifies(made):
    path = made.output / "merge_kit.json"
    record = json.loads(path.read_text())
    del record["ranks"], record["residuals"]
    path.write_text(json.dumps(record))
    assert read_manifest(made.output).ranks == {}
    assert verify(made.output).is_intact


def test_an_adapter_is_verified_to_the_last_bit(made):
    assert len(verify(made.output).ok) == 6
    file = made.output / "adapter_model.safetensors"
    raw = bytearray(file.read_bytes())
    raw[-1] ^= 1
    file.write_bytes(raw)
    assert len(verify(made.output).differing) == 1
    (made.output / "adapter_config.json").unlink()
    assert verify(made.output).files == ("adapter_config.json: missing",)


def front_matter(folder):
    text = (folder / "README.md").read_text()
    return yaml.safe_load(text.split("---")[1]), text


def test_the_card_is_that_of_an_adapter(made):
    front, text = front_matter(made.output)
    assert front == {
        "base_model": ["org/base"],
        "base_model_relation": "adapter",
        "library_name": "peft",
        "tags": ["lora", "merge", "merge_kit", "lora_svd"],
    }
    assert "from 2 adapters, without training" in text
    assert "- rank 2 for 3 modules" in text
    for found in residuals(made.report.facts):
        assert f"| `{found.key}` | 2 | {found.norm:.4g} | {found.relative:.2%} |" in text


def test_a_base_that_is_no_id_of_the_hub_is_not_named_as_one(tmp_path):
    for i, base in enumerate(["base", "/home/someone/base", "../base", None]):
        models = [{"model": str(adapter(tmp_path / f"m{i}", i, base))}]
        merge({"merge_method": "lora_concat", "models": models}, tmp_path / f"out{i}")
        front, text = front_matter(tmp_path / f"out{i}")
        assert front.keys() == {"library_name", "tags"}
        assert "someone" not in text


FACTS = {
    "a": {"norm": 4.0, "residual": 1.0},
    "b": {"norm": 0.0, "residual": 0.0},
    "c": {"norm": 1.0, "residual": 0.5},
    "d": {"norm": float("nan"), "residual": 1.0},
}


def test_residuals_are_shares_of_finite_changes():
    found = residuals(FACTS)
    assert [(one.key, one.relative) for one in found] == [("a", 0.25), ("b", 0.0), ("c", 0.5)]
    assert [one.key for one in largest(found, 2)] == ["c", "a"]


def test_a_run_ends_with_the_modules_that_miss_most(made):
    lines = residual_table(made.report.facts, made.plan)
    assert lines[0].split() == ["missed", "rank", "module"]
    shares = [float(line.split()[0].rstrip("%")) for line in lines[1:-1]]
    assert shares == sorted(shares, reverse=True)
    assert len(shares) == 3
    assert residual_table({}, made.plan) == []
