"""Parameter values: which level applies to a tensor, and values as the type a method asks for."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

from merge_kit.errors import RecipeError
from merge_kit.methods.structures import Listed
from merge_kit.recipe.nodes import shown
from merge_kit.recipe.values import Mark, Parameters, Scalar

EXPECTED: dict[type, str] = {
    float: "a finite number",
    int: "a whole number",
    bool: "true or false",
    str: "text",
    Listed: "a list of whole numbers",
}
"""What a value of each type is called in messages."""

_NUMBER = re.compile(r"[-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?", re.ASCII)
_BOOLEANS = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}


def lookup(
    name: str, levels: Sequence[Parameters], tensor: str, t: float
) -> tuple[Scalar, Mark] | None:
    """Return a parameter's value and its place, from the first level that has one.

    Args:
        name: The parameter.
        levels: The narrowest first: source or model, slice, module, recipe.
        tensor: The tensor's name that filters look at: of the input for what a model sets for
            itself, of the output otherwise.
        t: Depth in [0, 1]: k / (n - 1) for layer k of the n layers of a slice, 1 if n is 1, and
            0 outside layers.

    Returns:
        None where no level applies: the parameter is not set.
    """
    for parameters in levels:
        setting = parameters.get(name)
        value = setting.at(tensor, t) if setting is not None else None
        if setting is not None and value is not None:
            return value, setting.mark
    return None


def coerce(value: Scalar, kind: type, where: Mark) -> Scalar:
    """Return the value as float, int, bool or str.

    Numbers may be written as text. Whole numbers may have a fraction of zero; 0 and 1 are bools,
    and bools are numbers where these may have a fraction, but no counts.

    Raises:
        RecipeError: If the value is none of that type.
    """
    found = converted(value, kind)
    if found is None:
        problem = f"found {shown(value)}, expected {EXPECTED[kind]}"
        raise RecipeError(problem, where=str(where))
    return found


def converted(value: Scalar, kind: type) -> Scalar | None:
    """Return the value as a type, or None if it does not fit."""
    if kind is str:
        return value if isinstance(value, str) else None
    if kind is bool:
        return _boolean(value)
    if kind is int and isinstance(value, bool):
        return None  # `overlap: true` means no number of layers
    number = _number(value)
    if kind is not int or number is None:
        return number if number is None else float(number)
    if isinstance(number, int):
        return number
    return int(number) if number.is_integer() else None


def _number(value: Scalar) -> int | float | None:
    """Return a finite number, an int where it is written as one."""
    if isinstance(value, str):
        text = value.strip()
        if not _NUMBER.fullmatch(text) or len(text) > 100:
            return None
        value = int(text) if text.lstrip("+-").isdigit() and len(text) < 19 else float(text)
    if isinstance(value, int):  # bools are numbers to the dialect too
        return int(value) if abs(value) < 2**63 else None
    return value if math.isfinite(value) else None


def _boolean(value: Scalar) -> bool | None:
    if isinstance(value, str):
        word = value.strip().lower()
        if word in _BOOLEANS:
            return _BOOLEANS[word]
    number = _number(value)
    return bool(number) if number in (0, 1) else None
