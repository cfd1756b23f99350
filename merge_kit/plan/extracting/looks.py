"""What must be looked at in the weights before the layout of an extracted adapter is known."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

from merge_kit.core.tensors import TensorSpec
from merge_kit.methods.lora_extract import LoraExtract
from merge_kit.plan.extracting.pairs import Pair
from merge_kit.plan.models import Held
from merge_kit.plan.sources import Source, View
from merge_kit.plan.values import Step, Target

PIECE = 1 << 21
"""Elements of a tensor that are measured at once."""

_ANY_RANK = LoraExtract(rank=1)

Labels = tuple[str, str]
"""Of base and model."""


def compared(pair: Pair, labels: Labels, number: int) -> Step:
    """Return a look at whether two tensors are equal.

    Args:
        number: Of the stage.
    """
    base, tuned = _both(pair)
    source = base.source
    if source.dtype != tuned.source.dtype:
        source = View(source, 0, source.shape)  # as numbers, not as bytes
    return Step(
        action="copy",
        outputs=(Target(pair.module if pair.kind else pair.name, tuned.spec, -1, 0),),
        inputs=(tuned.source,),
        models=(labels[1],),
        base=source,
        compute=_compute(base, tuned),
        group=number,
    )


def measured(pair: Pair, labels: Labels, number: int) -> tuple[Step, ...]:
    """Return looks at how much two tensors differ, piece by piece."""
    base, tuned = _both(pair)
    return tuple(
        Step(
            action="merge",
            outputs=(
                _target(f"{pair.name}#{start}.lora_A", (1, count)),
                _target(f"{pair.name}#{start}.lora_B", (1, 1)),
            ),
            inputs=(_piece(tuned.source, start, count),),
            models=(labels[1],),
            method=_ANY_RANK,
            base=_piece(base.source, start, count),
            weights=(1.0,),
            compute=_compute(base, tuned),
            group=number,
            shape=(1, count),
        )
        for start, count in _pieces(tuned.spec.numel)
    )


def _both(pair: Pair) -> tuple[Held, Held]:
    assert pair.base is not None  # what one of them lacks is not looked at
    assert pair.tuned is not None
    return pair.base, pair.tuned


def _compute(base: Held, tuned: Held) -> Literal["F32", "F64"]:
    return "F64" if "F64" in (base.source.dtype, tuned.source.dtype) else "F32"


def _pieces(elements: int) -> Iterator[tuple[int, int]]:
    """Yield first element and count of each piece; one piece where there is nothing."""
    for start in range(0, max(elements, 1), PIECE):
        yield start, min(PIECE, elements - start)


def _piece(source: Source, start: int, count: int) -> Source:
    return View(source, start, (1, count))


def _target(name: str, shape: tuple[int, ...]) -> Target:
    return Target(name, TensorSpec(name, "F32", shape), -1, 0)
