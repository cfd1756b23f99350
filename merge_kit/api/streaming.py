"""Writes merges of models on disk that no recipe says, in constant memory."""

from __future__ import annotations

from pathlib import Path

from merge_kit.api.lowering import Lowered
from merge_kit.plan import cost
from merge_kit.plan.layout import place
from merge_kit.plan.spilling import with_spills
from merge_kit.plan.values import Plan, SideFile, Step
from merge_kit.plan.whole_model import model_scans


def stream(
    lowered: Lowered, folder: Path, shard_bytes: int, workers: int, *, allow_nonfinite: bool
) -> list[SideFile]:
    """Write the weights of a merge, slab by slab; return the index files."""
    from merge_kit.engine.run import run_plan  # noqa: PLC0415  (torch)

    plan, indexes = _plan(lowered, shard_bytes, workers)
    run_plan(plan, folder, allow_nonfinite=allow_nonfinite)
    return indexes


def _plan(lowered: Lowered, shard_bytes: int, workers: int) -> tuple[Plan, list[SideFile]]:
    placed, shards, indexes = place(lowered.parts, lowered.made, shard_bytes)
    feeding = [m.step for made in lowered.stages[:-1] for m in made if model_scans(m.step)]
    spilled = [with_spills(step) for step in (*placed, *feeding)]
    every, peak = cost.fit(spilled, workers, len(lowered.read) * len(placed), None)
    steps, more = every[: len(placed)], every[len(placed) :]
    last = len(lowered.stages) - 1
    plan = Plan(
        method=lowered.assembly.stage.merge_method,
        steps=steps,
        shards=tuple(shards),
        side_files=(),
        inputs=lowered.read,
        fates=(),
        layer_map=(),
        architecture="",
        layers=None,
        parameters=sum(t.spec.numel for step in steps for t in step.outputs),
        dtypes=(),
        bill=cost.bill(steps, workers, peak, more, len(lowered.read) * len(placed)),
        notes=(),
        identity="",
        seed=lowered.seed,
        whole_model=(*more, *_scanned(steps, last)),
        artefacts=tuple(one for stage in lowered.artefacts for one in stage),
    )
    return plan, indexes


def _scanned(steps: tuple[Step, ...], group: int) -> list[Step]:
    return [step for step in steps if step.group == group and model_scans(step)]
