"""What a method may demand: whole-model statistics, rows, whole tensors, several outputs."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch

from merge_kit.core.tensors import BLOCK
from merge_kit.methods.base import MergeMethod, PerModel, Scan, per_model
from merge_kit.methods.linear import Linear
from merge_kit.methods.reductions import Gram, Sum
from merge_kit.plan.sources import Merged
from tests.engine.handmade import run, step, stored

GENERATOR = torch.Generator().manual_seed(11)


def tensors(count: int, *shape: int) -> list[torch.Tensor]:
    return [torch.randn(*shape, generator=GENERATOR) for _ in range(count)]


def settings():
    return list(itertools.product((1, 2, None), (1, 2)))


def same_in_all_sizes(steps, folder):
    results = [run(steps, folder / f"{b}-{w}", blocks=b, workers=w) for b, w in settings()]
    for other in results[1:]:
        assert all(torch.equal(results[0][k], other[k]) for k in results[0])
    return results[0]


@dataclass(frozen=True, kw_only=True)
class ModelLength(MergeMethod):
    """Adds deltas divided by their length over the whole model, times a factor of each model.

    The second scan uses the first: the length of what is left after the mean delta is taken out.
    """

    needs_base: ClassVar[bool] = True
    takes_base: ClassVar[bool] = True
    operates_on: ClassVar = "deltas"
    factor: PerModel[float] = per_model(2.0)

    def scans(self) -> Sequence[Scan]:
        def centred(slab, scans):
            counts = float(scans["count"][0])
            means = scans["sum"] / counts
            return torch.stack(
                [row - float(mean) for row, mean in zip(slab.deltas, means, strict=True)]
            )

        return [
            Scan("sum", Sum(), scope="model"),
            Scan("count", Sum(), of=lambda slab, _: torch.ones_like(slab.deltas), scope="model"),
            Scan("gram", Gram(), of=centred, uses=("sum", "count"), scope="model"),
        ]

    def merge(self, slab, scans):
        factors = self.factor or [2.0] * len(slab.deltas)
        total = slab.base.clone()
        for i, (row, factor) in enumerate(zip(slab.deltas, factors, strict=True)):
            total.add_(row, alpha=factor / float(scans["gram"][i, i].sqrt()))
        return total


def test_a_statistic_over_the_whole_model_uses_earlier_ones(tmp_path):
    shapes = [(70, 1001), (3,), (5 * BLOCK + 7,), ()]
    bases = [torch.randn(s, generator=GENERATOR) for s in shapes]
    models = [[torch.randn(s, generator=GENERATOR) for s in shapes] for _ in range(2)]
    method = ModelLength(factor=PerModel((2.0, 3.0)))
    steps = [
        step(
            method,
            [stored(tmp_path, f"m{m}-{i}", models[m][i]) for m in range(2)],
            base=stored(tmp_path, f"b{i}", bases[i]),
            name=f"t{i}",
        )
        for i in range(len(shapes))
    ]
    result = same_in_all_sizes(steps, tmp_path)
    flat = [
        torch.cat([(m[i] - bases[i]).flatten().double() for i in range(len(shapes))])
        for m in models
    ]
    lengths = [(f - f.mean()).norm() for f in flat]
    for i, base in enumerate(bases):
        wanted = base.double()
        for m, factor, length in zip(models, (2.0, 3.0), lengths, strict=True):
            wanted = wanted + factor / length * (m[i] - base).double()
        torch.testing.assert_close(result[f"t{i}"].double(), wanted, rtol=1e-6, atol=1e-6)


def test_a_whole_model_statistic_over_a_feeding_stage(tmp_path):
    base, a, b = tensors(3, 90, 1001)
    sources = [stored(tmp_path, n, t) for n, t in (("a", a), ("b", b))]
    inner = Merged(step(Linear(weight=PerModel((1.0, 1.0))), sources), "F32", base.shape)
    method = ModelLength(factor=PerModel((2.0,)))
    ground = stored(tmp_path, "base", base)
    nested = same_in_all_sizes([step(method, [inner], base=ground)], tmp_path / "n")["x"]
    mean = stored(tmp_path, "mean", a.mul(0.5).add(b, alpha=0.5))
    assert torch.equal(nested, run([step(method, [mean], base=ground)], tmp_path / "d")["x"])


@dataclass(frozen=True, kw_only=True)
class RowMaximum(MergeMethod):
    """Takes, row by row, the model whose row has the largest magnitude; and scans rows too."""

    grain: ClassVar = "row"

    def scans(self) -> Sequence[Scan]:
        return [Scan("sum", Sum())]

    def merge(self, slab, scans):
        rows = [model.view(-1, slab.columns) for model in slab.tensors]
        peaks = torch.stack([row.abs().amax(dim=1) for row in rows])
        best = peaks.argmax(dim=0)
        out = rows[0].clone()
        for i, row in enumerate(rows):
            out[best == i] = row[best == i]
        return out.flatten() + float(scans["sum"][0])


@pytest.mark.parametrize("shape", [(700, 301), (9, 70_001), (12,), (), (3, 5, 7)])
def test_row_grain_sees_whole_rows(tmp_path, shape):
    models = [torch.randn(shape, generator=GENERATOR) for _ in range(3)]
    one = step(RowMaximum(), [stored(tmp_path, f"m{i}", m) for i, m in enumerate(models)])
    result = same_in_all_sizes([one], tmp_path)["x"]
    columns = shape[-1] if shape else 1
    stack = torch.stack([m.reshape(-1, columns) for m in models])
    best = stack.abs().amax(dim=2).argmax(dim=0)
    wanted = torch.stack([stack[int(b), r] for r, b in enumerate(best)]).reshape(shape)
    shift = float(models[0].double().sum())
    torch.testing.assert_close(result, wanted + shift, rtol=1e-6, atol=1e-4)


@dataclass(frozen=True, kw_only=True)
class SplitLowRank(MergeMethod):
    """Writes the rank-1 part of the mean matrix and the rest, as two tensors."""

    grain: ClassVar = "tensor"
    outputs: ClassVar[int] = 2

    def scratch_bytes(self, models, elements):
        return 24 * elements

    def merge(self, slab, scans):
        shape = slab.shape
        mean = (slab.tensors[0].view(shape) + slab.tensors[1].view(shape)) / 2
        u, s, v = torch.linalg.svd(mean.double(), full_matrices=False)
        first = (s[0] * u[:, :1] @ v[:1]).to(mean.dtype)
        return [first, mean - first]


def test_tensor_grain_sees_whole_tensors_and_writes_several(tmp_path):
    a, b = tensors(2, 60, 41)
    sources = [stored(tmp_path, n, t) for n, t in (("a", a), ("b", b))]
    one = step(SplitLowRank(), sources, shapes=[(60, 41), (60, 41)], dtype="F32")
    result = same_in_all_sizes([one], tmp_path)
    mean = (a + b) / 2
    assert torch.linalg.matrix_rank(result["x.0"], rtol=1e-5) == 1
    torch.testing.assert_close(result["x.0"] + result["x.1"], mean)
    assert result["x.1"].norm() < mean.norm()


@dataclass(frozen=True, kw_only=True)
class HalfAndHalf(MergeMethod):
    """Writes half of the input to each of two outputs, slab by slab, plus an importance."""

    outputs: ClassVar[int] = 2

    def merge(self, slab, scans):
        half = slab.tensors[0] * 0.5
        return [half, half * slab.aux["importance"]]


def test_element_grain_writes_several_outputs_and_reads_further_operands(tmp_path):
    x, importance = tensors(2, 3, BLOCK + 9)
    one = step(
        HalfAndHalf(),
        [stored(tmp_path, "x", x)],
        shapes=[x.shape, x.shape],
        aux=(("importance", stored(tmp_path, "i", importance)),),
    )
    result = same_in_all_sizes([one], tmp_path)
    assert torch.equal(result["x.0"], x * 0.5)
    assert torch.equal(result["x.1"], x * 0.5 * importance)


@pytest.mark.parametrize("models", [2, 8, 50])
@pytest.mark.parametrize("extra", [1, 2, 15, 16, 17, 31])
def test_slabs_and_threads_change_no_bit(tmp_path, models, extra):
    inputs = tensors(models, BLOCK + extra)
    weights = torch.rand(models, generator=GENERATOR).tolist()
    sources = [stored(tmp_path, f"m{i}", t) for i, t in enumerate(inputs)]
    wide = "F64" if models > 4 else "F32"
    one = step(Linear(weight=PerModel(weights)), sources, compute=wide)
    same_in_all_sizes([one], tmp_path)
