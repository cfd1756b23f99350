"""Random numbers that depend on seed, model, tensor and element only.

A key names a stream of a generator that can go to any place of it (of PCG64-DXSM, the quickest of
numpy's that is made for many streams), so that slabs of any size and threads in any order draw the
same numbers.
"""

from __future__ import annotations

import threading
from hashlib import blake2b
from math import pi
from typing import TYPE_CHECKING, Any

from merge_kit.core.tensors import BLOCK
from merge_kit.methods.lazy import np, torch

if TYPE_CHECKING:
    from torch import Tensor

Key = tuple[object, ...]
"""Any values with a stable repr: seed, method, position of the model, name of the tensor."""

WORD_BITS = 64
"""Random bits of one word of a stream."""

COARSE = 2.0**-8
"""Probabilities this close to 0 or 1 take draws of 32 bits, others of 16."""

UNIFORM_BITS = 24
"""Random bits of a uniform float32: as many as make it exact."""

_THREAD = threading.local()


def normal(key: Key, start: int, stop: int) -> Tensor:
    """Return standard normal float32 for the elements [start, stop) of the tensor named by key.

    They are made in pairs, by the transform of Box and Muller, of blocks that are always whole: the
    functions of a vector may round by an element's place in it. Radii are of 31 bits, angles of 32.
    """
    out = torch.empty(stop - start, dtype=torch.float32)
    for block in range(start // BLOCK, -(-stop // BLOCK)):
        first, last = max(start, block * BLOCK), min(stop, (block + 1) * BLOCK)
        drawn = _normal_block(key, block)
        out[first - start : last - start] = drawn[first - block * BLOCK : last - block * BLOCK]
    return out


def _normal_block(key: Key, block: int) -> Tensor:
    half = BLOCK // 2
    words = draws(key, block * BLOCK, (block + 1) * BLOCK, 32)
    positive = (words[:half] >> np.uint32(1)).view(np.int32)
    radius = torch.from_numpy(positive).float().add_(1).mul_(2.0**-31).log_().mul_(-2).sqrt_()
    angle = torch.from_numpy(words[half:].view(np.int32)).float().mul_(pi * 2.0**-31)
    drawn = torch.empty(BLOCK, dtype=torch.float32)
    torch.cos(angle, out=drawn[:half]).mul_(radius)
    torch.sin(angle, out=drawn[half:]).mul_(radius)
    return drawn


def uniform(key: Key, start: int, stop: int) -> Tensor:
    """Return even float32 between -1 and 1 for the elements [start, stop) of the tensor of a key.

    They are the 2^24 numbers (2k + 1) / 2^24 - 1: all exact, symmetric, neither -1 nor 1.
    """
    drawn = draws(key, start, stop, 32) >> np.uint32(32 - UNIFORM_BITS)
    odd = drawn.astype(np.int32) * 2 + (1 - 2**UNIFORM_BITS)
    return torch.from_numpy(odd.astype(np.float32)).mul_(2.0**-UNIFORM_BITS)


def draws(key: Key, start: int, stop: int, bits: int = 16) -> Any:
    """Return random integers for the elements [start, stop) of the tensor named by key.

    Args:
        key: Names the stream.
        bits: Of each number, 16 or 32; streams of 16 and of 32 hold the same bits.

    Returns:
        (stop - start,), numpy uint16 or uint32.
    """
    each = WORD_BITS // bits
    word = start // each
    words = _stream(key, word).random_raw(-(-stop // each) - word)
    numbers = words.view(np.uint16 if bits == 16 else np.uint32)
    return numbers[start - word * each : stop - word * each]


def _stream(key: Key, word: int) -> Any:
    """Return this thread's generator, set to a word of a stream: quicker than making one."""
    if not hasattr(_THREAD, "generator"):
        _THREAD.generator = np.random.PCG64DXSM(0)
    digest = blake2b(repr(key).encode(), digest_size=32).digest()
    state, stream = (int.from_bytes(half, "little") for half in (digest[:16], digest[16:]))
    _THREAD.generator.state = {
        "bit_generator": "PCG64DXSM",
        "state": {"state": state, "inc": stream | 1},
        "has_uint32": 0,
        "uinteger": 0,
    }
    return _THREAD.generator.advance(word)


def threshold(chance: float) -> tuple[int, int]:
    """Return the integer of which draws are smaller with this probability, and the draws' bits.

    The probability is rounded to a multiple of 2^-16 (2^-32 if it is close to 0 or 1), never to 0
    or 1: the exact one is threshold / 2^bits.

    Args:
        chance: Above 0 and below 1.
    """
    bits = 32 if min(chance, 1 - chance) < COARSE else 16
    return min(max(round(chance * 2**bits), 1), 2**bits - 1), bits


def thresholds(chances: Any) -> tuple[Any, int]:
    """Return `threshold` of many probabilities, all for draws of the same bits.

    Args:
        chances: (n,), numpy float64, in ascending order.

    Returns:
        (n,), numpy uint16 or uint32, and the bits.
    """
    bits = max(threshold(float(chances[0]))[1], threshold(float(chances[-1]))[1])
    below = np.rint(chances * 2.0**bits).clip(1, 2**bits - 1)
    return below.astype(np.uint16 if bits == 16 else np.uint32), bits


def probability(density: float) -> float:
    """Return the exact probability with which `kept` keeps an element, for a density in [0, 1]."""
    if density in {0, 1}:
        return float(density)
    below, bits = threshold(density)
    return below / 2.0**bits


def kept(key: Key, density: float, start: int, stop: int) -> Any:
    """Return which of the elements [start, stop) of the tensor named by key are kept at random.

    Args:
        key: Names the stream.
        density: Probability of keeping, in [0, 1]; 0 keeps nothing, 1 everything, without draws.

    Returns:
        (stop - start,), numpy bool; the exact probability is `probability(density)`.
    """
    if density in {0, 1}:
        return np.full(stop - start, density == 1)
    below, bits = threshold(density)
    return draws(key, start, stop, bits) < below
