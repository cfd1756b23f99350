"""The models whose layers a deeper model takes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from merge_kit.architecture.sections import section_of
from merge_kit.architecture.stacks import Stack
from merge_kit.core.layers import LayerRange
from merge_kit.errors import PlanError
from merge_kit.methods.depth_upscale import DepthUpscale
from merge_kit.plan.assemble import Assembler
from merge_kit.plan.models import Model
from merge_kit.recipe.values import NO_PARAMETERS, Entry, Stage


@dataclass(frozen=True, slots=True)
class Copy:
    """A model whose layers are taken, the lower copy or the upper.

    Attributes:
        config: The object of its config.json that describes the layers, None without a config.
        layers: How many there are.
        behind: Layers stored behind those that the config counts (multi-token prediction).
    """

    entry: Entry
    model: Model
    stack: Stack
    config: Mapping[str, Any] | None
    layers: int
    behind: int

    def taken(self, start: int, stop: int) -> Entry:
        """Return a run of its layers as the source of a slice."""
        return replace(self.entry, layers=LayerRange(start, stop))


def described(donor: Model, stage: Stage) -> Stack:
    """Return the layers of the model that lends its config.

    Raises:
        PlanError: If its config does not say which they are.
    """
    stack = donor.described
    if stack is None:
        found = ", ".join(s.prefix for s in donor.stacks) or "none"
        raise PlanError(
            f"config.json of {donor.label} does not say which layers make the model deep",
            where=str(stage.mark),
            hint=f"write modules: with slices of the stack that is meant; stacks here: {found}",
        )
    return stack


def copies_of(maker: Assembler, stack: Stack, method: DepthUpscale) -> tuple[Copy, Copy]:
    """Return the lower copy and the upper, which may be the same.

    Raises:
        PlanError: If there are too many models, or one has no such layers.
    """
    found = [_copy(maker, entry, stack) for entry in _entries(maker.stage, method)]
    return found[0], found[-1]


def _entries(stage: Stage, method: DepthUpscale) -> Sequence[Entry]:
    """Return what gives layers: the models, or a base alone."""
    entries, most = stage.models, 1 if method.block_expansion else 2
    if not entries and stage.base_model is not None:
        return (Entry(stage.base_model, NO_PARAMETERS, stage.base_model.mark),)
    if not 1 <= len(entries) <= most:
        wanted = "one model" if most == 1 else "one model, or a lower and an upper one"
        what = "block_expansion" if most == 1 else "depth_upscale"
        problem = f"{what} takes {wanted}, found {len(entries)}"
        hint = "merge them first, in a document that this one names as its model"
        raise PlanError(problem, where=str(stage.mark), hint=hint)
    return entries


def _copy(maker: Assembler, entry: Entry, stack: Stack) -> Copy:
    model = maker.find(entry.model, maker.stage.base_model)
    own = next((one for one in model.stacks if one.prefix == stack.prefix), model.described)
    if own is None:
        problem = f"{model.label} has no layers {stack.prefix}, which {maker.donor.label} has"
        raise PlanError(problem, where=str(entry.mark), hint="are the models of one architecture?")
    section = section_of(model.config, own.prefix, own.count) if model.config else None
    counted = section.count(own.prefix, own.count) if section is not None else None
    layers = min(counted or own.count, own.count)
    config = model.config if section is None else section.config
    return Copy(entry, model, own, config, layers, own.count - layers)
