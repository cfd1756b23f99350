"""The k-th largest magnitude, and which of its equals are selected, against a stable sort."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import inf
from typing import ClassVar, Literal

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from merge_kit.core.tensors import BLOCK
from merge_kit.errors import NonFiniteError
from merge_kit.methods import order
from merge_kit.methods.base import Grain, MergeMethod, Scan
from merge_kit.methods.order import Cut, MagnitudeAt, Quantile, Top, keep_top
from tests.engine.handmade import run, step, stored


@dataclass(frozen=True, kw_only=True)
class KeepLargest(MergeMethod):
    """Keep the largest elements of a tensor or model (for these tests)."""

    max_inputs: ClassVar[int | None] = 1
    method_name: ClassVar[str] = "keep_largest"

    how: Top
    scope: Literal["tensor", "model"] = "tensor"
    held: Grain = "element"

    def residency(self) -> Grain:
        return self.held

    def scans(self) -> Sequence[Scan]:
        return [Scan("cuts", MagnitudeAt(((0, self.how),)), scope=self.scope)]

    def merge(self, slab, scans):
        return keep_top(slab.tensors[0], scans["cuts"][0], slab)


def expected(tensors: dict[str, torch.Tensor], how: Top) -> dict[str, torch.Tensor]:
    """Return what is kept, by a stable sort of all tensors one after the other."""
    flat = np.concatenate([t.numpy().ravel() for t in tensors.values()])
    k = how.count(flat.size, int(np.count_nonzero(flat)))
    chosen = np.argsort(-np.abs(flat), kind="stable")[:k]
    kept = np.zeros_like(flat)
    kept[chosen] = flat[chosen]
    parts = np.split(kept, np.cumsum([t.numel() for t in tensors.values()])[:-1])
    return {
        n: torch.from_numpy(p).view(t.shape)
        for p, (n, t) in zip(parts, tensors.items(), strict=True)
    }


def kept(folder, tensors, how, *, scope="tensor", held="element", blocks=None, workers=2):
    folder.mkdir(parents=True, exist_ok=True)
    method = KeepLargest(how=how, scope=scope, held=held)
    steps = []
    for name, tensor in tensors.items():
        dtype = "F64" if tensor.dtype == torch.float64 else "F32"
        source = stored(folder, name, tensor)
        steps.append(step(method, [source], dtype=dtype, name=name))
    return run(steps, folder / "out", blocks=blocks, workers=workers)


def random(count: int, seed: int = 0, dtype=torch.float32) -> torch.Tensor:
    return torch.randn(count, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def tied(count: int, seed: int = 0) -> torch.Tensor:
    """Return numbers of few bits: hundreds are equal."""
    return random(count, seed).bfloat16().float()


KINDS = {
    "random": random,
    "float64": lambda count, seed=0: random(count, seed, torch.float64),
    "tied": tied,
    "sparse": lambda count, seed=0: random(count, seed) * (random(count, seed + 1) > 1.3),
    "equal": lambda count, seed=0: torch.ones(count),
    "zero": lambda count, seed=0: torch.zeros(count),
    "few values": lambda count, seed=0: random(count, seed).round(),
    "outliers": lambda count, seed=0: random(count, seed) * 10 ** (random(count, seed + 1) * 4),
    "rising": lambda count, seed=0: torch.linspace(0, 1, count),
    "tiny": lambda count, seed=0: random(count, seed) * 1e-40,
}
SIZES = (1, 2, 100, BLOCK, BLOCK + 1, 9 * BLOCK + 77)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("share", [0.0, 1e-4, 0.2, 0.999])
def test_exactly_the_largest_are_kept(tmp_path, kind, size, share):
    tensors = {"x": KINDS[kind](size)}
    how = Top((share,), least=1)
    assert torch.equal(kept(tmp_path, tensors, how)["x"], expected(tensors, how)["x"])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("candidates", [1, 50, 5000])
def test_a_bracket_that_holds_too_much_is_narrowed(tmp_path, monkeypatch, kind, candidates):
    monkeypatch.setattr(order, "CANDIDATES", candidates)
    monkeypatch.setattr(order, "FEWEST", 1)
    tensors = {"x": KINDS[kind](12 * BLOCK + 5)}
    for share in (0.01, 0.2, 0.7):
        how = Top((share,))
        result = kept(tmp_path / str(share), tensors, how)["x"]
        assert torch.equal(result, expected(tensors, how)["x"])


@pytest.mark.parametrize("kind", ["tied", "few values", "random"])
def test_slabs_and_threads_change_no_bit(tmp_path, kind):
    tensors = {"x": KINDS[kind](66 * BLOCK + 9)}
    how = Top((0.2,))
    wanted = expected(tensors, how)["x"]
    for blocks in (1, 2, 8):
        for workers in (1, 2):
            folder = tmp_path / f"{blocks}-{workers}"
            result = kept(folder, tensors, how, blocks=blocks, workers=workers)["x"]
            assert torch.equal(result, wanted)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("candidates", [100, order.CANDIDATES])
def test_the_largest_of_a_whole_model(tmp_path, monkeypatch, kind, candidates):
    monkeypatch.setattr(order, "CANDIDATES", candidates)
    monkeypatch.setattr(order, "FEWEST", 1)
    make = KINDS[kind]
    sizes = (3 * BLOCK, 1, 100, 12 * BLOCK + 1, BLOCK)
    tensors = {f"t{i}": make(n, seed=i) * (i + 1) for i, n in enumerate(sizes)}
    for share in (0.001, 0.2, 0.9):
        how = Top((share,))
        result = kept(tmp_path / str(share), tensors, how, scope="model")
        wanted = expected(tensors, how)
        assert all(torch.equal(result[name], wanted[name]) for name in tensors)


@pytest.mark.parametrize("columns", [3, 1000, 40_000])
def test_whole_rows_in_slabs(tmp_path, columns):
    tensors = {"x": tied(columns * (1_000_000 // columns)).view(-1, columns)}
    how = Top((0.3,))
    for blocks in (1, 4):
        result = kept(tmp_path / str(blocks), tensors, how, held="row", blocks=blocks)["x"]
        assert torch.equal(result, expected(tensors, how)["x"])


def test_rows_that_differ_widely_are_no_obstacle(tmp_path):
    scales = 10.0 ** (random(600, 3) * 3)
    tensors = {"x": (random(600 * 4000).view(600, 4000) * scales[:, None]).flatten()}
    how = Top((0.2,))
    assert torch.equal(kept(tmp_path, tensors, how)["x"], expected(tensors, how)["x"])


def test_ties_at_the_threshold_go_to_the_lowest_indices(tmp_path):
    values = torch.tensor([1.0, -2.0, 2.0, 0.5, -2.0, 3.0])
    assert kept(tmp_path, {"x": values}, Top((0.5,)))["x"].tolist() == [0, -2, 2, 0, 0, 3]


def test_510_ties_at_the_threshold(tmp_path):
    values = random(BLOCK, 5) * 0.1
    values[::128] = 1.0  # 512 equal ones are the largest
    values[7] = values[9] = 2.0
    result = kept(tmp_path, {"x": values}, Top((257 / BLOCK,)))["x"]
    equal = torch.nonzero(result == 1.0).flatten()
    assert result.count_nonzero() == 257
    assert torch.equal(equal, torch.arange(255) * 128)


def test_shares_are_counted_one_by_one():
    assert Top((0.019, 0.5)).count(100, 100) == 1 + 50
    assert Top((0.001,), least=1).count(10, 10) == 1
    assert Top((0.0,), least=1).count(10, 10) == 0
    assert Top((0.5,), of_nonzero=True).count(100, 7) == 3
    assert Top((1.0, 0.5)).count(10, 10) == 10
    assert Top((0.5,), least=1).count(0, 0) == 0


def test_a_quantile_counts_from_the_bottom():
    values = np.arange(11.0)
    for q in (0.0, 0.25, 0.5, 0.75, 1.0):
        place = Quantile(q).count(11, 10)
        assert np.sort(values)[::-1][place - 1] == np.sort(values)[int(q * 10)]
    assert Quantile(0.5).count(0, 0) == 0


def test_a_share_of_what_is_not_zero(tmp_path):
    values = KINDS["sparse"](20 * BLOCK)
    how = Top((0.5,), of_nonzero=True)
    result = kept(tmp_path, {"x": values}, how)["x"]
    assert result.count_nonzero() == values.count_nonzero() // 2
    assert torch.equal(result, expected({"x": values}, how)["x"])


def test_a_cut_knows_which_tensors_come_before():
    cut = Cut(1.0, "b", 5, frozenset({"a"}))
    assert (cut.index_in("a") > 2**60, cut.index_in("b"), cut.index_in("c")) == (True, 5, 0)
    assert Cut(inf).index_in("anything") > 2**60


@pytest.mark.parametrize("bad", [float("nan"), inf, -inf])
@pytest.mark.parametrize("scope", ["tensor", "model"])
def test_what_is_not_finite_takes_no_place(tmp_path, bad, scope):
    values = random(20 * BLOCK)
    values[BLOCK] = bad
    with pytest.raises(NonFiniteError, match=r"1 in input-1") as caught:
        kept(tmp_path, {"x": values}, Top((0.2,)), scope=scope)
    assert caught.value.where == "x"


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.floats(-4, 4, width=16), min_size=1, max_size=60),
    st.floats(0, 1),
    st.integers(0, 1),
)
def test_any_numbers(tmp_path_factory, values, share, least):
    tensors = {"x": torch.tensor(values, dtype=torch.float32)}
    how = Top((share,), least=least)
    result = kept(tmp_path_factory.mktemp("any"), tensors, how)["x"]
    assert torch.equal(result, expected(tensors, how)["x"])
