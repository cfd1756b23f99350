"""Sizes that models are brought to: what `pad`, `crop` and `project` have in common."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from merge_kit.errors import ParameterError
from merge_kit.methods.structures import StructureMethod

MOST = 1 << 24
"""Largest size: above those of all models, and below what no disk holds."""

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
                hint = "leave it out to keep the size"
                raise ParameterError(size, f"is {value}, expected at least 1", hint=hint)
            if value > MOST:
                problem = f"is {value:,}, expected at most {MOST:,}"
                raise ParameterError(size, problem, hint="is a digit too many in it?")

    def sizes(self) -> dict[str, int]:
        """Return the sizes that are given."""
        found = {size: getattr(self, size) for size in SIZES}
        return {size: value for size, value in found.items() if value is not None}
