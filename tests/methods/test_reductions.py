"""Statistics do not depend on where rows lie in memory, nor on how many lie together."""

from __future__ import annotations

import pytest
import torch

from merge_kit.core.tensors import BLOCK
from merge_kit.methods import ops
from merge_kit.methods.reductions import Angle, Done, Gram, Place, Sum

LENGTHS = (13, 100, 4099, BLOCK)


def at(values, first: int, skew: int):
    """Return rows that begin at another place of a cache line, and lie apart."""
    count, length = values.shape
    stride = length + skew
    memory = torch.empty(first + count * stride, dtype=values.dtype)
    placed = memory.as_strided((count, length), (stride, 1), first)
    return placed.copy_(values)


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("reduction", [Gram(), Sum(), Angle()], ids=["gram", "sum", "angle"])
def test_a_sum_is_the_same_at_every_address(reduction, length):
    values = torch.randn(2, length, generator=torch.Generator().manual_seed(2)).double()
    values[1] -= values[0]  # the angle is wide: a second pass
    found = []
    for first in range(8):
        for skew in range(0, 8, 3):
            carry = None
            while True:
                total = reduction.accumulator(carry)
                total.add(at(values, first, skew), Place("x", 0, length))
                outcome = reduction.finish(total, carry)
                if isinstance(outcome, Done):
                    break
                carry = outcome.carry
            found.append(torch.as_tensor(outcome.result, dtype=torch.float64))
    assert all(torch.equal(found[0], other) for other in found)


@pytest.mark.parametrize("columns", [1, 2, 3, 5, 37, 8193, 32_781])
def test_the_angle_of_a_row_is_the_same_alone_and_among_others(columns):
    generator = torch.Generator().manual_seed(columns)
    left, right = (
        torch.randn(7, columns, generator=generator, dtype=torch.float64) for _ in range(2)
    )
    together = ops.row_angles(left, right)
    kept = left.clone()
    for i in range(7):
        for rows in (slice(i, i + 1), slice(i, 7)):
            assert ops.row_angles(left[rows], right[rows])[0] == together[i]
    assert torch.equal(left, kept)
