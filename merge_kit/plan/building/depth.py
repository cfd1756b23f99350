"""A deeper model of one or two: a stack of slices, with a seam of sums or with identity layers."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace

from merge_kit.architecture.stacks import split_layer
from merge_kit.architecture.ties import is_tied
from merge_kit.errors import MergeKitError, ParameterError, RecipeError
from merge_kit.methods.depth_upscale import DepthUpscale
from merge_kit.methods.structures import StructureMethod
from merge_kit.plan.assemble import Assembler, Assembly
from merge_kit.plan.building.built import Built, Site
from merge_kit.plan.building.depth_copies import Copy, copies_of, described
from merge_kit.plan.building.depth_identities import (
    expanded,
    identities,
    note_of,
    zeroed,
    zeros_of,
)
from merge_kit.plan.building.depth_order import Order, overlapping, places_of_copies
from merge_kit.plan.building.depth_seam import blended, check_pairs, check_shares, note_kinds
from merge_kit.plan.building.settings import place_of
from merge_kit.plan.configs import result_parts
from merge_kit.plan.slicing import Slicer
from merge_kit.plan.steps import Made
from merge_kit.recipe.values import Slice


def build(site: Site, method: StructureMethod) -> Built:
    """Return the deeper model.

    Raises:
        MergeKitError: If ranges or layers do not allow it.
    """
    assert isinstance(method, DepthUpscale)  # the method of this builder
    stage = site.stage
    check_shares(stage)
    maker = Assembler(replace(stage, merge_method="passthrough"), site.inputs, site.findings)
    stack = described(maker.donor, stage)
    copies = copies_of(maker, stack, method)
    try:
        slices, order = _slices(method, *copies)
    except ParameterError as error:
        where = place_of(stage, error.parameter)
        raise RecipeError(error.problem, where=where, hint=error.hint) from error
    pairs = check_pairs(order, *copies, str(stage.mark)) if order is not None else {}
    result = Assembly(stage, maker.donor, maker.base)
    result.items = Slicer(maker, stack, lambda _: True).fill(result, slices, ())
    maker.report_missing()
    site.findings.raise_any()
    new = {} if order is not None else identities(result.sliced[0].layers)
    _name_methods(result, method, new)
    made = _made(site, method, result, new, zeros_of(new, copies[0], stage))
    note_kinds(site, result, pairs)
    _note_idle(site, method, order)
    if new:
        site.findings.note(note_of(new))
    _note_halves(site, method, copies, order)
    _account(result, copies, made)
    result.items = [one.item for one in made]
    return Built(result, tuple(made), result_parts(result, made))


def _slices(method: DepthUpscale, lower: Copy, upper: Copy) -> tuple[list[Slice], Order | None]:
    """Return the slices of the result; and how copies overlap, unless identities are added."""
    if method.block_expansion:
        return expanded(lower, places_of_copies(method, lower.layers)), None
    order = overlapping(method, lower.layers, upper.layers)
    mark, cut = lower.entry.mark, order.lower + order.pairs
    slices = [Slice((lower.taken(0, order.lower),), mark)]
    if order.pairs:
        pair = lower.taken(order.lower, cut), upper.taken(0, order.pairs)
        slices.append(Slice(pair, mark, merge_method="linear"))
    top = upper.taken(upper.layers - order.upper, upper.layers + upper.behind)
    return [*slices, Slice((top,), upper.entry.mark)], order


def _name_methods(result: Assembly, method: DepthUpscale, new: Mapping[int, int]) -> None:
    """Say in the map of layers which of them are sums, and by what, and which are identities."""
    for i, origin in enumerate(result.origins):
        if len(origin.sources) > 1:
            result.origins[i] = replace(origin, method=method.blend)
        elif i in new:
            result.origins[i] = replace(origin, method="identity")


def _made(
    site: Site,
    method: DepthUpscale,
    result: Assembly,
    new: Mapping[int, int],
    zeros: Collection[tuple[int, str]],
) -> list[Made]:
    """Return the tensors of the result: copies, sums of a pair, and zeros of identities."""
    made: list[Made] = []
    for item in result.items:
        at = split_layer(item.name, result.sliced[0].stack)
        try:
            if at is not None and at in zeros:
                made.append(zeroed(site, item, new[at[0]]))
            elif len(item.parts) > 1:
                site.maker.filters.see((site.stage.parameters,), [item.name])
                made.append(site.maker.make(blended(item, method, site.stage)))
            else:
                made.append(site.maker.make(item))
        except MergeKitError as error:
            site.findings.problem(error)
    site.findings.raise_any()
    return made


def _note_idle(site: Site, method: DepthUpscale, order: Order | None) -> None:
    """Say which parameters have no effect."""
    if order is not None and order.pairs:
        return
    what = "block_expansion" if order is None else f"overlap_mode {method.overlap_mode}"
    for name in ("overlap_mode", "blend", "t") if order is None else ("blend", "t"):
        setting = site.stage.parameters.get(name)
        if setting is not None:
            why = f"{what} sums no layers here"
            site.findings.note(f"{setting.mark}: {name} has no effect ({why})")


def _note_halves(
    site: Site, method: DepthUpscale, copies: tuple[Copy, Copy], order: Order | None
) -> None:
    """Say which copy keeps one layer more, and whose embedding a tied head is."""
    lower, upper = copies
    if order is not None and method.overlap_mode == "drop":
        fewer = lower.layers + upper.layers - order.layers
        if fewer % 2:
            site.findings.note(
                f"{order.layers} layers leave out {fewer}, an odd number: of the lower copy "
                f"{order.lower} are taken, of the upper {order.upper}"
            )
    donor = (
        lower.model if site.stage.base_model is None else site.inputs.find(site.stage.base_model)
    )
    if lower.model is not upper.model and is_tied(donor.config):
        site.findings.note(
            f"the head is tied to the embedding, which is that of {lower.model.label}: "
            f"the embedding of {upper.model.label} is not used"
        )


def _account(result: Assembly, copies: tuple[Copy, Copy], made: Collection[Made]) -> None:
    """Say of every tensor of the copies that the result does without why that is so."""
    used = {(part.model, part.name) for one in made for part in one.item.parts}
    for copy, other in zip(copies, reversed(copies), strict=True):
        overlay = copy.model.overlay
        for name in copy.model.tensors:
            if (copy.model, name) in used:
                continue
            at = split_layer(name, copy.stack)
            why = f"taken from {other.model.label}, the other copy"
            if at is not None:
                why = f"layer {at[0]} is left out where the copies meet"
            result.left_out[copy.model, name] = why
            if overlay is not None:
                result.left_out[overlay.under, name] = why
                for part in overlay.made_of.get(name, ()):
                    result.left_out[part.model, part.tensor] = why
