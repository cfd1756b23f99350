"""Slabs of factors: the sums of the adapters in them, the factors that are yielded, the facts."""

from __future__ import annotations

from collections.abc import Sequence
from math import hypot, isfinite, nan, sqrt
from typing import TYPE_CHECKING

from merge_kit.core.dtypes import DTYPES
from merge_kit.methods.base import Yield
from merge_kit.methods.lazy import torch
from merge_kit.methods.low_rank import Change, decompose, length, rank_of, spanned, split
from merge_kit.methods.rounding import round_into
from merge_kit.methods.updates import Spectrum, Work

if TYPE_CHECKING:
    from torch import Tensor

    from merge_kit.methods.base import Slab

NOISE = 2.0**-24
"""Singular values below this share of the length of what is added are rounding of float32."""

NOISE_OF_FLOAT64 = 2.0**-46
"""The same for float64, with what decompositions round."""


def noise(slab: Slab) -> float:
    """Return the share of what is added that is rounding: of float32, or of float64 factors."""
    return NOISE_OF_FLOAT64 if slab.stored_dtype == "F64" else NOISE


def factors(slab: Slab) -> list[tuple[Tensor, Tensor]]:
    """Return a (rank, in) and b (out, rank) of each change, with its scale in b."""
    out, columns = slab.shape
    found = []
    for i in range(len(slab.aux) // 2):
        a, b = slab.aux[f"a{i}"], slab.aux[f"b{i}"]
        rank = a.numel() // columns if columns else b.numel() // max(out, 1)
        found.append((a.double().view(rank, columns), b.double().view(out, rank)))
    return found


def are_finite(slab: Slab) -> bool:
    """Return whether no factor has an element that is NaN or infinite."""
    return all(bool(torch.isfinite(factor).all()) for factor in slab.aux.values())


def is_finite(change: Change) -> bool:
    """Return whether a change is within float64: weights and scales may take it beyond."""
    return isfinite(change.floor) and bool(torch.isfinite(change.core).all())


def uses(slab: Slab) -> list[tuple[float, ...]]:
    """Return the coefficients of the changes for each adapter that is made."""
    changes = len(slab.aux) // 2
    return [slab.weights[i : i + changes] for i in range(0, len(slab.weights), changes)]


def sums(slab: Slab) -> list[Change]:
    """Return sum(c_i b_i a_i) for each adapter that is made; they share their bases."""
    found, share = spanned(factors(slab)), noise(slab)
    return [found.sum(coefficients, share) for coefficients in uses(slab)]


def fitted(
    changes: Sequence[Change], name: str, rank: int | None, energy: float | None
) -> list[Spectrum]:
    """Return the rank that `rank_of` finds for each change, and its norm.

    A change that overflows has the most that it may have: what is written shows it.
    """
    found = []
    for change in changes:
        if not is_finite(change):
            most = min(change.core.shape)
            found.append(Spectrum(most if rank is None else min(rank, most), nan))
            continue
        values = decompose(change, name).values
        found.append(Spectrum(rank_of(values, rank, energy), length(change.core)))
    return found


def truncated(changes: Sequence[Change], slab: Slab) -> Yield:
    """Return a and b of each change, of the ranks that the slab names, and what they miss.

    Those of a change that overflows are NaN.
    """
    tensors: list[Tensor] = []
    facts: list[dict[str, float]] = []
    for change, rank in zip(changes, slab.ranks, strict=True):
        if not is_finite(change):
            tensors += _nans(slab, rank)
            facts.append({})
            continue
        a, b = split(change, decompose(change, slab.name).first(rank), rank)
        facts.append(measured(change, a, b, slab.stored_dtype))
        tensors += [a, b]
    return Yield(tensors, facts)


def measured(change: Change, a: Tensor, b: Tensor, dtype: str) -> dict[str, float]:
    """Return the norm of a change, and that of what factors miss of it once they are rounded.

    Of the rounded factors b = left B + E and a^T = right A + F, with E and F orthogonal to the
    bases, the four terms of left (core - B A^T) right^T - left B F^T - E A^T right^T - E F^T are
    orthogonal: the length of the whole takes no difference of large squares.
    """
    kept, lost = _inside(change.left, rounded(b, dtype))
    kept_a, lost_a = _inside(change.right, rounded(a, dtype).T)
    within = length(change.core - kept @ kept_a.T)
    beside = (_product(kept, lost_a), _product(lost, kept_a), _product(lost, lost_a))
    return finite({"norm": length(change.core), "residual": hypot(within, *beside)})


def finite(facts: dict[str, float]) -> dict[str, float]:
    """Return the facts that are numbers: factors beyond the range of their dtype miss no number."""
    return {name: value for name, value in facts.items() if isfinite(value)}


def rounded(factor: Tensor, dtype: str) -> Tensor:
    """Return a factor as a dtype holds it, in float64."""
    held = torch.empty(factor.shape, dtype=getattr(torch, DTYPES[dtype].torch_name))
    round_into(factor, held)
    return held.double()


def _inside(basis: Tensor, columns: Tensor) -> tuple[Tensor, Tensor]:
    """Return the coordinates of columns in a basis, and what lies outside of it."""
    inner = basis.T @ columns
    return inner, columns - basis @ inner


def _product(left: Tensor, right: Tensor) -> float:
    """Return the norm of left @ right^T for tall matrices, one of them of rounding."""
    return sqrt(max(0.0, float(((left.T @ left) * (right.T @ right)).sum())))


def not_finite(slab: Slab) -> Yield:
    """Return factors of NaN, where the engine sees what the operands hold."""
    tensors = [factor for rank in slab.ranks for factor in _nans(slab, rank)]
    return Yield(tensors, [{}] * len(slab.ranks))


def _nans(slab: Slab, rank: int) -> list[Tensor]:
    out, columns = slab.shape
    shapes = (rank, columns), (out, rank)
    return [torch.full(shape, nan, dtype=torch.float64) for shape in shapes]


def no_spectra(slab: Slab) -> list[Spectrum]:
    """Return what is known of factors that are not finite: a norm that is no number.

    They are written, and counted, with all directions that they may have.
    """
    return [Spectrum(rank, nan) for rank in slab.ranks]


def work(shape: tuple[int, int], ranks: Sequence[int], made: Sequence[int]) -> Work:
    """Return what sums take: stacked factors, their bases, and what rounded factors miss."""
    sides, total = sum(shape), sum(ranks)
    core = min(total, max(shape))
    held = sides * (3 * total + 3 * max(made, default=0)) + 8 * core**2
    flops = 4.0 * sides * total**2 + len(made) * 20.0 * core**3
    return Work(8 * held, flops + sum(6.0 * sides * core * rank for rank in made))
