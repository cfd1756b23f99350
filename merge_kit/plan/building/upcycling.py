"""Mixtures of experts out of dense models."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from merge_kit.architecture.experts import BUFFERS, MLP
from merge_kit.architecture.experts_config import Sparsity, sparse_config
from merge_kit.architecture.experts_windows import version_notes
from merge_kit.architecture.stacks import split_layer
from merge_kit.methods.sparse_upcycle import SparseUpcycle
from merge_kit.methods.structures import StructureMethod
from merge_kit.plan.accounts import ingredients
from merge_kit.plan.assemble import Assembler, Assembly
from merge_kit.plan.building.built import Built, Site
from merge_kit.plan.building.routers import plan_routers
from merge_kit.plan.building.upcycling_cast import Cast, Dense, cast_of
from merge_kit.plan.building.upcycling_checks import check, distinct, mlp_shape
from merge_kit.plan.building.upcycling_tensors import Weaver
from merge_kit.plan.configs import result_parts
from merge_kit.plan.describe import plural
from merge_kit.plan.layer_origins import LayerOrigin
from merge_kit.plan.models import Model, Part
from merge_kit.plan.slicing import labels_of


def build(site: Site, method: StructureMethod) -> Built:
    """Return a mixture of experts.

    Raises:
        MergeKitError: If the models do not fit together as one.
    """
    assert isinstance(method, SparseUpcycle)  # BUILDERS says so
    maker = Assembler(site.stage, site.inputs, site.findings)
    cast = cast_of(site, method, maker)
    check(site, cast)
    site.findings.raise_any()
    shape = mlp_shape(cast.experts[0].dense, cast.layers[0])
    assert shape is not None  # checked
    routers = plan_routers(
        site,
        cast.method,
        cast.base.model,
        [entry.prompts for entry in cast.entries],
        next((entry.prompts for entry in site.stage.shared_experts), None),
        cast.layers,
        shape[0],
        with_shared=cast.shared is not None,
    )
    site.findings.raise_any()
    made = tuple(Weaver(site, cast, routers, maker).tensors())
    for note in _notes(site, cast):
        site.findings.note(note)
    assembly = Assembly(
        site.stage,
        cast.base.model,
        maker.base,
        [one.item for one in made],
        origins=list(_origins(cast)),
        left_out=dict(_left_out(cast)),
    )
    main = cast.base.model.main
    parts = tuple(
        _sparse(part, cast, shape[1]) if part.path == main.path else part
        for part in result_parts(assembly, made)
    )
    for text in (part.config_text for part in parts if part.path == main.path):
        for note in version_notes(text, cast.base.stack.count) if text is not None else ():
            site.findings.note(note)
    return Built(assembly, made, parts, routers.artefacts)


def _sparse(part: Part, cast: Cast, width: int) -> Part:
    """Return the main component with the config of a mixture of experts."""
    if part.config_text is None:
        return part
    shared = mlp_shape(cast.shared.dense, cast.layers[0]) if cast.shared is not None else None
    sparsity = Sparsity(
        experts=len(cast.experts),
        top_k=cast.method.experts_per_token,
        expert_width=width,
        shared_width=shared[1] if shared is not None else 0,
        layers=cast.base.stack.count,
        dense_layers=cast.dense_layers,
    )
    return replace(part, config_text=sparse_config(part.config_text, cast.layout, sparsity))


def _origins(cast: Cast) -> Iterator[LayerOrigin]:
    base, experts = cast.base.model, [expert.dense.model for expert in cast.experts]
    for layer in range(cast.base.stack.count):
        models = list(dict.fromkeys([base, *experts] if layer in cast.layers else [base]))
        sources = tuple((model.key, layer) for model in models)
        prefix, labels = cast.base.stack.prefix, labels_of(models)
        yield LayerOrigin(prefix, layer, sources, labels=labels)


def _left_out(cast: Cast) -> Iterator[tuple[tuple[Model, str], str]]:
    """Yield why tensors are dropped; those that are taken may be among them."""
    for dense in (*cast.models, *distinct(cast), cast.base):
        for name in dense.model.tensors:
            why = _why(cast, dense, name)
            yield (dense.model, name), why
            if dense.model.overlay is not None:
                for used in ingredients(dense.model.overlay, name):
                    yield (used.model, used.tensor), why


def _why(cast: Cast, dense: Dense, name: str) -> str:
    layer, suffix = split_layer(name, dense.stack) or (-1, "")
    if suffix in BUFFERS:
        return "every program computes it anew"
    if suffix not in MLP:
        average = cast.method.non_experts == "average"
        return (
            "the mean of the models is taken" if average else "only the MLPs of experts are taken"
        )
    if layer not in cast.layers:
        return f"layer {layer} stays dense, as in {cast.base.model.label}"
    if cast.shared is not None and dense.model is cast.shared.dense.model:
        return "the output projection of the shared expert is zero"
    return "the experts are those of the models"


def _notes(site: Site, cast: Cast) -> Iterator[str]:
    method, count, layout = cast.method, len(cast.experts), cast.layout
    top_k = method.experts_per_token
    numbers = ", ".join(map(str, cast.layers))
    layers = f"layer{'s' * (len(cast.layers) > 1)} {numbers} of {cast.base.stack.count}"
    yield (
        f"{plural(count, 'expert')} in {layers if cast.dense_layers else 'every layer'} "
        f"({layout.model_type}), of which a token passes {top_k}"
        + (" beside the shared one" if cast.shared is not None else "")
    )
    if method.router == "zero" and top_k < count:
        yield (
            f"router: zero makes all experts equal, and every token passes the same {top_k} of "
            f"{count} until the router is trained; router: random spreads them"
        )
    own = cast.shared is not None and not site.stage.shared_experts
    if own and method.shared_expert == "copy":
        yield (
            "shared_expert: copy adds the base's MLP once more: the result does not compute what "
            "the base does; zero keeps its function"
        )
    if method.shared_expert == "copy" and not own:
        what = "shared_experts are given" if cast.shared is not None else "there is no such expert"
        yield f"shared_expert has no effect: {what}"
    yield from _other_sizes(cast)
    if cast.base.model.config is None:
        yield (
            f"{cast.base.model.label} has no config.json, and the result gets none: it needs one "
            f"with model_type {layout.model_type}, {layout.count_key} {count} and "
            f"num_experts_per_tok {top_k}"
        )


def _other_sizes(cast: Cast) -> Iterator[str]:
    """Yield which models have another vocabulary, say, of which nothing is taken."""
    loose = [n for n in cast.base.model.specs if split_layer(n, cast.base.stack) is None]
    for dense in cast.models if cast.method.non_experts == "base" else ():
        specs = dense.model.specs
        odd = [n for n in loose if n in specs and specs[n].shape != cast.base.model.specs[n].shape]
        if odd:
            yield (
                f"{dense.model.label} has {odd[0]} of shape {list(specs[odd[0]].shape)}, and "
                f"{cast.base.model.label} {list(cast.base.model.specs[odd[0]].shape)}: only its "
                "MLPs are taken, and the vocabulary is the base's"
            )
