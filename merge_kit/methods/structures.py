"""Methods that build a model of another structure: other layers, experts, or sizes.

Such a method is its parameters, checked. The planner builds the output's tensors of the inputs' by
sources and by steps of other methods (`plan.building`); `merge` is never called.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from merge_kit.methods.base import MergeMethod


@dataclass(frozen=True, slots=True)
class Listed:
    """Whole numbers from 0 that a recipe lists, or one word in their place.

    Attributes:
        numbers: In the order of the recipe; one number may stand without a list.
        word: The word, "" where numbers are listed.
    """

    numbers: tuple[int, ...] = ()
    word: str = ""


@dataclass(frozen=True, kw_only=True)
class StructureMethod(MergeMethod):
    """Base of the methods that build models of another structure.

    Attributes:
        spans_layers: Parameters that may be a list over layers, and differ by filters: their
            builder looks them up tensor by tensor, and the method itself has the default.
    """

    makes: ClassVar[Literal["model", "adapter", "structure"]] = "structure"
    spans_layers: ClassVar[frozenset[str]] = frozenset()
