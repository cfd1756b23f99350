"""A run keeps the promise of its plan: resident memory of the whole process."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

TENSORS = 4
ELEMENTS = 12_500_000  # in bfloat16, four of them are 100 MB

CHILD = """
import json, resource, sys
from merge_kit.api import merge
recipe, output, threads = json.loads(sys.argv[1]), sys.argv[2], int(sys.argv[3])
done = merge(recipe, output, threads=threads)
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
peak *= 1 if sys.platform == "darwin" else 1024
print(json.dumps([peak, done.plan.bill.peak_bytes, done.report.bytes_read]))
"""


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """Two models of 100 MB, in one file each."""
    folder = tmp_path_factory.mktemp("large")
    for seed, name in enumerate(("one", "two")):
        generator = torch.Generator().manual_seed(seed)
        noise = torch.randn(ELEMENTS + TENSORS, generator=generator).bfloat16()
        tensors = {f"layers.{i}.weight": noise[i : i + ELEMENTS].clone() for i in range(TENSORS)}
        save_file(tensors, folder / f"{name}.safetensors")
    return folder


def merged(recipe: dict, output: Path, threads: int) -> list[int]:
    """Return peak, promise and bytes read of a merge in a process of its own.

    The shell between the two processes is small: a process that is started directly inherits the
    peak of its parent, which holds torch and more.
    """
    command = [sys.executable, "-c", CHILD, json.dumps(recipe), str(output), str(threads)]
    shell = ["sh", "-c", '"$@"; exit $?', "sh", *command]
    done = subprocess.run(shell, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("method", ["linear", "slerp"])
def test_a_merge_of_large_models_stays_within_its_bill(method, threads, large, tmp_path):
    one, two = str(large / "one.safetensors"), str(large / "two.safetensors")
    recipe = {
        "linear": {"models": [{"model": one}, {"model": two}], "parameters": {"weight": 0.5}},
        "slerp": {"base_model": one, "models": [{"model": two}], "parameters": {"t": 0.5}},
    }[method]
    peak, promised, read = merged({"merge_method": method, **recipe}, tmp_path / "out", threads)
    assert read >= 2 * 2 * TENSORS * ELEMENTS
    assert peak <= promised
    assert promised < 250e6 + 100e6  # neither of the models fits beside Python and torch
