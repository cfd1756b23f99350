"""Layers that pass on what they get: copies whose output projections are zero."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

from merge_kit.architecture.output_projections import output_projections
from merge_kit.core.dtypes import is_float
from merge_kit.errors import MismatchError, PlanError
from merge_kit.plan.building.built import Site
from merge_kit.plan.building.depth_copies import Copy
from merge_kit.plan.items import Item
from merge_kit.plan.models import Model
from merge_kit.plan.sources import Generated
from merge_kit.plan.steps import Made
from merge_kit.recipe.values import Slice, Stage

SHOWN = 32
"""Numbers of new layers that are listed before `and 4 more`."""


def expanded(copy: Copy, places: Sequence[int]) -> list[Slice]:
    """Return slices in which each of these layers follows on itself."""
    slices, start, mark = [], 0, copy.entry.mark
    for place in places:
        slices.append(Slice((copy.taken(start, place + 1),), mark))
        start = place
    return [*slices, Slice((copy.taken(start, copy.layers + copy.behind),), mark)]


def identities(layers: Sequence[tuple[Model, int]]) -> dict[int, int]:
    """Return which of the result's layers follow on the layer that they copy, with its number."""
    return {i: layers[i][1] for i in range(1, len(layers)) if layers[i] == layers[i - 1]}


def note_of(new: Iterable[int]) -> str:
    """Return the sentence that says which layers of the result are new: those to train."""
    numbers = list(new)
    shown = ", ".join(map(str, numbers[:SHOWN]))
    more = f" and {len(numbers) - SHOWN} more" if len(numbers) > SHOWN else ""
    many = "new layers change" if len(numbers) > 1 else "new layer changes"
    return f"{len(numbers)} {many} nothing until trained: {shown}{more}"


def zeros_of(new: Mapping[int, int], copy: Copy, stage: Stage) -> frozenset[tuple[int, str]]:
    """Return the tensors that are zero, by layer of the result and suffix.

    Args:
        new: The layers of the result that are identities, with the layer that each copies.
        copy: The model that is expanded.
        stage: Where problems are.

    Raises:
        PlanError: If a layer is not known to pass on what it gets once its projections are zero.
    """
    zeros: set[tuple[int, str]] = set()
    for out, layer in new.items():
        held = copy.model.by_layer(copy.stack)[layer]
        shapes = {suffix: copy.model.specs[name].shape for suffix, name in held.items()}
        try:
            suffixes = output_projections(shapes, copy.config)
        except PlanError as error:
            what = f"layer {layer} of {copy.model.label}"
            problem = f"a copy of {what} would not be an identity: {error.problem}"
            raise PlanError(problem, where=str(stage.mark), hint=error.hint) from error
        zeros |= {(out, suffix) for suffix in suffixes}
    return frozenset(zeros)


def zeroed(site: Site, item: Item, layer: int) -> Made:
    """Return a tensor of zeros in the place of an output projection.

    Raises:
        MismatchError: If its elements are no plain floats.
    """
    part = item.parts[0]
    spec = part.model.specs[part.name]
    if not is_float(spec.dtype):
        problem = f"is {spec.dtype}: zeros there may not mean zero weights"
        hint = "expand the model in bfloat16, and quantise the result"
        raise MismatchError(problem, where=f"{part.model.label}/{part.name}", hint=hint)
    note = f"zeros: the copy of layer {layer} passes on what it gets"
    zeros = replace(item, parts=(), note=note)
    return site.maker.of_source(zeros, Generated("zeros", spec.shape), spec.dtype)
