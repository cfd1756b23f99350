"""A request as the steps that the planner makes of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from merge_kit.api.held import HeldModel
from merge_kit.api.merging import read_recipe
from merge_kit.api.overlays import models_of
from merge_kit.api.packed import packing_problem
from merge_kit.api.requests import Request
from merge_kit.errors import MergeKitError, MismatchError
from merge_kit.io.values import WeightFile
from merge_kit.plan.assemble import Assembly
from merge_kit.plan.building.built import Site
from merge_kit.plan.building.stage import build, builds
from merge_kit.plan.configs import result_parts
from merge_kit.plan.evidence import Evidence
from merge_kit.plan.findings import Findings
from merge_kit.plan.inputs import Inputs
from merge_kit.plan.models import Model, Part
from merge_kit.plan.stages import assemble
from merge_kit.plan.steps import Made, StepMaker
from merge_kit.plan.values import Artefact, PlanInput
from merge_kit.plan.whole_model import differing
from merge_kit.recipe.values import ModelRef, Recipe, Stage


class _AtHand(Inputs):
    """Models that are there already, by the names that the recipe gives them."""

    def __init__(self, models: Mapping[str, Model]) -> None:
        self._at_hand = dict(models)
        self.errors: list[MergeKitError] = []
        self.refs: dict[str, ModelRef] = {}
        self.donors: dict[str, Model] = {}

    @property
    def models(self) -> list[Model]:
        return [m for key, m in self._at_hand.items() if key not in self.donors]

    def add_stage(self, model: Model) -> None:
        self._at_hand[model.key] = model

    def find(self, ref: ModelRef) -> Model:
        return self._at_hand[ref.path]


@dataclass(frozen=True, slots=True)
class Lowered:
    """The steps of a merge, not placed in files.

    Attributes:
        stages: Tensors of the merges inside, in an order in which each finds what it needs, and
            last those of the whole.
        parts: Components of the result.
        read: What is read.
        seed: Of the whole.
        artefacts: What must be found before the steps of each stage run.
    """

    stages: tuple[tuple[Made, ...], ...]
    parts: tuple[Part, ...]
    assembly: Assembly
    inputs: Inputs
    read: tuple[PlanInput, ...]
    seed: int
    artefacts: tuple[tuple[Artefact, ...], ...]

    @property
    def made(self) -> tuple[Made, ...]:
        """The tensors of the result."""
        return self.stages[-1]

    @property
    def files(self) -> tuple[WeightFile, ...]:
        """Weight files that are read."""
        return tuple(file for one in self.read for file in one.files)


def lower(request: Request) -> Lowered:
    """Return the steps of a merge as the planner makes them.

    Raises:
        MergeKitError: Everything that is wrong with parameters and models, in one list.
    """
    models = request.inputs()
    labels = {model.key: f"input-{i}" for i, model in enumerate(models, start=1)}
    names = request.names(labels)
    requests = {str(names[key]): inner for key, inner in request.stages().items()}
    recipe = read_recipe(request.documents(names))
    found = models_of(models)
    inputs = _AtHand(
        {labels[held.key]: _named(held, found[held.key], labels[held.key]) for held in models}
    )
    maker = _Lowering(recipe, inputs, Evidence(None, request.statistics()))
    for number, stage in enumerate(recipe.stages):
        maker.stage(number, stage, requests[stage.name] if stage.name else request)
    parts = maker.parts or result_parts(maker.assembly, maker.stages[-1])
    _check_components(maker.stages[-1], parts, maker.assembly)
    read = (*(_as_value(m, labels[m.key]) for m in models), *maker.evidence.as_values())
    stages = tuple(map(tuple, maker.stages))
    first = tuple(maker.artefacts)
    return Lowered(stages, parts, maker.assembly, inputs, read, recipe.seed, first)


class _Lowering:
    """Makes the steps of one stage after the other.

    Attributes:
        assembly: Of the last stage.
        parts: Its folders, if it builds a model of another structure.
    """

    assembly: Assembly

    def __init__(self, recipe: Recipe, inputs: _AtHand, evidence: Evidence) -> None:
        self._recipe, self._inputs, self.evidence = recipe, inputs, evidence
        self.stages: list[list[Made]] = []
        self.parts: tuple[Part, ...] = ()
        self.artefacts: list[tuple[Artefact, ...]] = []

    def stage(self, number: int, stage: Stage, request: Request) -> None:
        """Make the steps of a stage and make its result known to later ones."""
        findings = Findings()
        maker = StepMaker(stage, self._recipe.seed, number, self.evidence)
        if builds(stage):
            made = self._built(Site(stage, self._inputs, findings, maker, number))
        else:
            made = self._merged(stage, maker, findings)
        for packed in _packed(made):
            findings.problem(packed)
        findings.raise_any()
        if request.rewrite is not None:
            made = request.rewrite(made, stage.dtype)
        problem = differing([one.step for one in made])
        if problem is not None:
            raise problem
        self.stages.append(made)
        if stage.name is not None:
            parts = self.parts or result_parts(self.assembly, made)
            self._inputs.donors[stage.name] = self.assembly.donor
            tensors = {one.item.name: one.held for one in made}
            self._inputs.add_stage(Model(stage.name, stage.name, parts, tensors))

    def _merged(self, stage: Stage, maker: StepMaker, findings: Findings) -> list[Made]:
        """Return the tensors of a stage that merges."""
        self.assembly, self.parts = assemble(stage, self._inputs, findings), ()
        self.artefacts.append(())
        made = []
        for item in self.assembly.items:
            if not item.parts:
                continue  # reported as missing
            try:
                made.append(maker.make(item))
            except MergeKitError as error:
                findings.problem(error)
        return made

    def _built(self, site: Site) -> list[Made]:
        """Return the tensors of a stage that builds a model of another structure."""
        built = build(site)
        site.findings.raise_any()
        self.assembly, self.parts = built.assembly, built.parts
        self.artefacts.append(built.artefacts)
        return list(built.made)


def _packed(made: Sequence[Made]) -> list[MergeKitError]:
    """Return what is wrong with models whose numbers mean nothing without their scales."""
    mixed = {p.model for m in made if m.fate == "merged" or m.step.agree for p in m.item.parts}
    return [
        MismatchError(
            problem,
            where=model.label,
            hint="merge the model it was made from, and quantise the result",
        )
        for model in dict.fromkeys(p.model for m in made for p in m.item.parts)
        if model in mixed and (problem := packing_problem(model)) is not None
    ]


def _named(held: HeldModel, model: Model, name: str) -> Model:
    label = f"{name}:{held.name}" if held.model.checkpoint is not None else name
    return replace(model, key=name, label=label)


def _as_value(held: HeldModel, name: str) -> PlanInput:
    root = next(iter(held.roots), Path())  # nothing is read of what is in memory
    return PlanInput(name, held.name if held.roots else "", str(held), root, held.files)


def _check_components(made: Sequence[Made], parts: Sequence[Part], assembly: Assembly) -> None:
    """Refuse tensors of components that the model that lends its files does not have."""
    known = {part.path for part in parts}
    other = next((m for m in made if m.held.component not in known), None)
    if other is not None:
        raise MismatchError(
            f"is of the component {other.held.component!r}, which {assembly.donor.label} lacks",
            where=other.item.name,
            hint="load all models from files, or none",
        )
