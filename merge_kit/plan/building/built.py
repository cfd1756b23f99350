"""What a stage makes that builds a model of another structure."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from merge_kit.methods.structures import StructureMethod
from merge_kit.plan.assemble import Assembly
from merge_kit.plan.findings import Findings
from merge_kit.plan.inputs import Inputs
from merge_kit.plan.models import Part
from merge_kit.plan.steps import Made, StepMaker
from merge_kit.plan.values import Artefact
from merge_kit.recipe.values import Stage


@dataclass(frozen=True, slots=True)
class Site:
    """What a builder works with.

    Attributes:
        stage: The stage, as the recipe has it.
        inputs: The models that it refers to.
        findings: Where problems and notes go; a builder goes on as far as it can.
        maker: Turns items into steps.
        number: Number of the stage.
    """

    stage: Stage
    inputs: Inputs
    findings: Findings
    maker: StepMaker
    number: int


@dataclass(frozen=True, slots=True)
class Built:
    """A model of another structure.

    Attributes:
        assembly: Stage, donor (whose side files the output takes), base, and where layers come
            from (`origins`); `items` are those of `made`.
        made: The output's tensors in the order of the model.
        parts: The output's folders with their config.json; the first is the main one.
        artefacts: What must be found before the run.
    """

    assembly: Assembly
    made: tuple[Made, ...]
    parts: tuple[Part, ...]
    artefacts: tuple[Artefact, ...] = ()


Builder = Callable[[Site, StructureMethod], Built]
"""A builder gets the method with its checked parameters.

Raises MergeKitError for what cannot be built at all; other problems go to `site.findings`.
"""
