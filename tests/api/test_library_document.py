"""The examples of docs/library.md run as they stand."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import merge_kit as mk
from merge_kit.methods import registry
from tests.toys import OUTSIDE, SUFFIXES, WIDTH, config, write

ROOT = Path(mk.__file__).parent.parent
TEXT = (ROOT / "docs" / "library.md").read_text(encoding="utf-8")
LAYERS = 5
EXAMPLES = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Return a folder with the models that the document speaks of."""
    made = tmp_path_factory.mktemp("library")
    for name, value in (("base", 1.0), ("code", 2.0), ("math", 4.0), ("toxic", 1.5)):
        write(made / "models" / name, _tensors(value), config(LAYERS))
    for seed, name in enumerate(("sort", "translate")):
        _write_adapter(made / "adapters" / name, seed)
    return made


def _tensors(value: float) -> dict[str, torch.Tensor]:
    """Return the tensors of a toy whose layers hold matrices."""
    shapes = dict.fromkeys(OUTSIDE, (WIDTH,))
    for i in range(LAYERS):
        for suffix in SUFFIXES:
            shape = (WIDTH,) if "norm" in suffix else (WIDTH, WIDTH)
            shapes[f"model.layers.{i}.{suffix}"] = shape
    return {name: torch.full(shape, value) for name, shape in shapes.items()}


def _write_adapter(folder: Path, seed: int) -> None:
    """Write an adapter of rank 2 and scale 1 of all projections."""
    random, tensors = torch.Generator().manual_seed(seed), {}
    for i in range(LAYERS):
        for suffix in SUFFIXES[:2]:
            module = f"base_model.model.model.layers.{i}.{suffix.removesuffix('.weight')}"
            tensors[f"{module}.lora_A.weight"] = torch.randn(2, WIDTH, generator=random)
            tensors[f"{module}.lora_B.weight"] = torch.randn(WIDTH, 2, generator=random)
    folder.mkdir(parents=True)
    save_file(tensors, folder / "adapter_model.safetensors")
    settings = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "base_model_name_or_path": "base"}
    settings["target_modules"] = ["q_proj", "up_proj"]
    (folder / "adapter_config.json").write_text(json.dumps(settings))


def test_the_examples_run_in_their_order(folder):
    # A process of its own: an example's method must not stay registered.
    program = folder / "examples.py"
    program.write_text("\n\n".join(EXAMPLES), encoding="utf-8")
    done = subprocess.run(
        [sys.executable, "-W", "error", program.name],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert len(EXAMPLES) == 20
    merged = {path.name for path in (folder / "merged").iterdir()}
    assert merged == {
        *("polite", "skills", "better", "soup", "pruned", "code_delta", "code_again", "halfway"),
        *("deeper", "greedy", "careful", "by_recipe", "sorting", "lora_ties", "sort", "forgot"),
    }
    adapters = {path.name for path in (folder / "adapters").iterdir()}
    assert adapters == {"sort", "translate", "both", "agreed", "code"}
    polite = mk.load(folder / "merged" / "polite").tensor("lm_head.weight")
    assert polite.tolist() == pytest.approx([1 + 0.8 * (1 + 0.5 * 3 - 0.5)] * 4, rel=2.0**-23)
    careful = mk.load(folder / "merged" / "careful").tensor("lm_head.weight")
    assert careful.tolist() == pytest.approx([1 + 0.5 * 0.01] * 4, rel=2.0**-23)  # float32
    assert mk.load(folder / "merged" / "better").tensor("lm_head.weight")[0].item() == 3.0


def test_every_exported_name_is_in_the_document():
    own = set(mk.__all__) - set(registry.names())  # docs/methods.md has the methods
    assert [name for name in own - {"__version__"} if not re.search(rf"\b{name}\b", TEXT)] == []


def test_every_error_has_the_code_that_the_document_says():
    rows = re.findall(r"^\| (`\w+`(?:, `\w+`)*) \| (\d)", TEXT, re.MULTILINE)
    told = {name: int(code) for names, code in rows for name in re.findall(r"`(\w+)`", names)}
    told.pop("InterruptedRun")
    assert len(told) == 12
    assert {name: getattr(mk, name).exit_code for name in told} == told
