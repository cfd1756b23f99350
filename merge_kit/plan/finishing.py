"""What both kinds of plans end with: slabs and memory, the bill, the identity."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import PackageNotFoundError, version

from merge_kit.core.dtypes import is_float
from merge_kit.core.sizes import format_size
from merge_kit.errors import PlanError
from merge_kit.io.values import WeightFile
from merge_kit.plan import cost
from merge_kit.plan.building.matching_task import ExpertMatching
from merge_kit.plan.building.routers_tasks import EmbeddedRouters, HiddenRouters
from merge_kit.plan.layer_origins import LayerOrigin, StageLayers
from merge_kit.plan.process import process_bytes
from merge_kit.plan.spilling import with_spills
from merge_kit.plan.standing import standing_bytes
from merge_kit.plan.step_memory import ALGEBRA_BYTES
from merge_kit.plan.values import (
    Artefact,
    Bill,
    Fate,
    ModuleRank,
    Plan,
    PlanInput,
    Shard,
    SideFile,
    Step,
)
from merge_kit.plan.walk import merged_below, sources_in
from merge_kit.plan.whole_model import model_scans
from merge_kit.recipe.values import Recipe

_LIBRARIES: Mapping[type, tuple[str, ...]] = {
    EmbeddedRouters: ("tokenizers", "transformers"),
    HiddenRouters: ("tokenizers", "transformers"),
    ExpertMatching: ("scipy",),
}
"""What finds artefacts beside this package and torch, by the kind of task."""


@dataclass(frozen=True, slots=True)
class Limits:
    """What a run may take.

    Attributes:
        threads: Workers; None for one for each processor.
        memory_bytes: Most resident memory of the whole process, None for any.
        slab_blocks: Blocks of a slab, None for what fits the cache.
    """

    threads: int | None
    memory_bytes: int | None
    slab_blocks: int | None


@dataclass(frozen=True, slots=True)
class Draft:
    """A plan without its memory; see `Plan`.

    Attributes:
        steps: Placed, in write order.
        feeding: Steps of feeding stages with statistics over their whole result.
        group: Number of the output's stage.
        fits: Keys of the first outputs of the steps that must be looked at first.
        looks: What must be looked at besides, and is no step.
    """

    method: str
    steps: Sequence[Step]
    shards: Sequence[Shard]
    side_files: Sequence[SideFile]
    inputs: tuple[PlanInput, ...]
    fates: Sequence[Fate]
    notes: tuple[str, ...]
    feeding: Sequence[Step]
    agreeing: tuple[Step, ...]
    statistics: tuple[PlanInput, ...]
    group: int
    architecture: str = ""
    layers: int | None = None
    layer_map: tuple[LayerOrigin, ...] = ()
    fits: frozenset[str] = frozenset()
    looks: Sequence[Step] = ()
    ranks: tuple[ModuleRank, ...] = ()
    artefacts: tuple[Artefact, ...] = ()
    stage_layers: tuple[StageLayers, ...] = ()


def finish(draft: Draft, recipe: Recipe, limits: Limits) -> Plan:
    """Return the plan of a draft.

    Raises:
        PlanError: If the memory is too small.
    """
    steps, workers = draft.steps, cost.worker_count(limits.threads)
    tensors = len(draft.fates) + len(steps)
    spilled = [with_spills(step) for step in (*steps, *draft.feeding, *draft.looks)]
    blocks = [limits.slab_blocks] if limits.slab_blocks is not None else None
    kept = _kept_bytes(draft.artefacts)
    room = None if limits.memory_bytes is None else limits.memory_bytes - kept
    every, peak = cost.fit(spilled, workers, tensors, room, blocks)
    sized, rest = every[: len(steps)], every[len(steps) :]
    more, looks = rest[: len(draft.feeding)], rest[len(draft.feeding) :]
    fits = (*(step for step in sized if step.outputs[0].key in draft.fits), *looks)
    return Plan(
        method=draft.method,
        steps=sized,
        shards=tuple(draft.shards),
        side_files=tuple(sorted(draft.side_files, key=lambda f: f.name)),
        inputs=draft.inputs,
        fates=tuple(draft.fates),
        layer_map=draft.layer_map,
        architecture=draft.architecture,
        layers=draft.layers,
        parameters=sum(t.spec.numel for s in sized for t in s.outputs),
        dtypes=_dtypes(sized),
        bill=_with_artefacts(
            cost.bill(sized, workers, peak, (*more, *fits), tensors), draft.artefacts, limits
        ),
        notes=draft.notes,
        identity=_identity(recipe, draft, sized),
        seed=recipe.seed,
        agreeing=draft.agreeing,
        whole_model=(*more, *(s for s in sized if s.group == draft.group and model_scans(s))),
        statistics=draft.statistics,
        fits=fits,
        ranks=draft.ranks,
        artefacts=draft.artefacts,
        stage_layers=draft.stage_layers,
    )


def _with_artefacts(bill: Bill, artefacts: Sequence[Artefact], limits: Limits) -> Bill:
    """Return the bill with what is found before the run.

    Raises:
        PlanError: If the memory is too small for that.
    """
    if not artefacts:
        return bill
    _refuse_whole_models(artefacts)
    kept = _kept_bytes(artefacts)
    worst = max(artefacts, key=lambda one: one.peak_bytes)
    alone = process_bytes() + ALGEBRA_BYTES + kept + worst.peak_bytes
    if limits.memory_bytes is not None and alone > limits.memory_bytes:
        raise PlanError(
            f"the budget is {format_size(limits.memory_bytes)}, and finding {worst.key} needs "
            f"{format_size(alone)}",
            where="--memory",
            hint="raise --memory",
        )
    return replace(
        bill,
        read_bytes=bill.read_bytes + sum(one.read_bytes for one in artefacts),
        scratch_bytes=max(bill.scratch_bytes, standing_bytes(artefacts)),
        flops=bill.flops + sum(one.flops for one in artefacts),
        solves=bill.solves + sum(one.flops > 0 for one in artefacts),
        peak_bytes=max(bill.peak_bytes + kept, alone),
    )


def _kept_bytes(artefacts: Sequence[Artefact]) -> int:
    """Return what artefacts take during the run, and the libraries that found them."""
    libraries = max((one.library_bytes for one in artefacts), default=0)
    return libraries + sum(one.kept_bytes for one in artefacts)


def _refuse_whole_models(artefacts: Sequence[Artefact]) -> None:
    """Refuse what would be found of a merge with statistics over its whole model.

    Raises:
        PlanError: If there is such a one.
    """
    for one in artefacts:
        inner = [m.step for s in sources_in(one.task) for m in merged_below(s)]
        method = next((s.method for s in inner if model_scans(s) and s.method), None)
        if method is not None:
            raise PlanError(
                f"{one.key} is found of a merge by {method.method_name}, whose statistics are of "
                "the whole model",
                where="recipe",
                hint="run that merge as a recipe of its own, and use its output as a model",
            )


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


def library_versions(artefacts: Sequence[Artefact]) -> dict[str, str]:
    """Return the versions of the libraries on which it depends what is found before a run."""
    names = {name for one in artefacts for name in _LIBRARIES.get(type(one.task), ())}
    return {name: package_version(name) for name in sorted(names)}


def _identity(recipe: Recipe, draft: Draft, steps: Sequence[Step]) -> str:
    """Return a hash of everything that decides the output's bytes."""
    inputs = (*draft.inputs, *draft.statistics)
    content = {
        "versions": [package_version("merge_kit"), package_version("torch")],
        "libraries": library_versions(draft.artefacts),
        "recipe": recipe.text,
        "seed": recipe.seed,
        "shard_size": recipe.shard_size_bytes,
        "inputs": [[_identity_of(file) for file in model.files] for model in inputs],
        "targets": [(t.key, t.spec.dtype, t.shard, t.offset) for s in steps for t in s.outputs],
    }
    return hashlib.blake2b(json.dumps(content).encode(), digest_size=16).hexdigest()
