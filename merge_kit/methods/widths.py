"""Sizes that models are brought to: what `pad`, `crop` and `project` have in common."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from merge_kit.errors import ParameterError
from merge_kit.methods.structures import StructureMethod

SIZES = ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads")


@dataclass(frozen=True, kw_only=True)
class WidthMethod(StructureMethod):
    """Base of the methods that bring a model to other sizes; None leaves a size as it is."""

    takes_base: ClassVar[bool] = True
    max_inputs: ClassVar[int | None] = 1

    hidden_size: int | None = None
    intermediate_size: int | None = None
    num_attention_heads: int | None = None
    num_key_value_heads: int | None = None

    def __post_init__(self) -> None:
        for size, value in self.sizes().items():
            if value < 1:
                raise ParameterError(size, f"is {value}, expected at least 1")

    def sizes(self) -> dict[str, int]:
        """Return the sizes that are given."""
        found = {size: getattr(self, size) for size in SIZES}
        return {size: value for size, value in found.items() if value is not None}
