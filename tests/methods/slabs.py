"""Slabs made by hand, for tests that call a method's `merge` directly."""

from __future__ import annotations

from math import prod

import torch

from merge_kit.methods.base import Slab


def slab_of(deltas, base=None, *, shape=None, offset=0, seed=0, name="x") -> Slab:
    """Return a slab of models minus base; the deltas are copied, as methods overwrite them."""
    deltas = torch.stack([torch.as_tensor(row).flatten() for row in deltas]).clone()
    if not deltas.is_floating_point():
        deltas = deltas.float()
    count = deltas.shape[1]
    shape = (count,) if shape is None else shape
    assert offset + count <= max(prod(shape), 1)
    return Slab(
        tensors=deltas,
        base=torch.zeros(count, dtype=deltas.dtype) if base is None else base,
        weights=(1.0,) * len(deltas),
        name=name,
        shape=shape,
        models=tuple(f"input-{i + 1}" for i in range(len(deltas))),
        offset=offset,
        seed=seed,
        aux={},
    )
