# Written by scripts/generate_functions.py.

from collections.abc import Sequence

from merge_kit.api.expressions import Operand
from merge_kit.api.lazy_merge import LazyMerge

__all__ = [
    "linear",
    "passthrough",
    "slerp",
    "task_arithmetic",
]

def linear(
    models: Sequence[Operand],
    *,
    base: Operand | None = None,
    seed: int = 0,
    weight: float | Sequence[float],
    normalize: bool | Sequence[bool] = True,
) -> LazyMerge: ...
def passthrough(
    models: Sequence[Operand],
    *,
    base: Operand | None = None,
    seed: int = 0,
    scale: float | Sequence[float | None] | None = None,
) -> LazyMerge: ...
def slerp(
    models: Sequence[Operand],
    *,
    base: Operand | None = None,
    seed: int = 0,
    t: float | Sequence[float],
    flatten: bool | Sequence[bool] = True,
) -> LazyMerge: ...
def task_arithmetic(
    models: Sequence[Operand],
    *,
    base: Operand | None = None,
    seed: int = 0,
    weight: float | Sequence[float],
    normalize: bool | Sequence[bool] = False,
    lambda_: float | Sequence[float] = 1.0,
) -> LazyMerge: ...
