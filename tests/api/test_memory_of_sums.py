"""Sums that no recipe says are written in memory that does not grow with the models."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import torch

import merge_kit as mk
from tests.toys import write

ROOT = Path(mk.__file__).parent.parent
PROGRAM = """
import merge_kit as mk
from merge_kit.engine.run import peak_bytes
base, code = mk.load("base"), mk.load("code")
kept = (code - base).prune(0.2, scope="model")
kept.save("delta", threads=2)
(base + 0.5 * (kept + mk.TaskVector.load("delta"))).save("applied", threads=2)
print(peak_bytes())
"""


def test_memory_does_not_grow_with_the_models(tmp_path):
    for name, number in (("base", 0.0), ("code", 1.0)):
        row = torch.full((2048, 4096), number, dtype=torch.bfloat16)
        write(tmp_path / name, {f"layers.{i}.w": row.clone() for i in range(10)}, None)
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", PROGRAM],
        cwd=tmp_path,
        env={"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    held = sum(p.stat().st_size for p in tmp_path.glob("*/*.safetensors"))
    assert held > 800_000_000
    # 250 MB are Python and torch; the rest are two workers' slabs and candidates.
    assert int(done.stdout) < 450_000_000
    # All differences are equal, so a fifth of them are the first two tensors of ten.
    applied = mk.load(tmp_path / "applied")
    found = [applied.tensor(f"layers.{i}.w").unique().tolist() for i in (0, 1, 2, 9)]
    assert found == [[1.0], [1.0], [0.0], [0.0]]
