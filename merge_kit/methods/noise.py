"""Random numbers that depend on seed, model, tensor and element only.

Each block of BLOCK elements has its own stretch of a Philox counter, so that slabs of any size
and threads in any order draw the same numbers.
"""

from __future__ import annotations

from collections.abc import Iterator
from hashlib import blake2b
from typing import TYPE_CHECKING, Any

from merge_kit.core.tensors import BLOCK
from merge_kit.methods.lazy import np, torch

if TYPE_CHECKING:
    from torch import Tensor


def _generators(
    key: tuple[object, ...], start: int, stop: int
) -> Iterator[tuple[Any, int, int, int]]:
    """Yield (generator, first, last, position in the output) for each block in a range."""
    digest = blake2b(repr(key).encode(), digest_size=16).digest()
    for block in range(start // BLOCK, -(-stop // BLOCK)):
        philox = np.random.Philox(key=int.from_bytes(digest, "little"), counter=block << 64)
        first, last = max(start - block * BLOCK, 0), min(stop - block * BLOCK, BLOCK)
        yield np.random.Generator(philox), first, last, block * BLOCK + first - start


def uniform(key: tuple[object, ...], start: int, stop: int) -> Tensor:
    """Return float32 in [0, 1) for the elements [start, stop) of the tensor named by key.

    Args:
        key: Any values with a stable repr: seed, position of the model, name of the tensor.
    """
    out = torch.empty(stop - start, dtype=torch.float32)
    for generator, first, last, at in _generators(key, start, stop):
        drawn = generator.random(last, dtype=np.float32)[first:]
        out[at : at + last - first] = torch.from_numpy(drawn)
    return out


def normal(key: tuple[object, ...], start: int, stop: int) -> Tensor:
    """Return standard normal float32 for the elements [start, stop) of the tensor named by key."""
    out = torch.empty(stop - start, dtype=torch.float32)
    for generator, first, last, at in _generators(key, start, stop):
        drawn = generator.standard_normal(last, dtype=np.float32)[first:]
        out[at : at + last - first] = torch.from_numpy(drawn)
    return out
