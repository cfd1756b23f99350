"""What cannot be built is refused from headers, with place and action; nothing is left behind."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import plain_models
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from wrong_recipes import CASES

from merge_kit.api import merge
from merge_kit.cli import main


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Make the models that the recipes name."""
    root = tmp_path_factory.mktemp("wrong")
    for seed, name in enumerate("abc"):
        plain_models.write(root / name, "llama", 4, seed, torch.float32)
    plain_models.write(root / "deep", "llama", 6, 3, torch.float32)
    for kind in ("qwen2", "qwen3"):
        plain_models.write(root / kind, kind, 4, 4, torch.float32)
    changed(root, "wide", resized({8: 16}), hidden_size=16)
    changed(root, "wide_mlp", resized({12: 20}), intermediate_size=20)
    changed(root, "words", resized({10: 14}), vocab_size=14)
    changed(root, "holey", lambda tensors: tensors.pop("model.layers.2.mlp.up_proj.weight"))
    changed(root, "biased", with_biases, mlp_bias=True)
    changed(root, "gemma2", model_type="gemma2", architectures=["Gemma2ForCausalLM"])
    (changed(root, "bare") / "config.json").unlink()
    window = {"use_sliding_window": True, "sliding_window": 4}
    changed(root, "qwen2_window", source="qwen2", **window, max_window_layers=2)
    types = ["full_attention", "sliding_attention"] * 2
    changed(root, "qwen3_window", source="qwen3", **window, layer_types=types)
    for name, count in (("moe", 4), ("moe3", 3)):
        recipe = {"merge_method": "sparse_upcycle", "base_model": str(root / "a")}
        merge(recipe | {"parameters": {"num_experts": count}}, root / name)
    return root


def changed(
    root: Path,
    name: str,
    change: Callable[[dict[str, Tensor]], object] | None = None,
    source: str = "a",
    **config: object,
) -> Path:
    """Save a model that is another one but for this."""
    folder = shutil.copytree(root / source, root / name)
    if change:
        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    held = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    (folder / "config.json").write_text(json.dumps(held | config, indent=2), encoding="utf-8")
    return folder


def resized(sizes: dict[int, int]) -> Callable[[dict[str, Tensor]], None]:
    def change(tensors: dict[str, Tensor]) -> None:
        for name, tensor in tensors.items():
            tensors[name] = torch.ones([sizes.get(size, size) for size in tensor.shape])

    return change


def with_biases(tensors: dict[str, Tensor]) -> None:
    for layer in range(4):
        for name, size in (("gate", 12), ("up", 12), ("down", 8)):
            tensors[f"model.layers.{layer}.mlp.{name}_proj.bias"] = torch.ones(size)


@pytest.mark.parametrize("case", CASES.values(), ids=list(CASES))
def test_what_cannot_be_is_refused_by_the_plan_with_its_place(case, folder, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    before = sorted(path.name for path in folder.iterdir())
    Path("r.yaml").write_text(case.text, encoding="utf-8")
    refusals = []
    for words in (("plan", "r.yaml"), ("run", "r.yaml", "-o", "out")):
        assert main(words) == case.code
        refusals.append(capsys.readouterr().err)
    Path("r.yaml").unlink()
    said = refusals[0]
    assert refusals[1] == said  # nothing was found out by running
    assert [part for part in case.said if part not in said] == [], said
    assert "hint: " in said, said
    assert "Traceback" not in said
    assert sorted(path.name for path in folder.iterdir()) == before
