"""The config.json of a model several stacks of which are built of layers of others."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from merge_kit.architecture.components import kind_of
from merge_kit.architecture.config import Edit, edit_config, read_config
from merge_kit.architecture.sections import (
    DECODER_COUNT_KEYS,
    ENCODER_COUNT_KEYS,
    section_of,
    side_of,
)
from merge_kit.architecture.stacking import WHERE, Origins, is_paired, stack_edits
from merge_kit.architecture.stacks import Stack
from merge_kit.errors import PlanError


def stacked_configs(
    donor_text: str, built: Sequence[tuple[Stack, Origins]], every: Sequence[Stack]
) -> str:
    """Return the donor's config for several stacks of other layers; see `stacked_config`.

    Args:
        donor_text: config.json of the model that gives the config.
        built: The stacks that are built, with where their layers come from.
        every: All stacks that the config may describe.

    Raises:
        CheckpointError: If a config cannot be read.
        PlanError: If a config cannot follow the layers; it names the key.
    """
    config = read_config(donor_text, WHERE)
    depths = {stack.prefix: stack.count for stack in every}
    depths |= {stack.prefix: len(origins) for stack, origins in built}
    edits: dict[tuple[str, ...], Edit] = {}
    for stack, origins in sorted(built, key=lambda pair: side_of(pair[0].prefix) == "decoder"):
        if len(origins) != stack.count:
            _check_count(config, stack, every, depths)
        for edit in stack_edits(donor_text, stack, origins):
            other = edits.get(edit.path, edit)
            if other != edit and edit.path[-1] not in DECODER_COUNT_KEYS:
                raise _refusal(edit.path[-1], [one.prefix for one, _ in built])
            edits[edit.path] = edit
    return edit_config(donor_text, list(edits.values()))


def _check_count(
    config: Mapping[str, Any], stack: Stack, every: Sequence[Stack], depths: Mapping[str, int]
) -> None:
    """Refuse to change a count that also is that of a stack of another depth."""
    for other in every:
        key = _shared_key(config, stack, other)
        if key and depths[other.prefix] != depths[stack.prefix]:
            raise _refusal(key, [stack.prefix, other.prefix])


def _shared_key(config: Mapping[str, Any], stack: Stack, other: Stack) -> str:
    """Return a key that counts the layers of two stacks, "" if there is none."""
    if other.prefix == stack.prefix or other.count != stack.count:
        return ""
    if kind_of(f"{stack.prefix}.0") != kind_of(f"{other.prefix}.0") == "vision":
        return ""  # a config without parts describes the language model
    one, two = (section_of(config, s.prefix, s.count) for s in (stack, other))
    if one is None or two is None or one.path != two.path:
        return ""
    keys = one.count_keys(stack.prefix, stack.count)
    sides = side_of(stack.prefix), side_of(other.prefix)
    if keys and is_paired(one.config, keys) and sides[0] != sides[1]:
        return ""
    theirs = two.count_keys(other.prefix, other.count)
    return next((key for key in keys if key in theirs or _may_count(key, other)), "")


def _may_count(key: str, stack: Stack) -> bool:
    """Return whether a key of one side may be that of a stack such as `text_encoder.layers`."""
    sides = (("encoder", ENCODER_COUNT_KEYS), ("decoder", DECODER_COUNT_KEYS))
    return not side_of(stack.prefix) and any(
        key in keys and word in stack.prefix for word, keys in sides
    )


def _refusal(key: str, prefixes: Sequence[str]) -> PlanError:
    problem = f"{key} describes {' and '.join(prefixes)}, whose layers would differ"
    return PlanError(problem, where=WHERE, hint="give each of them the same slices under modules")
