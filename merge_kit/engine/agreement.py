"""Tensors that must be the same in every model: integers, and what adapters hold whole."""

from __future__ import annotations

from collections.abc import Sequence

from merge_kit.core.dtypes import is_float
from merge_kit.core.tensors import ByteSpan
from merge_kit.errors import MergeKitError, MismatchError, raise_all
from merge_kit.io.reader import Reader
from merge_kit.plan.sources import Stored
from merge_kit.plan.values import Step

_PIECE = 1 << 20


def check_agreement(reader: Reader, steps: Sequence[Step]) -> None:
    """Check, before anything is merged, that tensors are equal which stand for one another.

    Raises:
        MismatchError: If two differ, naming the tensor and both models; all such in one list.
    """
    errors: list[MergeKitError] = []
    for step in steps:
        first = step.inputs[0] if step.inputs else None
        for other, model in zip(step.agree, step.agree_models, strict=True):
            assert isinstance(first, Stored)  # copies are of stored tensors
            assert isinstance(other, Stored)
            if not equal_bytes(reader, first.span, other.span):
                errors.append(_differ(step, model))
                break
    raise_all(errors)


def _differ(step: Step, model: str) -> MismatchError:
    spec = step.outputs[0].spec
    if is_float(spec.dtype):  # what adapters hold whole
        return MismatchError(
            f"{step.models[0]} and {model} hold {step.note or 'it'} whole, with different values",
            where=step.outputs[0].key,
            hint="set parameters: {saved: first} to take it from the first of them or {saved: "
            "mean} to average it, or leave one of the two out",
        )
    return MismatchError(
        f"{spec.dtype} values differ between {step.models[0]} and {model}, and cannot be averaged",
        where=step.outputs[0].key,
        hint="set on_conflict: base or on_conflict: first to take one of them",
    )


def equal_bytes(reader: Reader, one: ByteSpan, other: ByteSpan) -> bool:
    """Return whether two runs of bytes of equal length are the same."""
    left, right = bytearray(_PIECE), bytearray(_PIECE)
    for at in range(0, one.nbytes, _PIECE):
        count = min(_PIECE, one.nbytes - at)
        reader.read_into(one.path, one.start + at, memoryview(left)[:count])
        reader.read_into(other.path, other.start + at, memoryview(right)[:count])
        if left[:count] != right[:count]:
            return False
    return True
