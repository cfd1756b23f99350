"""Models of another structure, in float64 from the papers' words: which layers, which experts.

Kim et al. 2023, SOLAR 10.7B (https://arxiv.org/abs/2312.15166); Wu et al. 2024, LLaMA Pro
(https://arxiv.org/abs/2401.02415); Komatsuzaki et al. 2022, Sparse Upcycling
(https://arxiv.org/abs/2212.05055); Sukhbaatar et al. 2024, Branch-Train-MiX
(https://arxiv.org/abs/2403.07816).
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import permutations

import numpy as np

from tests.oracles.spheres import arc
from tests.oracles.values import Array, Wanted, certain, summed

Model = Mapping[str, Array]
"""Tensors by name, in float64."""

LAYER = re.compile(r"^model\.layers\.(\d+)\.(.+)$")
GATED = ("gate_proj", "up_proj", "down_proj")
ENDING = ("model.norm.weight", "lm_head.weight")
"""What follows the layers, where a model stores it."""


@dataclass(frozen=True)
class Part:
    """One layer that goes into an output layer: of which copy, its number there, its share."""

    copy: int
    layer: int
    share: float = 1.0


Layers = list[list[Part]]
"""For each output layer, what it is made of."""


def dropped(lower: int, upper: int, last: int, first: int) -> Layers:
    """SOLAR: all but the last so many layers of one copy, all but the first ones of the other."""
    below = [[Part(0, i)] for i in range(lower - last)]
    return below + [[Part(1, i)] for i in range(first, upper)]


def pairwise(lower: int, upper: int, overlap: int, shares: Sequence[float]) -> Layers:
    """The last `overlap` layers of one copy and the first of the other become one each.

    Args:
        shares: Of the upper copy, from the first pair to the last.
    """
    pairs = [
        [Part(0, lower - overlap + i, 1 - share), Part(1, i, share)]
        for i, share in enumerate(shares)
    ]
    assert len(pairs) == overlap
    before = [[Part(0, i)] for i in range(lower - overlap)]
    return before + pairs + [[Part(1, i)] for i in range(overlap, upper)]


def expanded(layers: int, target: int) -> tuple[list[int], list[bool]]:
    """LLaMA Pro: equal groups of layers, each followed by a copy of its last one.

    Returns:
        The layer that each output layer is, and whether it is an added copy.
    """
    added = target - layers
    assert layers % added == 0, "the paper has groups of one size"
    group = layers // added
    origins, copies = [], []
    for i in range(layers):
        origins.append(i)
        copies.append(False)
        if (i + 1) % group == 0:
            origins.append(i)
            copies.append(True)
    return origins, copies


def spread(anchors: Sequence[float], places: int) -> list[float]:
    """Return the values of a list at equal distances over so many places; one place is the last."""
    found = []
    for place in range(places):
        x = (place / (places - 1) if places > 1 else 1.0) * (len(anchors) - 1)
        low = int(np.floor(x))
        high = min(low + 1, len(anchors) - 1)
        found.append((1 - (x - low)) * anchors[low] + (x - low) * anchors[high])
    return found


def upscaled(copies: Sequence[Model], layers: Layers, blend: str) -> dict[str, Wanted]:
    """Return the tensors of a model of these layers.

    What leads into the layers is that of the lower copy, what follows them that of the upper one.
    """
    made = {}
    for name, tensor in copies[0].items():
        if not LAYER.match(name):
            made[name] = certain(copies[-1][name] if name in ENDING else tensor, np.abs(tensor))
    for number, parts in enumerate(layers):
        for rest in rests(copies[parts[0].copy], parts[0].layer):
            tensors = [copies[p.copy][f"model.layers.{p.layer}.{rest}"] for p in parts]
            made[f"model.layers.{number}.{rest}"] = _blended(tensors, parts, blend)
    return made


def _blended(tensors: Sequence[Array], parts: Sequence[Part], blend: str) -> Wanted:
    if blend == "slerp" and len(parts) == 2:
        return arc(tensors[0], tensors[1], parts[1].share)
    return summed(tensors, [part.share for part in parts])


def rests(model: Model, layer: int) -> list[str]:
    """Return the names of a layer's tensors, without what leads to them."""
    found = (LAYER.match(name) for name in model)
    return [match[2] for match in found if match and int(match[1]) == layer]


def depth(model: Model) -> int:
    return 1 + max(int(match[1]) for match in map(LAYER.match, model) if match)


@dataclass(frozen=True)
class Layout:
    """Where a family of mixtures of experts keeps what a dense layer calls `mlp`.

    Attributes:
        block: Name of the part.
        projections: Names of an expert's matrices, for those of a dense model.
        shared: Whether there is an expert that every token sees, with a gate of its own.
    """

    block: str
    projections: Mapping[str, str]
    shared: bool


LAYOUTS = {
    "mixtral": Layout("block_sparse_moe", dict(zip(GATED, ("w1", "w3", "w2"), strict=True)), False),
    "qwen2_moe": Layout("mlp", {name: name for name in GATED}, True),
    "qwen3_moe": Layout("mlp", {name: name for name in GATED}, False),
}


def expert_names(kind: str, layer: int, expert: int) -> dict[str, str]:
    """Return the names of an expert's matrices, for those of a dense layer."""
    layout = LAYOUTS[kind]
    lead = f"model.layers.{layer}.{layout.block}.experts.{expert}"
    return {
        f"model.layers.{layer}.mlp.{dense}.weight": f"{lead}.{own}.weight"
        for dense, own in layout.projections.items()
    }


def router_name(kind: str, layer: int) -> str:
    return f"model.layers.{layer}.{LAYOUTS[kind].block}.gate.weight"


def upcycled(
    kind: str,
    base: Model,
    experts: Sequence[Model],
    sparse: Sequence[int],
    residual_scales: Sequence[float] | None = None,
) -> tuple[dict[str, Wanted], dict[str, tuple[int, int]]]:
    """Return the tensors that a model of experts has, and the shapes of its routers.

    Routers, the gates of shared experts and the shared experts themselves are choices; they are
    named with their shapes. Everything else is the base's or an expert's.

    Args:
        sparse: The layers that become mixtures.
        residual_scales: Factors of the experts' output projections.
    """
    scales = residual_scales or [1.0] * len(experts)
    hidden = base["model.norm.weight"].shape[0]
    made, chosen = {}, {}
    for name, tensor in base.items():
        match = LAYER.match(name)
        if not match or int(match[1]) not in sparse or not match[2].startswith("mlp."):
            made[name] = certain(tensor, np.abs(tensor))
    for layer in sparse:
        chosen[router_name(kind, layer)] = (len(experts), hidden)
        for number, (model, scale) in enumerate(zip(experts, scales, strict=True)):
            for dense, own in expert_names(kind, layer, number).items():
                factor = scale if dense.endswith("down_proj.weight") else 1.0
                made[own] = summed([model[dense]], [factor])
        if LAYOUTS[kind].shared:
            lead = f"model.layers.{layer}.mlp.shared_expert"
            chosen[f"{lead}_gate.weight"] = (1, hidden)
            for name in GATED:
                shape = base[f"model.layers.{layer}.mlp.{name}.weight"].shape
                chosen[f"{lead}.{name}.weight"] = shape
    return made, chosen


def averaged(models: Sequence[Model], name: str) -> Wanted:
    """Return the mean of what models hold under a name."""
    return summed([model[name] for model in models], [1 / len(models)] * len(models))


def back(kind: str, model: Model, experts: Sequence[int], layers: int) -> dict[str, Wanted]:
    """Return the dense model whose MLPs are these experts, averaged if they are several."""
    block, made = f".{LAYOUTS[kind].block}.", {}
    for name, tensor in model.items():
        if not LAYER.match(name) or block not in name:
            made[name] = certain(tensor, np.abs(tensor))
    for layer in range(layers):
        if router_name(kind, layer) not in model:  # a dense layer among sparse ones
            for name in GATED:
                dense = f"model.layers.{layer}.mlp.{name}.weight"
                made[dense] = certain(model[dense], np.abs(model[dense]))
            continue
        for dense in expert_names(kind, layer, 0):
            held = [model[expert_names(kind, layer, number)[dense]] for number in experts]
            made[dense] = summed(held, [1 / len(held)] * len(held))
    return made


def matched(reference: Sequence[Array], experts: Sequence[Array]) -> list[int]:
    """Return the order of experts that is most like a reference, tried by exhaustion.

    Args:
        reference: One vector an expert: its tensors, flat, one after the other.
        experts: The same of the model to put in order.
    """
    likeness = [[float(np.dot(a, b)) for b in experts] for a in reference]
    orders = permutations(range(len(experts)))
    return list(max(orders, key=lambda order: sum(likeness[i][k] for i, k in enumerate(order))))


def padded(tensor: Array, shape: Sequence[int]) -> Array:
    """Return a tensor with zeros behind its rows and columns."""
    made = np.zeros(shape)
    made[tuple(slice(0, size) for size in tensor.shape)] = tensor
    return made


def cropped(tensor: Array, shape: Sequence[int]) -> Array:
    """Return the first rows and columns of a tensor."""
    return tensor[tuple(slice(0, size) for size in shape)]
