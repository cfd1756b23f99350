"""Slabs of factors and of dense changes, made by hand, for tests of methods that make adapters."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from merge_kit.methods.base import Slab

Pair = tuple[Tensor, Tensor]
"""a (rank, in) and b (out, rank), float64."""


def pair(rank: int, shape: tuple[int, int], seed: int = 0) -> Pair:
    """Return random factors of a change of this shape, of numbers that float32 holds."""
    draw = torch.Generator().manual_seed(1000 * seed + rank)
    a, b = torch.randn(rank, shape[1], generator=draw), torch.randn(shape[0], rank, generator=draw)
    return a.double(), b.double()


def diagonal(*values: float) -> Pair:
    """Return factors of the diagonal matrix of these values."""
    size = len(values)
    return torch.diag(torch.tensor(values, dtype=torch.float64)), torch.eye(size).double()


def change(one: Pair) -> Tensor:
    return one[1] @ one[0]


def total(pairs: Sequence[Pair], weights: Sequence[float]) -> Tensor:
    """Return the weighted sum of changes."""
    return sum(w * change(p) for p, w in zip(pairs, weights, strict=True))


def factor_slab(
    pairs: Sequence[Pair], weights: Sequence[float], ranks: Sequence[int] = (), dtype: str = "F64"
) -> Slab:
    """Return a slab of factors, whose weights are the coefficients of each adapter that is made."""
    aux = {}
    for i, (a, b) in enumerate(pairs):
        aux |= {f"a{i}": a.flatten().clone(), f"b{i}": b.flatten().clone()}
    return Slab(
        tensors=torch.empty(0, 0, dtype=torch.float64),
        base=None,
        weights=tuple(weights),
        name="x.lora_A.weight",
        shape=(pairs[0][1].shape[0], pairs[0][0].shape[1]),
        models=tuple(f"input-{i + 1}" for i in range(len(pairs))),
        offset=0,
        seed=0,
        aux=aux,
        ranks=tuple(ranks),
        stored_dtype=dtype,
    )


def dense_slab(matrix: Tensor, ranks: Sequence[int] = (), dtype: str = "F64") -> Slab:
    """Return a slab of one whole change."""
    return Slab(
        tensors=matrix.flatten().clone().unsqueeze(0),
        base=None,
        weights=(1.0,),
        name="x.lora_A.weight",
        shape=tuple(matrix.shape),
        models=("input-1",),
        offset=0,
        seed=0,
        aux={},
        ranks=tuple(ranks),
        stored_dtype=dtype,
    )


def made(method, slab: Slab) -> list[Pair]:
    """Return the factors of each adapter that is made."""
    tensors = method.merge(slab, {}).tensors
    return list(zip(tensors[::2], tensors[1::2], strict=True))


def summed(method, pairs, weights, rank, dtype="F64") -> Tensor:
    """Return the change of the one adapter that is made."""
    (one,) = made(method, factor_slab(pairs, weights, (rank,), dtype))
    return change(one)


def close(found: Tensor, wanted: Tensor, size: float, share: float = 1e-12) -> bool:
    """Return whether two changes differ by no more than a share of a length."""
    return float((found - wanted).norm()) <= share * size
