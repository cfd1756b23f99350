"""Finds in which order the experts of a model fit those of another one best."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from math import fsum

import torch
from torch import Tensor

from merge_kit.engine.operands import Operands
from merge_kit.engine.products import forget
from merge_kit.engine.workspace import Workspace
from merge_kit.errors import InterruptedRun, NonFiniteError
from merge_kit.plan.building.matching_task import DISTANCE, ORDER, ExpertMatching, Slot


def match_experts(
    task: ExpertMatching, operands: Operands, stop: threading.Event
) -> Mapping[str, Tensor]:
    """Return the order, and how far each matched pair is apart.

    Differences from the reference's first expert are multiplied instead of the weights: no order
    gains or loses by that, and what all experts have in common takes no digits.

    Raises:
        NonFiniteError: If an expert holds NaN or infinity.
        InterruptedRun: If `stop` was set.
    """
    sums, work = _Sums(task.count), Workspace()
    held = torch.empty(2, task.count, task.longest, dtype=torch.float64)
    for part in task.parts:
        for start in range(0, part.size, task.longest):
            if stop.is_set():
                raise InterruptedRun(2, hint="run the same command again to go on from here")
            end = min(start + task.longest, part.size)
            sides = held[:, :, : end - start]
            for rows, slots in zip(sides, (part.reference, part.model), strict=True):
                _read(operands, slots, (start, end), rows, work)
            sums.add(sides[0], sides[1])
    if not bool(torch.isfinite(sums.products).all()):
        raise NonFiniteError(
            "experts hold NaN or infinity, or numbers too large to be compared",
            where=task.where,
            hint="`mergekit inspect` finds the tensors of a model that are not finite",
        )
    order = best_order(sums.products)
    return {ORDER: torch.tensor(order), DISTANCE: sums.distances(order)}


class _Sums:
    """What is summed over the elements of experts, in float64."""

    def __init__(self, count: int) -> None:
        kind = torch.float64
        self.products = torch.zeros(count, count, dtype=kind)  # (reference, model)
        self._lengths = torch.zeros(count, dtype=kind)  # of the reference's weights, squared
        self._ours = torch.zeros(count, dtype=kind)  # of differences, squared
        self._theirs = torch.zeros(count, dtype=kind)

    def add(self, reference: Tensor, model: Tensor) -> None:
        """Add a run of elements, (experts, elements) of each side; both are overwritten."""
        self._lengths += _squares(reference)
        common = reference[0].clone()
        reference -= common
        model -= common
        self._theirs += _squares(reference)
        self._ours += _squares(model)
        self.products.addmm_(reference, model.T)

    def distances(self, order: Sequence[int]) -> Tensor:
        """Return |r - m| / |r| for each matched pair, |m| where r is zero."""
        places = torch.tensor(order)
        matched = self.products[torch.arange(len(order)), places]
        squared = (self._theirs + self._ours[places] - 2 * matched).clamp_(min=0)
        lengths = torch.where(self._lengths > 0, self._lengths, torch.ones_like(self._lengths))
        return (squared / lengths).sqrt_()


def _squares(rows: Tensor) -> Tensor:
    return torch.stack([row.dot(row) for row in rows])


def _read(
    operands: Operands, slots: Sequence[Slot], span: tuple[int, int], rows: Tensor, work: Workspace
) -> None:
    """Fill rows, one an expert, with a run of its elements."""
    start, stop = span
    for row, slot in zip(rows, slots, strict=True):
        operands.read(slot.source, slot.start + start, slot.start + stop, row, work)
        forget(slot.source, work)


def best_order(products: Tensor) -> list[int]:
    """Return for each row the column that it is matched with: the sum of products is largest.

    Of orders that are equally good, it is the rows' own if that is one of them; else exchanges with
    a row's own column that lose nothing are made: copies stay where they are.
    """
    from scipy.optimize import (  # type: ignore[import-untyped]  # noqa: PLC0415  (slow to load)
        linear_sum_assignment,
    )

    _, found = linear_sum_assignment(products.numpy(), maximize=True)
    order = [int(column) for column in found]
    gains = products.tolist()
    own = fsum(gains[i][i] for i in range(len(order)))
    if own >= fsum(gains[i][column] for i, column in enumerate(order)):
        return list(range(len(order)))
    for i, column in enumerate(order):
        if column != i:
            k = order.index(i)
            if gains[i][i] + gains[k][column] >= gains[i][column] + gains[k][i]:
                order[i], order[k] = i, column
    return order
