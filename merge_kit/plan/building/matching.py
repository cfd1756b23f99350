"""match_experts: the experts of each layer in the order that fits those of another model best."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from math import prod

from merge_kit.architecture.expert_groups import ExpertGroup, Piece
from merge_kit.core.dtypes import is_float
from merge_kit.errors import MismatchError, PlanError
from merge_kit.methods.match_experts import MatchExperts
from merge_kit.methods.structures import StructureMethod
from merge_kit.plan.assemble import Assembly
from merge_kit.plan.building.built import Built, Site
from merge_kit.plan.building.choices import Order
from merge_kit.plan.building.experts_found import whole_groups
from merge_kit.plan.building.matching_task import ORDER, Compared, ExpertMatching, Slot, matching
from merge_kit.plan.building.one_model import whole_model
from merge_kit.plan.building.pieces import copied, made_of, part_of
from merge_kit.plan.configs import result_parts
from merge_kit.plan.models import Model
from merge_kit.plan.sources import Concat, Source, View
from merge_kit.plan.steps import Made
from merge_kit.plan.values import Artefact
from merge_kit.recipe.values import ModelRef


def build(site: Site, method: StructureMethod) -> Built:
    """Return the model with its experts in the order of those of base_model."""
    assert isinstance(method, MatchExperts)
    ref, model, reference = _models(site)
    groups, others = whole_groups(model), whole_groups(reference)
    by_path = {group.path: group for group in others}
    _same_groups(model, reference, groups, by_path)
    artefacts: list[Artefact] = []
    ordered: dict[str, Source] = {}
    for i, group in enumerate(groups):
        other = by_path[group.path]
        _same_parts(model, reference, group, other)
        _refuse_without_router(model, group)
        _refuse_dtypes(model, group, moves=True)
        _refuse_dtypes(reference, other, moves=False)
        key = f"experts-{site.number}-{i}"
        both = (reference, other), (model, group)
        parts = _router(*both) if method.by == "router" else _weights(*both)
        task = ExpertMatching(f"{model.label}, {group.path}", group.count, parts)
        artefacts.append(matching(key, task, first=not artefacts))
        ordered |= dict(_ordered(model, group, key))
    made = tuple(_tensors(site, ref, model, ordered))
    assembly = Assembly(site.stage, model, reference, left_out=_left_out(reference, others))
    assembly.items = [one.item for one in made]
    counts = sorted({group.count for group in groups})
    site.findings.note(
        f"{model.label}: the {' or '.join(map(str, counts))} experts of each of {len(groups)} "
        f"layers are put in the order that fits {reference.label} best, once weights are read"
    )
    return Built(assembly, made, result_parts(assembly, made), tuple(artefacts))


_STORED = {
    "fused": "fused, those of a layer in one tensor",
    "split": "split, each in tensors of its own",
}
"""What a layout of experts is, in words."""


def _models(site: Site) -> tuple[ModelRef, Model, Model]:
    """Return how the recipe names the model, the model, and the reference."""
    stage, base = site.stage, site.stage.base_model
    refs = [entry.model for entry in stage.models if entry.model != base]
    if base is None or len(refs) != 1:
        found = f"{len(refs)} model{'s' * (len(refs) != 1)}"
        found += " and no base_model" if base is None else ""
        raise PlanError(
            f"{stage.merge_method} takes base_model, whose order is kept, and one model; "
            f"found {found}",
            where=str(stage.mark),
            hint="match each model in a document of its own, and merge their results",
        )
    return refs[0], whole_model(site, refs[0]), whole_model(site, base)


def _ordered(model: Model, group: ExpertGroup, key: str) -> Iterator[tuple[str, Source]]:
    """Yield the tensors of a group, by name, in an order that is found before the run."""
    order = Order(key, ORDER)
    apart = list(group.parts.values()) if group.layout == "split" else []
    for pieces in apart:
        sources = tuple(model.tensors[piece.tensor].source for piece in pieces)
        chosen = order.choices(sources)
        yield from ((piece.tensor, one) for piece, one in zip(pieces, chosen, strict=True))
    for name in (*(group.tensors if group.layout == "fused" else ()), *group.rows):
        held = model.tensors[name]
        shape = (1, *held.spec.shape[1:])
        size = prod(shape)
        rows = tuple(View(held.source, i * size, shape) for i in range(group.count))
        yield name, Concat(order.choices(rows))


def _tensors(
    site: Site, ref: ModelRef, model: Model, ordered: Mapping[str, Source]
) -> Iterator[Made]:
    for name, held in model.tensors.items():
        part, source = part_of(model, name, ref), ordered.get(name)
        if source is None:
            yield copied(site, name, part, component=held.component)
            continue
        note = "in the order that fits base_model"
        dtype, parts = held.spec.dtype, (part,)
        yield made_of(site, name, source, dtype, parts, component=held.component, note=note)


def _slot(model: Model, piece: Piece) -> Slot:
    return Slot(model.tensors[piece.tensor].source, piece.start)


Side = tuple[Model, ExpertGroup]


def _weights(reference: Side, model: Side) -> tuple[Compared, ...]:
    """Return what is compared of experts: all that they hold."""
    (theirs, other), (ours, group) = reference, model
    return tuple(
        Compared(
            prod(pieces[0].shape),
            tuple(_slot(theirs, piece) for piece in other.parts[part]),
            tuple(_slot(ours, piece) for piece in pieces),
        )
        for part, pieces in group.parts.items()
    )


def _router(reference: Side, model: Side) -> tuple[Compared, ...]:
    """Return what is compared of the router: its rows.

    Raises:
        MismatchError: If it has none in one of the models.
    """
    (theirs, other), (ours, group) = reference, model
    names = [n for n in group.rows if n in other.rows and len(ours.specs[n].shape) > 1]
    if not names:
        raise MismatchError(
            "by is router, and no router of both models has a row for each expert",
            where=f"{ours.label}, {group.block}",
            hint="leave `by` out to compare the experts' weights",
        )
    made = []
    for name in names:
        _same_shape(name, ours, theirs)
        size = prod(ours.specs[name].shape[1:])
        slots = [
            tuple(Slot(m.tensors[name].source, i * size) for i in range(group.count))
            for m in (theirs, ours)
        ]
        made.append(Compared(size, *slots))
    return tuple(made)


def _same_groups(
    model: Model,
    reference: Model,
    groups: Sequence[ExpertGroup],
    others: Mapping[str, ExpertGroup],
) -> None:
    layouts = {group.layout for group in groups}, {group.layout for group in others.values()}
    if layouts[0].isdisjoint(layouts[1]):
        here, there = (_STORED[layout] for (layout,) in layouts)
        raise MismatchError(
            f"stores its experts {here}; {reference.label} {there}",
            where=model.label,
            hint="bring both to one layout first: load and save one of them with transformers",
        )
    ours = [group.path for group in groups]
    alone = next((path for path in ours if path not in others), None)
    extra = next((path for path in others if path not in ours), None)
    if alone is not None or extra is not None:
        has, lacks = (model, reference) if alone is not None else (reference, model)
        raise MismatchError(
            f"{has.label} has experts in {alone or extra}, {lacks.label} has none there",
            where=lacks.label,
            hint="experts are matched between mixtures of one class and depth",
        )


def _same_parts(model: Model, reference: Model, group: ExpertGroup, other: ExpertGroup) -> None:
    """Refuse experts that cannot be told to be the same thing."""
    where = f"{model.label}, {group.path}"
    if group.count != other.count:
        problem = f"has {group.count} experts, {reference.label} has {other.count}"
        hint = "only mixtures of as many experts can be matched one to one"
        raise MismatchError(problem, where=where, hint=hint)
    if group.layout != other.layout or set(group.parts) != set(other.parts):
        problem = f"experts hold {_held(group)}, those of {reference.label} {_held(other)}"
        hint = "bring both to one layout first: load and save one of them with transformers"
        raise MismatchError(problem, where=where, hint=hint)
    for part, pieces in group.parts.items():
        one, two = pieces[0].shape, other.parts[part][0].shape
        if one != two:
            problem = f"{part} has shape {list(one)}, in {reference.label} {list(two)}"
            hint = "only experts of one size can be matched"
            raise MismatchError(problem, where=where, hint=hint)


def _held(group: ExpertGroup) -> str:
    return f"{', '.join(sorted(group.parts))} ({group.layout})"


def _same_shape(name: str, model: Model, reference: Model) -> None:
    one, two = model.specs[name].shape, reference.specs[name].shape
    if one != two:
        raise MismatchError(
            f"has shape {list(one)}, in {reference.label} {list(two)}",
            where=f"{model.label}, {name}",
            hint="only mixtures of one size can be matched",
        )


def _refuse_without_router(model: Model, group: ExpertGroup) -> None:
    """Refuse experts whose order cannot be changed: what chooses them would not follow."""
    if not group.rows:
        raise MismatchError(
            f"no tensor beside the experts has {group.count} rows, one for each of them: the "
            "router was not found, and must follow their order",
            where=f"{model.label}, {group.block}",
            hint="is it part of the file?",
        )


def _refuse_dtypes(model: Model, group: ExpertGroup, *, moves: bool) -> None:
    """Refuse experts between which there is no distance.

    Args:
        moves: Whether they change places, for which their dtypes must be equal.
    """
    for part, pieces in group.parts.items():
        dtypes = {model.specs[piece.tensor].dtype for piece in pieces}
        odd = next((dtype for dtype in sorted(dtypes) if not is_float(dtype)), None)
        if odd is not None or (moves and len(dtypes) > 1):
            what = f"dtype {odd}" if odd else f"dtypes {' and '.join(sorted(dtypes))}"
            raise MismatchError(
                f"experts' {part} of {what} cannot be matched",
                where=f"{model.label}, {group.path}",
                hint="convert the model to bfloat16 first",
            )


def _left_out(reference: Model, groups: Sequence[ExpertGroup]) -> dict[tuple[Model, str], str]:
    """Return why nothing of the reference is in the result."""
    compared = {name for group in groups for name in (*group.tensors, *group.rows)}
    return {
        (reference, name): "only compared with" if name in compared else "base_model lends an order"
        for name in reference.tensors
    }
