"""Every registered method as a function; methods.pyi has their signatures for type checkers."""

from __future__ import annotations

from typing import TYPE_CHECKING

from merge_kit.api.functions import method_function
from merge_kit.errors import PlanError
from merge_kit.methods.registry import names

if TYPE_CHECKING:
    from collections.abc import Callable

    from merge_kit.api.lazy_merge import LazyMerge


def __getattr__(name: str) -> Callable[..., LazyMerge]:
    try:
        return method_function(name)
    except PlanError as error:
        problem = f"module {__name__!r} has no attribute {name!r}"
        raise AttributeError(problem) from error


def __dir__() -> list[str]:
    return list(names())
