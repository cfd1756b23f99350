"""moe_to_dense: experts of each layer become its one MLP."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from merge_kit.architecture.dense_twins import (
    PROJECTIONS,
    Twin,
    dense_block,
    dense_config,
    projections,
    twin_for,
)
from merge_kit.architecture.expert_groups import ExpertGroup, Piece
from merge_kit.core.dtypes import is_float, promoted
from merge_kit.errors import MismatchError, PlanError
from merge_kit.methods.base import PerModel
from merge_kit.methods.linear import Linear
from merge_kit.methods.moe_to_dense import MoeToDense
from merge_kit.methods.structures import StructureMethod
from merge_kit.plan.assemble import Assembly
from merge_kit.plan.building.built import Built, Site
from merge_kit.plan.building.experts_found import whole_groups
from merge_kit.plan.building.one_model import only_model
from merge_kit.plan.building.pieces import copied, made_of, part_of
from merge_kit.plan.building.settings import place_of
from merge_kit.plan.configs import result_parts
from merge_kit.plan.items import Part
from merge_kit.plan.models import Model
from merge_kit.plan.sources import Merged, Source, View
from merge_kit.plan.steps import Made
from merge_kit.recipe.values import ModelRef


def build(site: Site, method: StructureMethod) -> Built:
    """Return the dense model of a mixture of experts."""
    assert isinstance(method, MoeToDense)
    ref, model = only_model(site)
    groups = whole_groups(model)
    try:
        twin = twin_for(model.config, method.architecture)
    except PlanError as error:
        named = error.problem.startswith("architecture is")
        where = place_of(site.stage, "architecture") if named else model.label
        raise PlanError(error.problem, where=where, hint=error.hint) from error
    maker = _Maker(site, method, ref, model)
    made = list(maker.tensors(groups))
    width = _width(model, made)
    assembly = Assembly(site.stage, model, None, left_out=maker.left_out)
    assembly.items = [one.item for one in made]
    parts = result_parts(assembly, made)
    dense = tuple(
        replace(part, config_text=_config(model, part.config_text, twin, width))
        if part.path == model.main.path
        else part
        for part in parts
    )
    site.findings.note(f"{maker.what(groups[0].count)} of {_layers(groups)}, as {twin.dense[0]}")
    return Built(assembly, tuple(made), dense)


def _config(model: Model, text: str | None, twin: Twin, width: int) -> str | None:
    if text is None:
        return None
    try:
        return dense_config(text, twin, width)
    except PlanError as error:
        where = f"{model.label}/{error.where}"
        raise PlanError(error.problem, where=where, hint=error.hint) from error


def _width(model: Model, made: Sequence[Made]) -> int:
    """Return how many hidden units each MLP of the result has.

    Raises:
        MismatchError: If they differ: a dense class has one width for all.
    """
    widths: dict[int, str] = {}
    for one in made:
        if one.item.name.endswith(".mlp.gate_proj.weight"):
            widths.setdefault(sum(one.held.spec.shape[:1]), one.item.name)
    if len(widths) > 1:
        (narrow, first), (wide, second) = sorted(widths.items())[:2]
        raise MismatchError(
            f"the MLPs would differ in width: {first} has {narrow} hidden units, {second} {wide}",
            where=model.label,
            hint="layers that were dense already keep their MLP, and a dense class has one width "
            "for all layers; pad or crop can bring experts and MLPs to one",
        )
    return next(iter(widths))


def _layers(groups: Sequence[ExpertGroup]) -> str:
    return f"{len(groups)} layers" if len(groups) > 1 else "one layer"


@dataclass
class _Maker:
    """Makes the output's tensors, and says why others are left out."""

    site: Site
    method: MoeToDense
    ref: ModelRef
    model: Model

    def __post_init__(self) -> None:
        self.left_out: dict[tuple[Model, str], str] = {}

    def what(self, count: int) -> str:
        """Return what is taken of so many experts, in words."""
        if self.method.is_shared:
            return "shared expert"
        taken = self.method.chosen(count)
        if len(taken) == 1:
            return f"expert {taken[0]}"
        listed = ", ".join(map(str, taken))
        return f"mean of {count} experts" if len(taken) == count else f"mean of experts {listed}"

    def tensors(self, groups: Sequence[ExpertGroup]) -> Iterator[Made]:
        """Yield the output's tensors; a dense MLP stands where its experts began."""
        owner: dict[str, ExpertGroup] = {}
        for group in groups:
            self._check(group)
            owner |= dict.fromkeys((*group.tensors, *group.rows, *group.shared), group)
        blocks = {f"{group.block}." for group in groups}
        done: set[str] = set()
        self._refuse_twice(groups)
        for name in self.model.tensors:
            found = owner.get(name)
            if found is None:
                self._refuse_inside(name, blocks)
                yield copied(self.site, name, self._part(name), component=self._component(name))
            elif found.path not in done:
                done.add(found.path)
                yield from self._shared(found) if self.method.is_shared else self._experts(found)

    def _check(self, group: ExpertGroup) -> None:
        wrong = [n for n in self.method.chosen(group.count) if n >= group.count]
        if wrong:
            raise PlanError(
                f"experts names {wrong[0]}, and {group.path} holds {group.count}",
                where=place_of(self.site.stage, "experts"),
                hint=f"experts are numbered from 0 to {group.count - 1}",
            )

    def _refuse_twice(self, groups: Sequence[ExpertGroup]) -> None:
        """Refuse experts whose dense MLP would stand where something else does."""
        seen: set[str] = set()
        for group in groups:
            block = dense_block(group)
            names = [f"{block}.{p}.weight" for p in PROJECTIONS]
            if block in seen or any(name in self.model.tensors for name in names):
                raise MismatchError(
                    f"experts and another MLP would both become {block}",
                    where=f"{self.model.label}, {group.path}",
                    hint="no dense class is known that has both",
                )
            seen.add(block)

    def _refuse_inside(self, name: str, blocks: set[str]) -> None:
        path = name
        while "." in path:
            path = path.rpartition(".")[0]
            if f"{path}." in blocks:
                raise MismatchError(
                    "is neither of an expert nor of the router, and a dense layer has no place "
                    "for it",
                    where=f"{self.model.label}, {name}",
                    hint="drop it in a stage before this one, if the model can do without it",
                )

    def _component(self, name: str) -> str:
        return self.model.tensors[name].component

    def _part(self, name: str) -> Part:
        return part_of(self.model, name, self.ref)

    def _experts(self, group: ExpertGroup) -> Iterator[Made]:
        taken = self.method.chosen(group.count)
        pieces = projections(group)
        used = {pieces[p][e].tensor for p in PROJECTIONS for e in taken}
        for part in pieces.values():
            for e, piece in enumerate(part):
                if piece.tensor not in used:
                    self._leave(piece.tensor, f"expert {e} is not taken")
        self._leave_rest(group)
        for p in PROJECTIONS:
            name = f"{dense_block(group)}.{p}.weight"
            yield self._mean(name, [pieces[p][e] for e in taken], self.what(group.count))

    def _shared(self, group: ExpertGroup) -> Iterator[Made]:
        for name in group.tensors:
            self._leave(name, "the shared expert is taken alone")
        wanted = {p: f"{group.block}.shared_expert.{p}.weight" for p in PROJECTIONS}
        missing = [name for name in wanted.values() if name not in self.model.tensors]
        if missing:
            raise PlanError(
                f"experts is shared, and {group.block} has no shared expert ({missing[0]})",
                where=place_of(self.site.stage, "experts"),
                hint="name experts by their numbers, or leave it out for the mean of all",
            )
        self._leave_rest(group, set(wanted.values()))
        for p, source in wanted.items():
            name, part = f"{dense_block(group)}.{p}.weight", self._part(source)
            component = self._component(source)
            yield copied(self.site, name, part, component=component, note="shared expert")

    def _leave_rest(
        self, group: ExpertGroup, used: frozenset[str] | set[str] = frozenset()
    ) -> None:
        for name in group.rows:
            self._leave(name, "a dense layer has no router")
        for name in group.shared:
            if name not in used:
                self._leave(name, "the shared expert is not taken")

    def _leave(self, name: str, why: str) -> None:
        self.left_out[self.model, name] = why

    def _mean(self, name: str, pieces: Sequence[Piece], note: str) -> Made:
        """Return the mean of pieces; a single one is copied."""
        held = [self.model.tensors[piece.tensor] for piece in pieces]
        parts = tuple(self._part(t) for t in dict.fromkeys(p.tensor for p in pieces))
        component = held[0].component
        if len(pieces) == 1 and pieces[0].shape == held[0].spec.shape:
            return copied(self.site, name, parts[0], component=component, note=note)
        dtypes = [one.spec.dtype for one in held]
        if not all(is_float(dtype) for dtype in dtypes):
            raise MismatchError(
                f"experts of dtype {dtypes[0]} cannot be averaged or split",
                where=f"{self.model.label}, {pieces[0].tensor}",
                hint="convert the model to bfloat16 first",
            )
        sources = [self._source(piece) for piece in pieces]
        dtype = promoted(dtypes)
        made = made_of(self.site, name, sources[0], dtype, parts, component=component, note=note)
        return made if len(sources) == 1 else _averaged(made, sources, self.model.label)

    def _source(self, piece: Piece) -> Source:
        held = self.model.tensors[piece.tensor]
        if piece.shape == held.spec.shape:
            return held.source
        return View(held.source, piece.start, piece.shape)


def _averaged(made: Made, sources: Sequence[Source], label: str) -> Made:
    """Return a tensor as the mean of sources, in float64: that of copies is then the copy."""
    ones = (1.0,) * len(sources)
    step = replace(
        made.step,
        inputs=tuple(sources),
        models=(label,) * len(sources),
        method=Linear(weight=PerModel(ones)),
        weights=ones,
        compute="F64",
    )
    merged = made.held.source
    assert isinstance(merged, Merged)  # of a source
    return replace(made, step=step, held=replace(made.held, source=replace(merged, step=step)))
