"""One source of each kind, read through a merge."""

from __future__ import annotations

import itertools

import pytest
import torch

from merge_kit.core.tensors import BLOCK
from merge_kit.methods import noise
from merge_kit.methods.base import PerModel
from merge_kit.methods.linear import Linear
from merge_kit.methods.passthrough import Passthrough
from merge_kit.methods.slerp import Slerp
from merge_kit.plan.sources import (
    Concat,
    Generated,
    LowRank,
    Merged,
    Permuted,
    Projected,
    Rows,
    View,
)
from tests.engine.handmade import run, step, stored

GENERATOR = torch.Generator().manual_seed(7)


def matrix(rows: int, columns: int, dtype=torch.float32) -> torch.Tensor:
    return torch.randn(rows, columns, generator=GENERATOR).to(dtype)


def read(source, folder, *, blocks=None, workers=2, dtype="F32"):
    """Return what a source yields, as the engine reads it."""
    one = step(Passthrough(), [source], dtype=dtype)
    return run([one], folder, blocks=blocks, workers=workers)["x"]


def in_all_sizes(source, folder, expected, *, exact=True):
    """Check a source against its definition, with the same bits for every slab and thread count."""
    results = [
        read(source, folder / f"{blocks}-{workers}", blocks=blocks, workers=workers)
        for blocks, workers in itertools.product((1, 2, None), (1, 2))
    ]
    assert all(torch.equal(results[0], other) for other in results[1:])
    if exact:
        assert torch.equal(results[0], expected)
    else:
        torch.testing.assert_close(results[0], expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_stored_bytes_come_back_as_they_are(tmp_path, dtype):
    x = matrix(300, 701, dtype)
    expected = x.float()
    in_all_sizes(stored(tmp_path, "a", x), tmp_path, expected)


def test_rows_take_rows_in_any_order_and_zeros_for_minus_one(tmp_path):
    x = matrix(200, 701)
    order = [3, 4, 5, -1, 0, 199, 7, -1, -1, *range(150, 3, -1)]
    expected = torch.stack([x[i] if i >= 0 else torch.zeros(701) for i in order])
    in_all_sizes(Rows(stored(tmp_path, "a", x), tuple(order)), tmp_path, expected)


def test_rows_of_a_vector_are_its_elements(tmp_path):
    x = torch.arange(5.0)
    expected = torch.tensor([4.0, 0.0, 1.0, 2.0])
    in_all_sizes(Rows(stored(tmp_path, "a", x), (4, -1, 1, 2)), tmp_path, expected)


def test_concat_joins_along_the_first_axis(tmp_path):
    a, b, c = matrix(120, 701), matrix(1, 701), matrix(90, 701, torch.bfloat16)
    parts = tuple(stored(tmp_path, n, t) for n, t in (("a", a), ("b", b), ("c", c)))
    in_all_sizes(Concat(parts), tmp_path, torch.cat([a, b, c.float()]))


def test_view_is_a_run_of_elements_in_another_shape(tmp_path):
    x = matrix(300, 701)
    source = View(stored(tmp_path, "a", x), 17, (100, 3, 5))
    in_all_sizes(source, tmp_path, x.flatten()[17 : 17 + 1500].view(100, 3, 5))


def test_permuted_reorders_rows_and_columns(tmp_path):
    x = matrix(211, 503)
    rows = tuple(torch.randperm(211, generator=GENERATOR).tolist())
    columns = tuple(torch.randperm(503, generator=GENERATOR).tolist())
    source = stored(tmp_path, "a", x)
    both = x[list(rows)][:, list(columns)]
    in_all_sizes(Permuted(source, rows, columns), tmp_path / "both", both)
    in_all_sizes(Permuted(source, None, columns), tmp_path / "columns", x[:, list(columns)])
    in_all_sizes(Permuted(source, rows, None), tmp_path / "rows", x[list(rows)])


def test_low_rank_adds_the_scaled_product(tmp_path):
    w, a, b = matrix(331, 1501), matrix(8, 1501), matrix(331, 8)
    source = LowRank(
        stored(tmp_path, "w", w), stored(tmp_path, "a", a), stored(tmp_path, "b", b), 0.5, w.shape
    )
    expected = (w.double() + 0.5 * (b.double() @ a.double())).float()
    in_all_sizes(source, tmp_path, expected, exact=False)


def test_low_rank_without_a_weight_is_the_product_alone(tmp_path):
    a, b = matrix(4, 130), matrix(21, 4)
    source = LowRank(None, stored(tmp_path, "a", a), stored(tmp_path, "b", b), 2.0, (21, 130))
    in_all_sizes(source, tmp_path, 2 * (b @ a), exact=False)


def test_projected_multiplies_from_both_sides(tmp_path):
    x, left, right = matrix(64, 300), matrix(90, 64), matrix(300, 33)
    source = Projected(
        stored(tmp_path, "x", x), stored(tmp_path, "l", left), stored(tmp_path, "r", right)
    )
    expected = (left.double() @ x.double() @ right.double()).float()
    in_all_sizes(source, tmp_path, expected, exact=False)
    assert source.shape == (90, 33)


def test_generated_zeros_and_keyed_noise(tmp_path):
    shape = (3, BLOCK + 5)
    in_all_sizes(Generated("zeros", shape), tmp_path / "zeros", torch.zeros(shape))
    source = Generated("normal", shape, key="router", seed=3, scale=0.02)
    expected = noise.normal((3, "router"), 0, 3 * (BLOCK + 5)).mul(0.02).view(shape)
    in_all_sizes(source, tmp_path / "normal", expected)
    assert expected.std() == pytest.approx(0.02, rel=0.02)


def feeding(tmp_path, method, tensors, *, base=None, dtype="F32"):
    sources = [stored(tmp_path, f"in{i}", t) for i, t in enumerate(tensors)]
    ground = None if base is None else stored(tmp_path, "ground", base)
    inner = step(method, sources, base=ground)
    return Merged(inner, dtype, sources[0].shape)


def test_a_feeding_step_stays_in_float32(tmp_path):
    a, b = matrix(97, 701, torch.bfloat16), matrix(97, 701, torch.bfloat16)
    source = feeding(tmp_path, Linear(weight=PerModel((1.0, 2.0))), [a, b])
    total = a.float() * (1 / 3) + b.float() * (2 / 3)
    in_all_sizes(source, tmp_path, total)


def test_a_feeding_step_that_names_a_dtype_is_rounded_to_it(tmp_path):
    a, b = matrix(97, 701), matrix(97, 701)
    source = feeding(tmp_path, Linear(weight=PerModel((1.0, 1.0))), [a, b], dtype="BF16")
    half = a.mul(0.5).add(b, alpha=0.5)
    in_all_sizes(source, tmp_path, half.bfloat16().float())


def test_a_feeding_step_read_twice_is_spilled_and_gives_the_same(tmp_path):
    a, b, c = (matrix(131, 701) for _ in range(3))
    inner = feeding(tmp_path, Linear(weight=PerModel((1.0, 1.0))), [a, b])
    ground = stored(tmp_path, "c", c)
    mean = a.mul(0.5).add(b, alpha=0.5)
    direct = step(Slerp(t=0.3), [stored(tmp_path, "mean", mean)], base=ground)
    nested = step(Slerp(t=0.3), [inner], base=ground)
    assert torch.equal(
        run([direct], tmp_path / "direct")["x"], run([nested], tmp_path / "nested")["x"]
    )
    assert not list((tmp_path / "nested").rglob("scratch*"))


def test_stages_nest_to_any_depth(tmp_path):
    a, b, c, d = (matrix(131, 701) for _ in range(4))
    inner = feeding(tmp_path, Slerp(t=0.5), [a], base=b)
    half = Linear(weight=PerModel((1.0, 1.0)))
    middle = Merged(step(half, [inner, stored(tmp_path, "c", c)]), "F32", a.shape)
    outer = step(Slerp(t=0.25), [middle], base=stored(tmp_path, "d", d))
    result = run([outer], tmp_path / "all")["x"]
    first = run([inner.step], tmp_path / "1")["x"]
    second = step(half, [stored(tmp_path, "s1", first), stored(tmp_path, "c2", c)])
    mean = run([second], tmp_path / "2")["x"]
    third = step(Slerp(t=0.25), [stored(tmp_path, "s2", mean)], base=stored(tmp_path, "d2", d))
    assert torch.equal(result, run([third], tmp_path / "3")["x"])
