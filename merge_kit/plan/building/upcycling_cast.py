"""Who plays which part in a mixture of experts: the base, and the model of each expert."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from merge_kit.architecture.experts import (
    LAYOUTS,
    Layout,
    is_sparse,
    layout_for,
    possible_layouts,
)
from merge_kit.architecture.stacks import Stack
from merge_kit.errors import PlanError, RecipeError
from merge_kit.methods.sparse_upcycle import SparseUpcycle
from merge_kit.plan.assemble import Assembler
from merge_kit.plan.building.built import Site
from merge_kit.plan.building.settings import place_of, structure_method
from merge_kit.plan.models import Held, Model
from merge_kit.recipe.values import NO_PARAMETERS, Entry, Mark, ModelRef

COPIES = 8
"""Experts made of a single model, unless the recipe says how many."""


@dataclass(frozen=True, slots=True)
class Dense:
    """A dense model, as the recipe refers to it.

    Attributes:
        stack: Its layers.
        layers: Layer -> suffix -> full name.
    """

    ref: ModelRef
    model: Model
    stack: Stack
    layers: Mapping[int, Mapping[str, str]]

    def held(self, layer: int, suffix: str) -> Held:
        """Return a tensor of a layer."""
        return self.model.tensors[self.layers[layer][suffix]]


@dataclass(frozen=True, slots=True)
class Expert:
    """An expert of every sparse layer.

    Attributes:
        dense: The model whose MLPs it takes.
        noise: Standard deviation of what is added to them.
        residual: Factor on their output projections, after that.
        key: What its noise goes by: its number, or "shared".
    """

    dense: Dense
    noise: float
    residual: float
    key: str


@dataclass(frozen=True, slots=True)
class Cast:
    """Everything that a mixture of experts is made of.

    Attributes:
        method: With one value an expert for what each may set, the shared one last.
        layout: The result's.
        base: Whose other tensors, config and files the result takes.
        models: The listed models, each once; the base if there are none.
        entries: The entry of each expert.
        experts: In their order.
        shared: The expert that every token passes, None where the layout has none.
        layers: The layers that get experts, ascending.
    """

    method: SparseUpcycle
    layout: Layout
    base: Dense
    models: tuple[Dense, ...]
    entries: tuple[Entry, ...]
    experts: tuple[Expert, ...]
    shared: Expert | None
    layers: tuple[int, ...]

    @property
    def dense_layers(self) -> tuple[int, ...]:
        """The layers without experts, ascending."""
        return tuple(i for i in range(self.base.stack.count) if i not in set(self.layers))


def cast_of(site: Site, method: SparseUpcycle, maker: Assembler) -> Cast:
    """Return who plays which part; what is wrong with numbers goes to the findings.

    Raises:
        MergeKitError: If the base cannot become a mixture of experts, or a model has no layers.
    """
    stage = site.stage
    listed = stage.models or (_alone(stage.base_model, stage.mark),)
    base_ref = stage.base_model or listed[0].model
    layout = _layout(site, method, maker.donor, base_ref)
    base = _dense(maker.donor, base_ref, None)
    models = tuple(
        _dense(maker.find(entry.model, stage.base_model), entry.model, base.stack)
        for entry in listed
    )
    chosen = _chosen(site, method, len(listed))
    shared = _shared_entries(site, layout)
    own = structure_method(stage, (*(listed[i] for i in chosen), *shared))
    assert isinstance(own, SparseUpcycle)  # the same method with more values
    settings = list(zip(own.noise_scale, own.residual_scale, strict=True))
    experts = [Expert(models[i], *settings[number], str(number)) for number, i in enumerate(chosen)]
    shared_expert = Expert(base, 0.0, 1.0, "shared") if layout.shared else None
    for entry in shared:
        dense = _dense(maker.find(entry.model, stage.base_model), entry.model, base.stack)
        shared_expert = Expert(dense, *settings[-1], "shared")
    layers = _layers(site, method, layout, base)
    entries = tuple(listed[i] for i in chosen)
    return Cast(own, layout, base, models, entries, tuple(experts), shared_expert, layers)


def _alone(ref: ModelRef | None, mark: Mark) -> Entry:
    if ref is None:
        hint = "write base_model: MODEL for copies of one model, or list models"
        raise PlanError("there is no model to make experts of", where=str(mark), hint=hint)
    return Entry(ref, NO_PARAMETERS, ref.mark)


def _layout(site: Site, method: SparseUpcycle, base: Model, ref: ModelRef) -> Layout:
    where, named = str(ref.mark), method.architecture
    if is_sparse(base.config, base.tensors):
        raise PlanError(
            f"{base.label} is a mixture of experts already",
            where=where,
            hint="moe_to_dense makes a dense model of it; models of equal layout can be merged",
        )
    if base.config is None:
        if named is None:
            raise PlanError(
                f"{base.label} has no config.json, and its names do not tell what it is",
                where=where,
                hint="name the result's layout: parameters: {architecture: mixtral}",
            )
        return LAYOUTS[named]
    kind = str(base.config.get("model_type", ""))
    layout = layout_for(kind)
    if layout is None:
        shown = f"a {kind}" if kind else "a model without model_type"
        raise PlanError(
            f"{base.label} is {shown}, for which there is no sparse architecture",
            where=where,
            hint=f"possible: {possible_layouts()}",
        )
    if named is None:
        return _with_shared(site, layout, kind)
    if kind not in LAYOUTS[named].sources:
        setting = site.stage.parameters.get("architecture")
        raise PlanError(
            f"{base.label} is a {kind}, which cannot become a {named}",
            where=str(setting.mark) if setting is not None else where,
            hint=possible_layouts([kind]),
        )
    return LAYOUTS[named]


def _with_shared(site: Site, layout: Layout, kind: str) -> Layout:
    """Return a layout with a shared expert if the recipe has one, else the given one."""
    if layout.shared or not site.stage.shared_experts:
        return layout
    fitting = (other for other in LAYOUTS.values() if other.shared and kind in other.sources)
    return next(fitting, layout)


def _dense(model: Model, ref: ModelRef, like: Stack | None) -> Dense:
    stack = next((s for s in model.stacks if like and s.prefix == like.prefix), model.described)
    if stack is None:
        problem = f"which tensors of {model.label} are its layers cannot be told"
        hint = "is it a language model of one stack? `mergekit inspect` lists its parts"
        raise PlanError(problem, where=str(ref.mark), hint=hint)
    return Dense(ref, model, stack, model.by_layer(stack))


def _chosen(site: Site, method: SparseUpcycle, listed: int) -> list[int]:
    """Return the place in the list of the model of each expert."""
    count = method.num_experts or (COPIES if listed == 1 else listed)
    if count % listed:
        few = count < listed
        problem = f"num_experts is {count}, and {listed} models are listed"
        hint = f"each model is one expert: leave num_experts out, or write {listed} or a multiple"
        site.findings.problem(
            PlanError(
                problem if few else f"{problem}, which {count} is no multiple of",
                where=place_of(site.stage, "num_experts"),
                hint=hint,
            )
        )
        count = listed
    if method.experts_per_token > count:
        there = "is 1 expert" if count == 1 else f"are {count} experts"
        problem = f"experts_per_token is {method.experts_per_token}, and there {there}"
        hint = "a token passes each expert at most once: lower it, or raise num_experts"
        where = place_of(site.stage, "experts_per_token")
        error = RecipeError(problem, where=where, hint=hint)
        site.findings.problem(error)
    return [i % listed for i in range(count)]


def _shared_entries(site: Site, layout: Layout) -> Sequence[Entry]:
    """Return the entry of the shared expert, if the recipe has one and the layout can hold it."""
    given = site.stage.shared_experts
    if given and not layout.shared:
        problem = f"a {layout.model_type} has no expert that every token passes"
        hint = "leave shared_experts out; qwen2_moe has one"
        site.findings.problem(PlanError(problem, where=str(given[0].mark), hint=hint))
        return ()
    return given


def _layers(site: Site, method: SparseUpcycle, layout: Layout, base: Dense) -> tuple[int, ...]:
    count, asked = base.stack.count, method.sparse_layers
    every = range(count)
    if asked is None or asked.word == "all":
        return tuple(every)
    if asked.word:
        found = tuple(i for i in every if i % 2 == ("even", "odd").index(asked.word))
    else:
        found = tuple(sorted(set(asked.numbers)))
    where = place_of(site.stage, "sparse_layers")
    beyond = [i for i in found if i >= count]
    problem = hint = ""
    if beyond:
        problem = f"sparse_layers names layer {beyond[0]}, and {base.model.label} has {count}"
        hint = "layers are numbered from 0"
    elif not found:
        problem = f"sparse_layers: {asked.word} names no layer of {base.model.label}"
        hint = f"it has {count}, numbered from 0"
    elif not layout.some_layers and len(found) < count:
        problem = f"every layer of a {layout.model_type} has experts, and sparse_layers names some"
        hint = "leave it out; a qwen2_moe or qwen3_moe can keep layers dense"
    if problem:
        site.findings.problem(PlanError(problem, where=where, hint=hint))
        return tuple(every)
    return found
