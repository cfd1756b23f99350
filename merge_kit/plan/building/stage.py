"""Stages that build models of another structure: which they are, and who builds what."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from importlib import import_module

from merge_kit.errors import PlanError
from merge_kit.methods.registry import find
from merge_kit.plan.building.built import Builder, Built, Site
from merge_kit.plan.building.settings import structure_method
from merge_kit.recipe.values import Recipe, Stage

BUILDERS: Mapping[str, str] = {
    "depth_upscale": "depth",
    "sparse_upcycle": "upcycling",
    "moe_to_dense": "dense",
    "match_experts": "matching",
    "pad": "width",
    "crop": "width",
    "project": "width",
}
"""The module of this package whose `build` carries out a method."""


def builds(stage: Stage) -> bool:
    """Return whether a stage builds a model of another structure."""
    return find(stage.merge_method).makes == "structure"


def build(site: Site) -> Built:
    """Return what a stage builds.

    Raises:
        MergeKitError: If it cannot be built at all.
    """
    stage = site.stage
    if stage.slices or stage.modules or stage.tensors or stage.uses:
        given = ("slices", "modules", "tensors", "uses")
        odd = next(key for key in given if getattr(stage, key))
        raise PlanError(
            f"{stage.merge_method} takes models, and no {odd}",
            where=str(stage.mark),
            hint="give this document a name, and use its result as a model of another",
        )
    module = import_module(f"merge_kit.plan.building.{BUILDERS[stage.merge_method]}")
    builder: Builder = module.build
    return builder(site, structure_method(stage))


def misplaced_structures(recipe: Recipe) -> Iterator[PlanError]:
    """Yield an error for each rule or slice whose method builds whole models."""
    for stage in recipe.stages:
        inside = (part for module in stage.modules for part in module.slices)
        parts = [(part.merge_method, part.mark) for part in (*stage.slices, *inside)]
        rules = [(rule.merge_method, rule.mark) for rule in stage.tensors]
        for method, mark in (*parts, *rules):
            if method and find(method).makes == "structure":
                yield PlanError(
                    f"{method} builds a whole model, and cannot merge a part of one",
                    where=str(mark),
                    hint="give it a document with a name, and use its result as a model",
                )
