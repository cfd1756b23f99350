"""Routers of a mixture of experts: zeros, random numbers, or found of prompts before the run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import sqrt
from typing import Literal

from merge_kit.methods.sparse_upcycle import SparseUpcycle
from merge_kit.plan.building.built import Site
from merge_kit.plan.building.routers_found import found_routers
from merge_kit.plan.building.routers_prompts import checked_prompts
from merge_kit.plan.models import Model
from merge_kit.plan.sources import Generated, Source
from merge_kit.plan.values import Artefact
from merge_kit.recipe.values import Prompts

NORMAL_SCALE = 0.02
"""Standard deviation of a random router."""

OF_PROMPTS = ("cheap_embed", "hidden", "hidden_avg")
"""Routers that are found of prompts."""


@dataclass(frozen=True, slots=True)
class Routers:
    """The routers of a mixture of experts.

    Attributes:
        rows: Layer of the base -> router, (experts, hidden).
        shared: Layer of the base -> gate of the shared expert, (1, hidden); empty where there is
            no shared expert.
        artefacts: What must be found before the run.
    """

    rows: Mapping[int, Source]
    shared: Mapping[int, Source]
    artefacts: tuple[Artefact, ...] = ()


def plan_routers(  # noqa: PLR0913  (all that a router depends on)
    site: Site,
    method: SparseUpcycle,
    base: Model,
    prompts: Sequence[Prompts | None],
    shared: Prompts | None,
    layers: Sequence[int],
    hidden: int,
    *,
    with_shared: bool,
) -> Routers:
    """Return the routers of the layers that get experts.

    Args:
        base: The dense model, whose tokenizer, embedding and layers prompts go through.
        prompts: Those of each expert, in the experts' order.
        shared: Those of the shared expert.
        layers: Numbers of the layers, as the base has them.
        hidden: Width of the model.
        with_shared: Whether there is a shared expert.

    Raises:
        MergeKitError: If a router of prompts is asked for, and they or the base do not do for it.
    """
    if method.router in OF_PROMPTS:
        asked = checked_prompts(site, method.router, prompts, shared if with_shared else None)
        found = found_routers(site, method, base, asked, layers, hidden)
        gates = found.shared or _zeros(layers, hidden)
        return Routers(found.rows, gates if with_shared else {}, (found.artefact,))
    if shared is not None or any(one is not None for one in prompts):
        site.findings.note(f"prompts have no effect with router: {method.router}")
    gates = _drawn(site, method, layers, (1, hidden), "shared expert") if with_shared else {}
    return Routers(_drawn(site, method, layers, (len(prompts), hidden), "experts"), gates)


def _zeros(layers: Sequence[int], hidden: int) -> dict[int, Source]:
    return {layer: Generated("zeros", (1, hidden)) for layer in layers}


def _drawn(
    site: Site, method: SparseUpcycle, layers: Sequence[int], shape: tuple[int, int], what: str
) -> dict[int, Source]:
    """Return zeros or random numbers, others for each layer."""
    kind: Literal["zeros", "normal", "uniform"] = "zeros"
    scale = 0.0
    if method.router == "random":
        kind, scale = "normal", NORMAL_SCALE
    elif method.router == "uniform_random":
        kind, scale = "uniform", 1 / sqrt(max(1, shape[1]))
    if kind != "zeros" and method.router_scale is not None:
        scale = method.router_scale
    return {
        layer: Generated(kind, shape, f"router of layer {layer}, {what}", site.maker.seed, scale)
        for layer in layers
    }
