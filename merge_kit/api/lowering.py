"""A merge of models at hand as a recipe, and as the steps that the planner makes of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from merge_kit.api.held import HeldModel
from merge_kit.core.dtypes import RECIPE_DTYPES
from merge_kit.core.names import nearest
from merge_kit.errors import MergeKitError, MismatchError, UsageError
from merge_kit.io.values import WeightFile
from merge_kit.plan.assemble import Assembly
from merge_kit.plan.configs import result_parts
from merge_kit.plan.findings import Findings
from merge_kit.plan.inputs import Inputs
from merge_kit.plan.models import Model, Part
from merge_kit.plan.stages import assemble
from merge_kit.plan.steps import Made, StepMaker
from merge_kit.recipe.parse import recipe_from_mapping
from merge_kit.recipe.values import ModelRef

Parameters = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Request:
    """What is to be merged, and how.

    Attributes:
        own: Parameters of each model, in the order of `models`; empty if none has any.
        parameters: Parameters of the merge.
        on_conflict: What to do with integer and bool tensors that differ.
    """

    method: str
    models: tuple[HeldModel, ...]
    base: HeldModel | None = None
    own: tuple[Parameters, ...] = ()
    parameters: Parameters = field(default_factory=dict)
    seed: int = 0
    dtype: str | None = None
    on_conflict: str = "error"

    def inputs(self) -> list[HeldModel]:
        """Return the models, each once, a base that is not among them last."""
        base = () if self.base is None else (self.base,)
        return list({model.key: model for model in (*self.models, *base)}.values())

    def recipe(self, names: Mapping[object, str]) -> dict[str, Any]:
        """Return the recipe as a mapping.

        Args:
            names: How the recipe calls each model, by the model's key.
        """
        own = self.own or ({},) * len(self.models)
        recipe: dict[str, Any] = {
            "merge_method": self.method,
            "models": [
                {"model": names[model.key], "parameters": dict(parameters)}
                for model, parameters in zip(self.models, own, strict=True)
            ],
            "parameters": dict(self.parameters),
            "seed": self.seed,
            "on_conflict": self.on_conflict,
        }
        if self.base is not None:
            recipe["base_model"] = names[self.base.key]
        if self.dtype is not None:
            recipe["dtype"] = self.dtype
        return recipe


def with_dtype(request: Request, dtype: object) -> Request:
    """Return the request with an output dtype: "bfloat16", torch.bfloat16, or None for none."""
    if dtype is None:
        return request
    name = str(dtype).removeprefix("torch.")
    if name not in RECIPE_DTYPES:
        raise UsageError(f"found the dtype {name!r}", hint=nearest(name, RECIPE_DTYPES))
    return replace(request, dtype=name)


class _AtHand(Inputs):
    """Models that are there already, by the names that the recipe gives them."""

    def __init__(self, models: Mapping[str, Model]) -> None:
        self._at_hand = models
        self.errors: list[MergeKitError] = []
        self.refs: dict[str, ModelRef] = {}
        self.donors: dict[str, Model] = {}

    @property
    def models(self) -> list[Model]:
        return list(self._at_hand.values())

    def find(self, ref: ModelRef) -> Model:
        return self._at_hand[ref.path]


@dataclass(frozen=True, slots=True)
class Lowered:
    """The steps of a merge, not placed in files.

    Attributes:
        parts: Components of the result.
        files: Weight files that are read.
    """

    made: tuple[Made, ...]
    parts: tuple[Part, ...]
    assembly: Assembly
    inputs: Inputs
    files: tuple[WeightFile, ...]


def lower(request: Request) -> Lowered:
    """Return the steps of a merge as the planner makes them.

    Raises:
        MergeKitError: Everything that is wrong with parameters and models, in one list.
    """
    models = request.inputs()
    names = {model.key: f"input-{i}" for i, model in enumerate(models, start=1)}
    recipe = recipe_from_mapping(request.recipe(names))
    (stage,) = recipe.stages
    inputs = _AtHand({names[model.key]: _named(model, names[model.key]) for model in models})
    findings = Findings()
    assembly = assemble(stage, inputs, findings)
    maker, made = StepMaker(stage, recipe.seed, 0), []
    for item in assembly.items:
        if not item.parts:
            continue  # reported as missing
        try:
            made.append(maker.make(item))
        except MergeKitError as error:
            findings.problem(error)
    findings.raise_any()
    parts = result_parts(assembly, made)
    _check_components(made, parts, assembly)
    files = tuple(file for model in models for file in model.files)
    return Lowered(tuple(made), parts, assembly, inputs, files)


def _named(held: HeldModel, name: str) -> Model:
    checkpoint = held.model.checkpoint
    label = f"{name}:{checkpoint.name}" if checkpoint is not None else name
    return replace(held.model, key=name, label=label)


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
