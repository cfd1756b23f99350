"""Whether the parts of an output tensor fit one another: shapes and dtypes, and what to do."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from merge_kit.architecture.layer_sizes import differing_keys
from merge_kit.architecture.ties import embedding_for, is_head
from merge_kit.core.dtypes import DTYPES
from merge_kit.errors import MergeKitError, MismatchError
from merge_kit.plan.items import Item, Part
from merge_kit.plan.side_by_side import config_of

_ROUTER = re.compile(r"(^|\.)(gate|router|router\.layer|wg)\.(weight|bias)$")
"""Tensors with a row for each expert."""

_VOCABULARY = (
    "do the vocabularies differ? bring both to one vocabulary first, or take this tensor "
    "from one model (`tensors: [{match: ..., copy: MODEL}]`), or leave that model out"
)


def same_shape(item: Item) -> None:
    """Refuse parts of different shapes.

    Raises:
        MismatchError: If two differ; it names the keys of the configs that do, too.
    """
    first = item.parts[0]
    for part in item.parts[1:]:
        one, other = first.model.specs[first.name].shape, part.model.specs[part.name].shape
        if one != other:
            here, there = _layers(first), _layers(part)
            keys = differing_keys(here, there, one, other)
            said = "".join(f"; {key} is {here[key]} and {there[key]}" for key in keys)
            raise MismatchError(
                f"{first.model.label} has shape {list(one)}, {part.model.label} {list(other)}"
                + said,
                where=item.name,
                hint=_hint(first, item.name, keys, one, other),
            )


def _layers(part: Part) -> Mapping[str, Any]:
    """Return what a model's config says of its layers, or of all of it."""
    stack = part.model.described
    return (part.model.config or {}) if stack is None else config_of(part.model, stack)


def _hint(
    part: Part, name: str, keys: Sequence[str], one: tuple[int, ...], other: tuple[int, ...]
) -> str:
    known = embedding_for("lm_head.weight", {part.name: part.model.specs[part.name]})
    embeds = known is not None or "embed" in name
    routes = _ROUTER.search(name) is not None and one[1:] == other[1:]
    if not routes and (
        "vocab_size" in keys or ((embeds or is_head(name)) and one[1:] == other[1:])
    ):
        return _VOCABULARY
    if routes or any("experts" in key for key in keys):
        return (
            "only mixtures of as many experts can be merged one by one: leave that model out, or "
            "make dense models of single experts (moe_to_dense) and merge those"
        )
    if keys:
        return (
            "pad, crop or project one of them to the size of the other, in a document with a name"
        )
    return "are the models of one size? `mergekit inspect A B` lists what differs"


def refuse_arithmetic(item: Item, dtypes: list[str]) -> None:
    """Refuse to merge what has no arithmetic, or not one for all.

    Raises:
        MismatchError: If dtypes differ, or mean nothing without scales.
    """
    kinds = {DTYPES[dtype].kind for dtype in dtypes}
    shown = ", ".join(
        f"{part.model.label} {dtype}" for part, dtype in zip(item.parts, dtypes, strict=True)
    )
    error: MergeKitError | None = None
    if "scaled" in kinds:
        error = MismatchError(
            f"cannot be merged as it is: {shown}; these values mean nothing without their scales",
            where=item.name,
            hint="convert the model to bfloat16 first; passthrough can copy it",
        )
    elif len(set(dtypes)) > 1:
        error = MismatchError(
            f"has dtypes that do not mix: {shown}",
            where=item.name,
            hint="take it from one model (`tensors: [{match: ..., copy: MODEL}]`)",
        )
    if error is not None:
        raise error
