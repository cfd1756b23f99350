"""Digests of bytes that are copied to several places are computed once, and kept for a while."""

from __future__ import annotations

from pathlib import Path

import pytest

from merge_kit import api
from merge_kit.core.tensors import ByteSpan, TensorSpec
from merge_kit.engine import copies, jobs
from merge_kit.engine.copies import Repeats
from merge_kit.plan.sources import Stored
from merge_kit.plan.values import Step, Target

DEMO = Path(__file__).parent.parent.parent / "recipes" / "demo"


def stored(start: int = 0) -> Stored:
    return Stored(ByteSpan(Path("a"), start, start + 8), "F32", (2,))


def steps(*starts: int) -> list[Step]:
    target = Target("x", TensorSpec("x", "F32", (2,)), 0, 0)
    return [Step("copy", (target,), (stored(start),), ("m",)) for start in starts]


def test_what_is_copied_twice_is_known_once_more():
    repeats = Repeats(steps(0, 0, 8))
    assert repeats.known(stored(), 0) is None
    repeats.add(stored(), 0, b"one")
    repeats.add(stored(8), 0, b"two")
    assert repeats.known(stored(), 1) is None
    assert repeats.known(stored(), 0) == b"one"
    assert repeats.known(stored(), 0) is None  # there is no third copy
    assert repeats.known(stored(8), 0) is None


def test_no_more_is_kept_than_fits(monkeypatch):
    monkeypatch.setattr(copies, "MOST_BYTES", 4)
    repeats = Repeats(steps(0, 0, 8, 8))
    repeats.add(stored(), 0, b"full")
    repeats.add(stored(8), 0, b"more")
    assert repeats.known(stored(8), 0) is None
    assert repeats.known(stored(), 0) == b"full"
    repeats.add(stored(8), 0, b"more")  # there is room again
    assert repeats.known(stored(8), 0) == b"more"


@pytest.mark.parametrize("threads", [1, 2])
def test_copies_of_experts_have_the_hashes_of_their_bytes(tmp_path, monkeypatch, threads):
    counted = []
    real = jobs.digests
    monkeypatch.setattr(jobs, "digests", lambda *a: counted.append(1) or real(*a))
    recipe = {
        "merge_method": "sparse_upcycle",
        "base_model": str(DEMO / "base"),
        "parameters": {"num_experts": 6},
    }
    done = api.merge(recipe, tmp_path / "out", threads=threads)
    experts = 6 * 3 * 4
    assert len(done.plan.steps) - len(counted) >= experts - 4 * 3 * threads - 4
    hashes = done.report.hashes
    for layer in range(4):
        for part in ("w1", "w2", "w3"):
            lead = f"model.layers.{layer}.block_sparse_moe.experts"
            assert len({hashes[f"{lead}.{e}.{part}.weight"] for e in range(6)}) == 1
