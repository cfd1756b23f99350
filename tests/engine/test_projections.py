"""Matrices times factors, strip by strip: the definition, and the same bits for every slab."""

from __future__ import annotations

import itertools

import pytest
import torch

from merge_kit.core.tensors import BLOCK
from merge_kit.engine.kernel import Kernel
from merge_kit.engine.workspace import Workspace
from merge_kit.io.reader import Reader
from merge_kit.methods.passthrough import Passthrough
from merge_kit.methods.slerp import Slerp
from merge_kit.plan import cost, residency
from merge_kit.plan.sources import (
    Concat,
    Found,
    Merged,
    Projected,
    Rows,
    Scaled,
    Transposed,
    View,
)
from tests.engine.handmade import run, step, stored

GENERATOR = torch.Generator().manual_seed(5)
SIZES = tuple(itertools.product((1, 2, None), (1, 2)))
"""Blocks of a slab, workers."""


def normal(*shape, dtype=torch.float32):
    return torch.randn(*shape, generator=GENERATOR).to(dtype)


def read(source, folder, *, dtype="F32"):
    """Return what a source yields, the same bits for every slab size and number of threads."""
    found = [
        run(
            [step(Passthrough(), [source], dtype=dtype)],
            folder / f"{blocks}-{workers}",
            blocks=blocks,
            workers=workers,
        )["x"]
        for blocks, workers in SIZES
    ]
    assert all(torch.equal(found[0], other) for other in found[1:])
    return found[0]


def close(found, oracle, magnitudes):
    """Hold values to one rounding to float32: sums are in float64."""
    assert bool(((found.double() - oracle).abs() <= 2.0**-24 * magnitudes + 1e-30).all())


@pytest.mark.parametrize(
    ("rows", "columns", "wide"),
    [(3000, 401, 130), (130, 401, 3000), (1, 5, 3), (20_001, 7, 5), (5, 70_001, 4)],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_right_factor_streams_rows(rows, columns, wide, dtype, tmp_path):
    x, right = normal(rows, columns, dtype=dtype), normal(columns, wide)
    source = Projected(stored(tmp_path, "x", x), None, stored(tmp_path, "r", right))
    x, right = x.double(), right.double()
    close(read(source, tmp_path), x @ right, x.abs() @ right.abs())


@pytest.mark.parametrize(
    ("wide", "rows", "columns"),
    [(3000, 401, 130), (130, 401, 3000), (3, 5, 1), (7, 20_001, 5), (4, 5, 70_001)],
)
def test_a_left_factor_reads_blocks(wide, rows, columns, tmp_path):
    x, left = normal(rows, columns), normal(wide, rows)
    source = Projected(stored(tmp_path, "x", x), stored(tmp_path, "l", left), None)
    x, left = x.double(), left.double()
    close(read(source, tmp_path), left @ x, left.abs() @ x.abs())


def test_factors_of_both_sides(tmp_path):
    x, left, right = normal(1101, 301), normal(700, 1101), normal(301, 503)
    sources = (stored(tmp_path, name, t) for name, t in (("x", x), ("l", left), ("r", right)))
    found = read(Projected(*sources), tmp_path)
    x, left, right = x.double(), left.double(), right.double()
    close(found, left @ x @ right, left.abs() @ x.abs() @ right.abs())


def test_several_matrices_one_after_the_other_are_each_projected(tmp_path):
    x, left = normal(3, 300, 500), normal(200, 300)
    whole, factor = stored(tmp_path, "x", x), stored(tmp_path, "l", left)
    parts = [Projected(View(whole, i * 150_000, (300, 500)), factor, None) for i in range(3)]
    found = read(View(Concat(tuple(parts)), 0, (3, 200, 500)), tmp_path)
    close(found, left.double() @ x.double(), left.double().abs() @ x.double().abs())


def test_a_column_is_a_matrix(tmp_path):
    bias, left = normal(300), normal(500, 300)
    column = View(stored(tmp_path, "b", bias), 0, (300, 1))
    found = read(View(Projected(column, stored(tmp_path, "l", left), None), 0, (500,)), tmp_path)
    close(found, left.double() @ bias.double(), left.double().abs() @ bias.double().abs())


def test_a_projection_of_other_sources_and_of_an_earlier_stage(tmp_path):
    x, other, right = normal(700, 300), normal(700, 300), normal(300, 90)
    inner = step(Slerp(t=0.0), [stored(tmp_path, "o", other)], base=stored(tmp_path, "x", x))
    stage = Merged(inner, "F32", x.shape)
    rows = tuple(range(699, -1, -1))
    found = read(Projected(Rows(stage, rows), None, stored(tmp_path, "r", right)), tmp_path)
    x, right = x.flip(0).double(), right.double()
    close(found, x @ right, 4 * x.abs() @ right.abs())


@pytest.mark.parametrize(("rows", "columns"), [(1000, 333), (3, 2 * BLOCK + 1), (1, 1)])
def test_columns_are_multiplied(rows, columns, tmp_path):
    x, factors = normal(rows, columns, dtype=torch.bfloat16), normal(columns)
    source = Scaled(stored(tmp_path, "x", x), stored(tmp_path, "f", factors))
    assert torch.equal(read(source, tmp_path), x.float() * factors)
    assert source.shape == x.shape


def test_scaled_columns_inside_a_product_are_scaled_in_float64(tmp_path):
    x, factors, right = normal(600, 300), normal(300), normal(300, 200)
    scaled = Scaled(stored(tmp_path, "x", x), stored(tmp_path, "f", factors))
    found = read(Projected(scaled, None, stored(tmp_path, "r", right)), tmp_path)
    exact = x.double() * factors.double()
    close(found, exact @ right.double(), exact.abs() @ right.double().abs())


def slabs_of(source, found, elements):
    """Return a source read slab by slab with what was found, and what its reader keeps."""
    with Reader([]) as reader:
        operands, work = Kernel(reader, found=found).operands, Workspace()
        out = torch.empty(source.shape).view(-1)
        for start in range(0, len(out), elements):
            stop = min(start + elements, len(out))
            operands.read(source, start, stop, out[start:stop], work)
    kept = [t for k in work.kept.values() for t in (k if isinstance(k, list) else [k])]
    return out.view(source.shape), sum(t.nbytes for t in kept if isinstance(t, torch.Tensor))


@pytest.mark.parametrize("side", ["left", "right", "both"])
@pytest.mark.parametrize("elements", [BLOCK, 3 * BLOCK])
def test_what_was_found_is_used_where_it_is_and_the_rest_is_billed(side, elements, tmp_path):
    x, factor = normal(600, 600), normal(900, 600, dtype=torch.float64)
    onto = Found("basis", "onto", factor.shape)
    left = onto if side != "right" else None
    right = Transposed(onto) if side != "left" else None
    source = Projected(stored(tmp_path, "x", x), left, right)
    found, kept = slabs_of(source, {"basis": {"onto": factor}}, elements)
    exact = x.double()
    exact = exact if left is None else factor @ exact
    exact = exact if right is None else exact @ factor.T
    torch.testing.assert_close(found.double(), exact, rtol=1e-6, atol=1e-3)
    assert kept == residency.kept_bytes(source, 4)


def test_factors_that_are_read_are_kept_and_billed(tmp_path):
    x, left, right = normal(900, 500), normal(700, 900), normal(500, 300)
    sources = (stored(tmp_path, name, t) for name, t in (("x", x), ("l", left), ("r", right)))
    source = Projected(*sources)
    _, kept = slabs_of(source, {}, BLOCK)
    assert kept == residency.kept_bytes(source, 4)


class Counting(Reader):
    """Counts the bytes that are read."""

    total = 0

    def read_into(self, path, start, buffer):
        self.total += len(buffer)
        super().read_into(path, start, buffer)


@pytest.mark.parametrize("side", ["left", "right"])
def test_the_bill_names_the_bytes_that_are_read(side, tmp_path):
    x, factor = normal(1200, 1100), normal(1200, 1200, dtype=torch.float64)
    onto = Found("basis", "onto", (1200, 1200))
    whole = stored(tmp_path, "x", x if side == "left" else x.T)
    source = Projected(whole, onto, None) if side == "left" else Projected(whole, None, onto)
    one = cost.sized(step(Passthrough(), [source]), None)
    with Counting([]) as reader:
        operands, work = Kernel(reader, found={"basis": {"onto": factor}}).operands, Workspace()
        out = torch.empty(source.shape).view(-1)
        for start in range(0, len(out), BLOCK):
            stop = min(start + BLOCK, len(out))
            operands.read(source, start, stop, out[start:stop], work)
    assert reader.total == cost.read_bytes(one)
    assert (reader.total > x.nbytes) == (side == "left")
