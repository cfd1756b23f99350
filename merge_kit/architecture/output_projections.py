"""Projections that write what a layer computes into the stream: zeros there make it an identity.

They are found by the names of a layer's tensors and by their shapes. Every other tensor of the
layer must be known too, as one that works inside a branch: what nothing here knows is refused.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from typing import Any

from merge_kit.architecture.output_names import (
    BRANCH_INPUTS,
    INSIDE,
    NORMS,
    NORMS_BEFORE,
    ODD,
    OUTPUTS,
    PATHS,
    PLAIN,
    TYPED,
    TYPED_NORMS,
)
from merge_kit.architecture.turned import is_turned
from merge_kit.errors import PlanError

Shape = tuple[int, ...]

KNOWN = (
    "known are layers named as those of Llama, Mistral, Qwen, Gemma, Phi, OLMo, Cohere, GPT-2, "
    "GPT-NeoX, OPT, Falcon, BLOOM, MPT, Mixtral, DeepSeek and Mamba"
)
_REPEAT = "repeat the layers with overlap or target_layers alone instead"


def output_projections(
    layer: Mapping[str, Shape], config: Mapping[str, Any] | None
) -> frozenset[str]:
    """Return the tensors of a layer that must be zero for it to pass on what it gets.

    Args:
        layer: Its tensors by what follows the layer's number, with their shapes.
        config: The object of config.json that describes the layers; None without a config.

    Raises:
        PlanError: If a layer of this kind changes what it gets all the same, or holds a tensor of
            which nobody here knows what it does.
    """
    _check_config(config or {})
    layer = {suffix: shape for suffix, shape in layer.items() if not _is_mask(suffix, shape)}
    norm = next((suffix for suffix in layer if "output.LayerNorm" in suffix), None)
    if norm is not None:
        why = f"{norm} stands on the stream itself, with no way past it"
        raise PlanError(why, hint=_REPEAT)
    modules = {suffix: module_of(suffix) for suffix in layer}
    for suffix, module in modules.items():
        _check_name(suffix, module, layer[suffix])
    _check_types(set(modules.values()), str((config or {}).get("model_type", "")))
    _check_norms(layer)
    found = frozenset(s for s, module in modules.items() if _leaf(module) in OUTPUTS)
    _check_branches(set(modules.values()))
    if not found:
        raise PlanError("it has no output projection of a known name", hint=KNOWN)
    weights = {s: x for s, x in layer.items() if s in found and len(x) > 1 and "bias" not in s}
    _check_shapes(weights, config)
    return found


def module_of(suffix: str) -> str:
    """Return the module that a tensor belongs to: its name without `.weight`, `.bias`, `_bias`."""
    name = suffix.removesuffix(".weight").removesuffix(".bias")
    return name if name.endswith("dense_bias") else name.removesuffix("_bias")


def _is_mask(suffix: str, shape: Shape) -> bool:
    """Return whether a tensor is a mask of attention that no weight depends on, as in GPT-2."""
    return suffix.endswith(".bias") and len(shape) > 2


def _leaf(module: str) -> str:
    """Return the last part of a module's path; `dense` writes only where it ends attention."""
    parent, _, leaf = module.rpartition(".")
    return "attention.dense" if leaf == "dense" and "att" in parent else leaf


def _check_config(config: Mapping[str, Any]) -> None:
    for key, value, why in ODD:
        held = config.get(key)
        if held is value if value is not None else held:
            shown = json.dumps(held)[:50]
            raise PlanError(f"{key} is {shown} in config.json: {why}", hint=_REPEAT)
    kind = str(config.get("model_type", ""))  # of any JSON type
    if kind in PLAIN:
        why = f"{kind} puts norms on the stream itself, with no way past them"
        raise PlanError(why, hint=_REPEAT)


def _check_name(suffix: str, module: str, shape: Shape) -> None:
    """Refuse a tensor that is neither an output, nor a norm, nor known to work inside a branch."""
    *path, last = [part for part in module.split(".") if not part.isdecimal()] or [""]
    if not path and last in NORMS | TYPED_NORMS.keys() and len(shape) == 1:
        return
    known = _leaf(module) in OUTPUTS or last in INSIDE or last in BRANCH_INPUTS
    if not known or any(part not in PATHS for part in path):
        shown = suffix or "the tensor that is a layer of its own"
        problem = f"nothing here knows what {shown} does to the stream"
        raise PlanError(problem, hint=KNOWN)


def _check_types(modules: Collection[str], kind: str) -> None:
    """Refuse names that mean a way past in models of some types only, if this is none of them."""
    for name in sorted(TYPED.keys() & modules):
        if kind not in TYPED[name]:
            tells = f"model_type {kind!r} is none of those known" if kind else "no config tells"
            problem = f"layers with {name} may have no way past their norms, and {tells}"
            raise PlanError(problem, hint=f"known are {', '.join(sorted(TYPED[name]))}")


def _check_norms(layer: Mapping[str, Shape]) -> None:
    """Refuse a norm at the end of a branch whose bias would be added to the stream."""
    norms = {module_of(s) for s in layer} & NORMS
    for name in sorted(norms):
        before = name in NORMS_BEFORE
        if name == "post_attention_layernorm":  # where the MLP has none of its own, it is that
            before = "input_layernorm" in norms and not any(
                "feed" in n or "mlp" in n for n in norms
            )
        if f"{name}.bias" in layer and not before:
            problem = f"{name} has a bias, which stays when what it normalises is zero"
            raise PlanError(problem, hint=_REPEAT)


def _check_branches(modules: set[str]) -> None:
    """Refuse a branch whose output projection has another name than those known."""
    outputs = {module.rpartition(".")[0] for module in modules if _leaf(module) in OUTPUTS}
    for module in sorted(modules):
        parent = module.rpartition(".")[0]
        if _leaf(module) in BRANCH_INPUTS and parent not in outputs:
            problem = f"{parent or 'it'} has no output projection of a known name beside {module}"
            raise PlanError(problem, hint=KNOWN)


def _check_shapes(weights: Mapping[str, Shape], config: Mapping[str, Any] | None) -> None:
    """Refuse projections that do not all end in one width, the stream's."""
    widths = {}
    for suffix, shape in weights.items():
        turned = is_turned(config, module_of(suffix))
        widths[suffix] = {shape[-1] if turned else shape[0]} if len(shape) == 2 else {*shape[-2:]}
    shared = set.intersection(*widths.values()) if widths else {0}
    if not shared:
        shown = ", ".join(f"{s} {list(weights[s])}" for s in list(weights)[:4])
        problem = f"its output projections do not end in one width: {shown}"
        raise PlanError(problem, hint=KNOWN)
