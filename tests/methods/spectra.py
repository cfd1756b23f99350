"""Task vectors with spectra that are hard, and what spectral methods make of them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from tests.methods.slabs import slab_of


def normal(count: int, *shape: int) -> list[Tensor]:
    """Return random tensors of float64, different for every count and shape."""
    generator = torch.Generator().manual_seed(count + sum(shape))
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(count)]


def low_rank(count: int, size: int, rank: int) -> list[Tensor]:
    """Return products of (size, rank) and (rank, size)."""
    lefts, rights = normal(count, size, rank), normal(count, rank, size + 1)
    return [a @ b[:, :size] / size**0.5 for a, b in zip(lefts, rights, strict=True)]


def noisy(deltas: Sequence[Tensor], size: float) -> list[Tensor]:
    """Return task vectors plus noise of full rank."""
    generator = torch.Generator().manual_seed(5)
    return [d + size * torch.randn(d.shape, generator=generator, dtype=d.dtype) for d in deltas]


def task_vector(method, deltas, base=None, *, name="x") -> Tensor:
    """Return what a method adds to a base, by default zero."""
    shape = tuple(deltas[0].shape)
    start = torch.zeros(shape, dtype=torch.float64) if base is None else base
    slab = slab_of(deltas, start.flatten().clone(), shape=shape, name=name)
    return method.merge(slab, {}).view(shape) - start


def apart(result: Tensor, wanted: Tensor) -> float:
    """Return the length of the difference, relative to the length of what is wanted."""
    return float((result - wanted).norm() / wanted.norm())
