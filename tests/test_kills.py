"""A run that is killed at any moment goes on, and ends with the bytes of a clean run."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

ROOT = Path(__file__).parent.parent


def models(folder: Path) -> Path:
    generator = torch.Generator().manual_seed(0)
    for name in "ab":
        (folder / name).mkdir()
        tensors = {f"t{i}": torch.randn(400_000, generator=generator) for i in range(60)}
        save_file(tensors, folder / name / "model.safetensors")
    recipe = folder / "recipe.yaml"
    recipe.write_text(
        "merge_method: slerp\nbase_model: a\nmodels: [{model: b}]\nparameters: {t: 0.4}\n"
        "shard_size: 20MB\n"
    )
    return recipe


def start(recipe: Path, out: Path) -> subprocess.Popen:
    command = [sys.executable, "-m", "merge_kit", "run", str(recipe), "-o", str(out)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(
        command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    )


def content(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def killed_and_resumed(tmp_path: Path, times: int, number: int) -> None:
    recipe = models(tmp_path)
    begun = time.monotonic()
    process = start(recipe, tmp_path / "clean")
    _, errors = process.communicate()
    assert process.returncode == 0, errors.decode()
    took = time.monotonic() - begun
    wanted = content(tmp_path / "clean")
    chance = random.Random(1)
    for i in range(times):
        out = tmp_path / f"out{i}"
        process = start(recipe, out)
        time.sleep(chance.uniform(0.3, 1.0) * took)
        process.send_signal(number)
        process.communicate()
        if not out.exists():
            again = start(recipe, out)
            _, errors = again.communicate()
            assert again.returncode == 0, errors.decode()
        assert content(out) == wanted
        assert not list(tmp_path.glob("*.partial"))


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_a_killed_run_goes_on(tmp_path, number):
    killed_and_resumed(tmp_path, 1, number)


@pytest.mark.slow
def test_a_run_killed_at_a_hundred_moments_goes_on(tmp_path):
    killed_and_resumed(tmp_path, 100, signal.SIGKILL)
