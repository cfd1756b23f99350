"""What a case is: one method with parameters, held to one oracle."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from tests.oracles.inputs import WEIGHTS, Oracle

SIGNED = (1.0, -0.5, 0.75, 0.5, -0.25, 1.5, 2.0, -0.625)
"""Weights of which some are negative, and whose sum is not 0 for 1, 2, 3 or 8 models."""


@dataclass(frozen=True)
class Case:
    """One method with its parameters, and the oracle that it is held to.

    Attributes:
        parameters: Of all models together.
        of_each: Parameters of model i.
        base: Whether the recipe has a base.
        counts: Numbers of models.
        wide_unit: The measure for float64, 2^-44 unless the method's own rounding is coarser.
    """

    method: str
    oracle: Oracle
    parameters: Mapping[str, object] = field(default_factory=dict)
    of_each: Callable[[int], dict[str, object]] = lambda i: {"weight": WEIGHTS[i]}
    base: bool = True
    counts: Sequence[int] = (1, 2, 3, 8)
    wide_unit: float = 2.0**-44


def recipe(case: Case, number: int, **more: object) -> str:
    """Return the recipe of a case for so many models."""
    models: list[dict[str, object]] = [
        {"model": f"m{i}", "parameters": case.of_each(i)} for i in range(number)
    ]
    text = {"merge_method": case.method, "models": models, "parameters": dict(case.parameters)}
    return json.dumps({**text, **({"base_model": "base"} if case.base else {}), **more})


def bare(index: int) -> dict[str, object]:
    return {}


def signed(index: int) -> dict[str, object]:
    return {"weight": SIGNED[index]}
