"""Recipe + headers -> Plan."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from merge_kit.architecture.quantised import quantisation_problem
from merge_kit.core.dtypes import is_float
from merge_kit.errors import MergeKitError, MismatchError
from merge_kit.io.side_files import OF_COURSE
from merge_kit.io.values import WeightFile
from merge_kit.plan import cost
from merge_kit.plan.accounts import fates
from merge_kit.plan.assemble import Assembly
from merge_kit.plan.chains import Chains
from merge_kit.plan.configs import result_parts
from merge_kit.plan.evidence import Evidence
from merge_kit.plan.findings import Findings
from merge_kit.plan.inputs import Inputs
from merge_kit.plan.layout import place
from merge_kit.plan.models import Model
from merge_kit.plan.side_files import lends_files, side_files
from merge_kit.plan.spilling import with_spills
from merge_kit.plan.stages import assemble
from merge_kit.plan.steps import Made, StepMaker
from merge_kit.plan.values import Plan, Step
from merge_kit.plan.whole_model import differing, model_scans
from merge_kit.recipe.values import Recipe, Stage


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

    def stage(self, number: int, stage: Stage) -> _Planned:
        """Plan one stage and make its result known to later ones."""
        assembly = assemble(stage, self.inputs, self.findings)
        maker = StepMaker(stage, self.recipe.seed, number, self.evidence)
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
        parts = result_parts(assembly, made)
        key = stage.name or "output"
        self.chains.add(key, stage, made)
        model = Model(key, key, parts, {m.item.name: m.held for m in made})
        if stage.name is not None:  # the output feeds no other stage
            self.inputs.donors[key] = assembly.donor
            self.inputs.add_stage(model)
        return _Planned(number, assembly, made, model)

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
) -> Plan:
    """Return everything that a run of this recipe does, from headers and config files alone.

    Args:
        threads: Workers; one for each processor by default.
        memory_bytes: Most resident memory of the whole process.
        slab_blocks: Blocks of a slab instead of what fits the cache; it changes no output byte.

    Raises:
        MergeKitError: Whatever can be refused before weights are read, all of it in one list.
    """
    inputs = Inputs(recipe)
    planner = _Planner(recipe, inputs, Evidence(recipe.folder))
    for error in inputs.errors:
        planner.findings.problem(error)
    planner.findings.raise_any()
    for note in recipe.notes:
        planner.findings.note(note)
    planned = [planner.stage(i, stage) for i, stage in enumerate(recipe.stages)]
    return _finish(planner, planned, threads, memory_bytes, slab_blocks)


def _finish(
    planner: _Planner,
    planned: list[_Planned],
    threads: int | None,
    memory_bytes: int | None,
    slab_blocks: int | None,
) -> Plan:
    recipe, inputs, findings, last = planner.recipe, planner.inputs, planner.findings, planned[-1]
    assembly = last.assembly
    steps, shards, indexes = place(last.model.parts, last.made, recipe.shard_size_bytes)
    workers = cost.worker_count(threads)
    donor = lends_files(assembly.donor, inputs)
    files = side_files(assembly.stage, donor, last.model.parts, inputs, findings)
    _notes(planner, donor, last)
    for one in planned:
        _note_added_base(findings, one)
    for note in planner.evidence.notes():
        findings.note(note)
    findings.raise_any()
    feeding = [m.step for p in planned[:-1] for m in p.made if model_scans(m.step)]
    rows = fates(inputs.models, [(p.assembly, p.made, p.model) for p in planned])
    spilled = [with_spills(step) for step in (*steps, *feeding)]
    blocks = [slab_blocks] if slab_blocks is not None else None
    every, peak = cost.fit(spilled, workers, len(rows) + len(steps), memory_bytes, blocks)
    sized, more = every[: len(steps)], every[len(steps) :]
    values, statistics = inputs.as_values(assembly.base), planner.evidence.as_values()
    config = last.model.config or {}
    stack = last.model.described
    return Plan(
        method=assembly.stage.merge_method,
        steps=sized,
        shards=tuple(shards),
        side_files=tuple(sorted([*files, *indexes], key=lambda f: f.name)),
        inputs=values,
        fates=tuple(rows),
        layer_map=tuple(assembly.origins),
        architecture=str(config.get("model_type", "")),
        layers=stack.count if stack is not None else None,
        parameters=sum(t.spec.numel for s in sized for t in s.outputs),
        dtypes=_dtypes(sized),
        bill=cost.bill(sized, workers, peak, more, len(rows) + len(steps)),
        notes=findings.notes,
        identity=_identity(recipe, (*values, *statistics), sized),
        seed=recipe.seed,
        agreeing=tuple(m.step for p in planned[:-1] for m in p.made if m.step.agree),
        whole_model=(*more, *(s for s in sized if s.group == last.number and model_scans(s))),
        statistics=statistics,
    )


def _notes(planner: _Planner, donor: Model, last: _Planned) -> None:
    findings, stage = planner.findings, last.assembly.stage
    if stage.base_model is None and len(planner.inputs.models) > 1:
        findings.note(f"no base_model: config and tokenizer are those of {donor.label}")
    for model in planner.inputs.models:
        assert model.checkpoint is not None
        for warning in model.checkpoint.warnings:
            findings.note(f"{model.label}: {warning}")
    assert donor.checkpoint is not None
    for name, why in donor.checkpoint.left_out.items():
        if why not in OF_COURSE:
            findings.note(f"{donor.label}: {name} is left out: {why}")
    for made in last.made:
        if any(part.stands_for for part in made.item.parts):
            findings.note(f"{made.item.name}: {made.item.note}")


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


def _dtypes(steps: Sequence[Step]) -> tuple[tuple[str, int], ...]:
    counts = Counter(t.spec.dtype for s in steps for t in s.outputs)
    return tuple(sorted(counts.items(), key=lambda row: (not is_float(row[0]), -row[1], row[0])))


def package_version(name: str) -> str:
    """Return the installed version of a package, "" if it is not installed."""
    try:
        return version(name)
    except PackageNotFoundError:
        return ""


def _identity_of(file: WeightFile) -> tuple[str, int, int, int, int]:
    """Return what tells a file from another one of its name: archives give all one time."""
    return file.name, file.nbytes, file.mtime_ns, file.inode, file.ctime_ns


def _identity(recipe: Recipe, inputs: Sequence[Any], steps: Sequence[Step]) -> str:
    """Return a hash of everything that decides the output's bytes."""
    content = {
        "versions": [package_version("merge_kit"), package_version("torch")],
        "recipe": recipe.text,
        "seed": recipe.seed,
        "shard_size": recipe.shard_size_bytes,
        "inputs": [[_identity_of(file) for file in model.files] for model in inputs],
        "targets": [(t.key, t.spec.dtype, t.shard, t.offset) for s in steps for t in s.outputs],
    }
    return hashlib.blake2b(json.dumps(content).encode(), digest_size=16).hexdigest()
