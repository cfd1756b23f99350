"""Layers of two copies that become one: the shares of each, tensor by tensor."""

from __future__ import annotations

from dataclasses import replace

from merge_kit.architecture.stacking import stacked_config
from merge_kit.architecture.stacks import Stack
from merge_kit.errors import MergeKitError, MismatchError, ParameterError, RecipeError
from merge_kit.methods.depth_upscale import DepthUpscale, share
from merge_kit.plan.assemble import Assembly
from merge_kit.plan.building.built import Site
from merge_kit.plan.building.depth_copies import Copy
from merge_kit.plan.building.depth_order import Order
from merge_kit.plan.items import Item
from merge_kit.plan.models import Model
from merge_kit.recipe.lookup import coerce, lookup
from merge_kit.recipe.values import Mark, Parameters, Rule, Setting, Stage

Pair = tuple[tuple[Model, int], tuple[Model, int]]
"""A layer of the lower copy and one of the upper."""


def check_shares(stage: Stage) -> None:
    """Check every value of `t`.

    Raises:
        RecipeError: If one is no share.
    """
    setting = stage.parameters.get("t")
    for rule in setting.rules if setting is not None else ():
        for value in rule.values:
            assert setting is not None
            try:
                share(float(coerce(value, float, setting.mark)))
            except ParameterError as error:
                where = str(setting.mark)
                raise RecipeError(error.problem, where=where, hint=error.hint) from error


def blended(item: Item, method: DepthUpscale, stage: Stage) -> Item:
    """Return the item of a summed pair, with the share of each copy at its depth in the seam."""
    found = lookup("t", (stage.parameters,), item.name, item.t)
    t, mark = (method.t, item.mark) if found is None else found
    upper = float(coerce(t, float, mark))
    parts = tuple(replace(part, is_base=i == 0) for i, part in enumerate(item.parts))
    if method.blend == "slerp":
        return replace(item, method="slerp", levels=(_setting("t", upper, mark),), parts=parts)
    weights = (1 - upper, upper)
    entries = [
        replace(part.entry, parameters=_setting("weight", weight, mark))
        for part, weight in zip(parts, weights, strict=True)
    ]
    parts = tuple(replace(p, entry=entry) for p, entry in zip(parts, entries, strict=True))
    return replace(item, method="linear", levels=(), parts=parts)


def _setting(name: str, value: float, mark: Mark) -> Parameters:
    return {name: Setting((Rule((value,)),), mark)}


def check_pairs(order: Order, lower: Copy, upper: Copy, where: str) -> dict[int, Pair]:
    """Return the pairs that are summed, by the number of the layer that they become.

    Raises:
        MismatchError: If two layers do not hold the same tensors.
    """
    found: dict[int, Pair] = {}
    for j in range(order.pairs):
        i = order.lower + j
        found[i] = (lower.model, i), (upper.model, j)
        ours, theirs = _shapes(lower, i), _shapes(upper, j)
        odd = [s for s in dict.fromkeys((*ours, *theirs)) if ours.get(s) != theirs.get(s)]
        if odd:
            here, there = ours.get(odd[0]), theirs.get(odd[0])
            shapes = f"{odd[0]} has shape {_listed(here)} in one, {_listed(there)} in the other"
            differ = f"only one of them has {odd[0]}" if None in (here, there) else shapes
            names = f"layer {i} of {lower.model.label} and layer {j} of {upper.model.label}"
            hint = "choose another overlap, or overlap_mode: drop, which sums nothing"
            if lower.model is not upper.model and None not in (here, there):
                hint = "sum layers of one size: pad, crop or project a model to it first"
            raise MismatchError(f"{names} would be summed: {differ}", where=where, hint=hint)
    return found


def _shapes(copy: Copy, layer: int) -> dict[str, tuple[int, ...]]:
    extras = copy.model.first_layer_extras(copy.stack)
    held = copy.model.by_layer(copy.stack).get(layer, {})
    return {s: copy.model.specs[name].shape for s, name in held.items() if s not in extras}


def _listed(shape: tuple[int, ...] | None) -> str:
    return str(list(shape or ()))


def note_kinds(site: Site, assembly: Assembly, pairs: dict[int, Pair]) -> None:
    """Say where the config knows a pair's layers as two kinds: the lower one's is kept.

    Args:
        site: Where the note goes.
        assembly: With the lower layer of each pair as its origin.
        pairs: By the number of the layer that they become.
    """
    text = assembly.donor.main.config_text
    if text is None or not pairs:
        return
    stack, sources = assembly.sliced[0].stack, [*assembly.sliced[0].layers]
    try:
        kept = _config(text, stack, sources)
    except MergeKitError:
        return  # said where the config is made
    for out, (_, upper) in pairs.items():
        sources[out] = upper
    try:
        differs = _config(text, stack, sources) != kept
    except MergeKitError:
        differs = True
    if differs:
        site.findings.note(
            "config.json gives some layers that are summed two kinds (sliding and full attention, "
            "say): the result is of the kind of the lower one"
        )


def _config(text: str, stack: Stack, sources: list[tuple[Model, int]]) -> str:
    origins = [(model.main.config_text or "{}", layer) for model, layer in sources]
    return stacked_config(text, stack, origins)
