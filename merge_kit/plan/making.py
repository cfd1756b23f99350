"""Stages that make adapters: which they are, where they may stand, who plans them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from merge_kit.errors import MergeKitError, PlanError
from merge_kit.methods.registry import find
from merge_kit.plan.adapters.made import AdapterPlan
from merge_kit.plan.adapters.stage import adapter_stage
from merge_kit.plan.extracting.stage import extraction
from merge_kit.plan.findings import Findings
from merge_kit.plan.inputs import Inputs
from merge_kit.plan.values import Fitted
from merge_kit.recipe.values import Recipe, Stage


def makes_adapters(stage: Stage) -> bool:
    """Return whether the result of a stage is adapters."""
    return find(stage.merge_method).makes == "adapter"


def misplaced(recipe: Recipe) -> Iterator[MergeKitError]:
    """Yield an error for each stage or rule that would make an adapter where a model is wanted."""
    for stage in recipe.stages[:-1]:
        if makes_adapters(stage):
            yield PlanError(
                f"{stage.merge_method} makes an adapter, and only the last document can",
                where=str(stage.mark),
                hint="run it as a recipe of its own, and write base+adapter with its output",
            )
    for stage in recipe.stages:
        for rule in stage.tensors:
            if rule.merge_method and find(rule.merge_method).makes == "adapter":
                yield PlanError(
                    f"{rule.merge_method} makes an adapter, and cannot merge single tensors",
                    where=str(rule.mark),
                    hint="choose a method that merges models",
                )


def plan_adapters(
    stage: Stage,
    inputs: Inputs,
    findings: Findings,
    *,
    seed: int,
    number: int,
    fitted: Sequence[Fitted] | None,
) -> AdapterPlan:
    """Return what the stage does; arguments are those of `adapter_stage`.

    Raises:
        MergeKitError: Whatever is wrong with it.
    """
    differs = getattr(find(stage.merge_method), "works_on", "") == "difference"
    plan = extraction if differs else adapter_stage
    return plan(stage, inputs, findings, seed=seed, number=number, fitted=fitted)
