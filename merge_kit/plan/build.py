"""Recipe + headers -> Plan."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field

from merge_kit.architecture.quantised import quantisation_problem
from merge_kit.errors import MergeKitError, MismatchError
from merge_kit.io.side_files import OF_COURSE
from merge_kit.plan.accounts import fates
from merge_kit.plan.adapters.made import AdapterPlan
from merge_kit.plan.assemble import Assembly
from merge_kit.plan.building.built import Site
from merge_kit.plan.building.stage import build, builds, misplaced_structures
from merge_kit.plan.chains import Chains
from merge_kit.plan.configs import result_parts
from merge_kit.plan.describe_scales import layer_scales
from merge_kit.plan.evidence import Evidence
from merge_kit.plan.findings import Findings
from merge_kit.plan.finishing import Draft, Limits, finish, package_version
from merge_kit.plan.inputs import Inputs
from merge_kit.plan.layer_origins import StageLayers
from merge_kit.plan.layout import place, place_steps
from merge_kit.plan.making import makes_adapters, misplaced, plan_adapters
from merge_kit.plan.models import Model, Part
from merge_kit.plan.side_files import lends_files, side_files
from merge_kit.plan.stages import assemble
from merge_kit.plan.steps import Made, StepMaker
from merge_kit.plan.values import Artefact, Fitted, Plan, Step
from merge_kit.plan.walk import merged_sources
from merge_kit.plan.whole_model import differing, model_scans
from merge_kit.recipe.values import Recipe, Stage

__all__ = ["build_plan", "package_version"]


@dataclass(frozen=True, slots=True)
class _Planned:
    number: int
    assembly: Assembly
    made: list[Made]
    model: Model


@dataclass
class _Planner:
    recipe: Recipe
    inputs: Inputs
    evidence: Evidence
    findings: Findings = field(default_factory=Findings)
    chains: Chains = field(default_factory=Chains)
    artefacts: list[Artefact] = field(default_factory=list)

    def stage(self, number: int, stage: Stage) -> _Planned:
        """Plan one stage and make its result known to later ones."""
        maker = StepMaker(stage, self.recipe.seed, number, self.evidence)
        if builds(stage):
            return self._built(number, stage, maker)
        assembly = assemble(stage, self.inputs, self.findings)
        made = []
        for item in assembly.items:
            if not item.parts:
                continue  # reported as missing
            try:
                made.append(maker.make(item))
            except MergeKitError as error:
                self.findings.problem(error)
        self._refuse_quantised(assembly, made)
        problem = differing([one.step for one in made])
        if problem is not None:
            self.findings.problem(problem)
        self.findings.raise_any()
        self._note_filters(maker)
        return self._known(number, assembly, made, result_parts(assembly, made))

    def _built(self, number: int, stage: Stage, maker: StepMaker) -> _Planned:
        """Plan a stage that builds a model of another structure."""
        built = build(Site(stage, self.inputs, self.findings, maker, number))
        self.findings.raise_any()
        self._refuse_quantised(built.assembly, built.made)
        self.findings.raise_any()
        self._note_filters(maker)
        self.artefacts += built.artefacts
        return self._known(number, built.assembly, list(built.made), built.parts)

    def _note_filters(self, maker: StepMaker) -> None:
        for note in maker.filters.notes():
            self.findings.note(note)

    def _known(
        self, number: int, assembly: Assembly, made: list[Made], parts: tuple[Part, ...]
    ) -> _Planned:
        """Make the result of a stage known to later ones."""
        stage = assembly.stage
        key = stage.name or "output"
        self.chains.add(key, stage, made)
        model = Model(key, key, parts, {m.item.name: m.held for m in made})
        if stage.name is not None:  # the output feeds no other stage
            self.inputs.donors[key] = assembly.donor
            self.inputs.add_stage(model)
        return _Planned(number, assembly, made, model)

    def adapters(self, stage: Stage, fitted: Sequence[Fitted] | None) -> AdapterPlan:
        """Plan the output's stage, which makes adapters."""
        number = len(self.recipe.stages) - 1
        made = plan_adapters(
            stage, self.inputs, self.findings, seed=self.recipe.seed, number=number, fitted=fitted
        )
        for sentence in made.notes:
            self.findings.note(sentence)
        self.findings.raise_any()
        return made

    def _refuse_quantised(self, assembly: Assembly, made: Sequence[Made]) -> None:
        merged = {part.model for m in made if m.fate == "merged" for part in m.item.parts}
        mixed = {p.model for m in made if m.step.agree for p in m.item.parts}
        for model in self.inputs.models:
            if model not in merged | mixed or model.config is None:
                continue
            dtypes = {spec.dtype for spec in model.specs.values()}
            problem = quantisation_problem(model.config, dtypes)
            if problem is not None:
                self.findings.problem(
                    MismatchError(
                        problem,
                        where=model.label,
                        hint="merge the model it was made from, and quantise the result",
                    )
                )
        del assembly


def build_plan(
    recipe: Recipe,
    *,
    threads: int | None = None,
    memory_bytes: int | None = None,
    slab_blocks: int | None = None,
    fitted: Sequence[Fitted] | None = None,
) -> Plan:
    """Return everything that a run of this recipe does, from headers and config files alone.

    Args:
        threads: Workers; one for each processor by default.
        memory_bytes: Most resident memory of the whole process.
        slab_blocks: Blocks of a slab instead of what fits the cache; it changes no output byte.
        fitted: What a look at the weights found, for a plan that had `fits`; the one that is
            returned then has none, and the ranks that were found.

    Raises:
        MergeKitError: Whatever can be refused before weights are read, all of it in one list.
    """
    inputs = Inputs(recipe)
    planner = _Planner(recipe, inputs, Evidence(recipe.folder))
    for error in (*inputs.errors, *misplaced(recipe), *misplaced_structures(recipe)):
        planner.findings.problem(error)
    planner.findings.raise_any()
    for note in recipe.notes:
        planner.findings.note(note)
    limits = Limits(threads, memory_bytes, slab_blocks)
    *feeding, output = recipe.stages
    planned = [planner.stage(i, stage) for i, stage in enumerate(feeding)]
    if makes_adapters(output):
        made = planner.adapters(output, fitted)
        return finish(_adapter_draft(planner, planned, made), recipe, limits)
    planned.append(planner.stage(len(feeding), output))
    return finish(_model_draft(planner, planned), recipe, limits)


def _model_draft(planner: _Planner, planned: list[_Planned]) -> Draft:
    recipe, inputs, findings, last = planner.recipe, planner.inputs, planner.findings, planned[-1]
    assembly = last.assembly
    steps, shards, indexes = place(last.model.parts, last.made, recipe.shard_size_bytes)
    donor = lends_files(assembly.donor, inputs)
    files = side_files(assembly.stage, donor, last.model.parts, inputs, findings)
    _notes(planner, donor, last)
    for one in planned:
        _note_added_base(findings, one)
    for note in planner.evidence.notes():
        findings.note(note)
    findings.raise_any()
    config = last.model.config or {}
    stack = last.model.described
    return Draft(
        method=assembly.stage.merge_method,
        steps=steps,
        shards=shards,
        side_files=[*files, *indexes],
        inputs=inputs.as_values(assembly.base),
        fates=fates(inputs.models, [(p.assembly, p.made, p.model) for p in planned]),
        notes=findings.notes,
        feeding=_whole_model(planned[:-1]),
        agreeing=_agreeing(planned[:-1]),
        statistics=planner.evidence.as_values(),
        group=last.number,
        architecture=str(config.get("model_type", "")),
        layers=stack.count if stack is not None else None,
        layer_map=tuple(assembly.origins),
        artefacts=tuple(planner.artefacts),
        stage_layers=tuple(_stage_layers(one) for one in planned[:-1]),
    )


def _stage_layers(planned: _Planned) -> StageLayers:
    """Return where the layers of a stage that feeds others come from."""
    origins = tuple(planned.assembly.origins)
    scales = layer_scales(origins, (one.step for one in planned.made))
    models = dict.fromkeys(part.model.key for one in planned.made for part in one.item.parts)
    return StageLayers(
        planned.model.key,
        planned.assembly.stage.merge_method,
        tuple(models),
        origins,
        tuple(tuple(scales.get((one.stack, one.layer), {}).items()) for one in origins),
    )


def _adapter_draft(planner: _Planner, planned: list[_Planned], made: AdapterPlan) -> Draft:
    recipe, inputs, findings = planner.recipe, planner.inputs, planner.findings
    if sum(t.spec.nbytes for s in made.steps for t in s.outputs) > recipe.shard_size_bytes:
        findings.note("an adapter is one file, whatever its size: peft reads no shards")
    steps, shards, _ = place_steps(made.parts, made.steps, sys.maxsize, metadata=made.metadata)
    _note_warnings(planner)
    for one in planned:
        _note_added_base(findings, one)
    for note in planner.evidence.notes():
        findings.note(note)
    output = recipe.stages[-1]
    base = inputs.find(output.base_model) if output.base_model is not None else None
    number = len(recipe.stages) - 1
    inner = {id(m.step): m.step for step in steps for m in merged_sources(step)}
    own = [step for step in inner.values() if model_scans(step) and step.group == number]
    keys = {step.outputs[0].key for step in made.steps}
    return Draft(
        method=output.merge_method,
        steps=steps,
        shards=shards,
        side_files=made.files,
        inputs=inputs.as_values(base),
        fates=made.fates,
        notes=findings.notes,
        feeding=[*_whole_model(planned), *own],
        agreeing=_agreeing(planned),
        statistics=planner.evidence.as_values(),
        group=number,
        fits=frozenset(step.outputs[0].key for step in made.fits),
        looks=[step for step in made.fits if step.outputs[0].key not in keys],
        ranks=made.ranks,
        artefacts=tuple(planner.artefacts),
        stage_layers=tuple(_stage_layers(one) for one in planned),
    )


def _whole_model(planned: Sequence[_Planned]) -> list[Step]:
    """Return the steps of feeding stages that are scanned for statistics of the whole model."""
    return [m.step for p in planned for m in p.made if model_scans(m.step)]


def _agreeing(planned: Sequence[_Planned]) -> tuple[Step, ...]:
    """Return the copies of feeding stages whose inputs must be equal."""
    return tuple(m.step for p in planned for m in p.made if m.step.agree)


def _notes(planner: _Planner, donor: Model, last: _Planned) -> None:
    findings, stage = planner.findings, last.assembly.stage
    models = [model for model in planner.inputs.models if model.adapter is None]
    if stage.base_model is None and len(models) > 1:
        findings.note(f"no base_model: config and tokenizer are those of {donor.label}")
    _note_warnings(planner)
    assert donor.checkpoint is not None
    for name, why in donor.checkpoint.left_out.items():
        if why not in OF_COURSE:
            findings.note(f"{donor.label}: {name} is left out: {why}")
    for made in last.made:
        if any(part.stands_for for part in made.item.parts):
            findings.note(f"{made.item.name}: {made.item.note}")


def _note_warnings(planner: _Planner) -> None:
    for model in planner.inputs.models:
        assert model.checkpoint is not None
        for warning in model.checkpoint.warnings:
            planner.findings.note(f"{model.label}: {warning}")


def _note_added_base(findings: Findings, planned: _Planned) -> None:
    """Say with what weight a base takes part that the recipe does not list."""
    for made in planned.made:
        method = made.step.method
        added = next((i for i, part in enumerate(made.item.parts) if part.added), None)
        if method is None or method.takes_base or added is None:
            continue
        findings.note(
            f"the base {made.step.models[added]} is not listed and is added as a model of "
            f"{made.item.method}, with weight {made.step.weights[added]:g}"
        )
        return
