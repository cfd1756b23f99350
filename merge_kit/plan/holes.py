"""Layers that lack a tensor which every other layer of their model has."""

from __future__ import annotations

from merge_kit.architecture.stacks import Stack
from merge_kit.plan.models import Model

_LEAST = 3
"""Layers of a model in which one may be said to differ from all others."""

_SHOWN = 3


def hole(model: Model, stack: Stack, layer: int) -> str | None:
    """Return a sentence about what a layer alone lacks, None where it lacks nothing.

    A layer of another kind (dense among sparse ones, attention among recurrent ones) holds
    something that others do not, and lacks nothing in this sense. Neither does a first layer that
    is built without something, as some architectures have it: a stack keeps it in its place.
    """
    layers = model.by_layer(stack)
    if layer - 1 in layers and layers[layer - 1].keys() == layers.get(layer, {}).keys():
        return None  # the usual case, told at once
    others = [frozenset(held) for i, held in layers.items() if i != layer]
    if layer == 0 or len(layers) < _LEAST:
        return None
    common, own = frozenset.intersection(*others), frozenset(layers.get(layer, ()))
    lacking = sorted(common - own - model.first_layer_extras(stack))
    if not lacking or not own < frozenset.union(*others):
        return None
    shown = ", ".join(lacking[:_SHOWN]) + (", ..." if len(lacking) > _SHOWN else "")
    return (
        f"layer {layer} of {model.label} lacks {shown}, which every other layer has: unless its "
        "class builds that layer without, what is missing will be filled with random numbers"
    )
