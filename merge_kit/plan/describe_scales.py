"""What a plan scales in the layers of a stack, for the map of its layers."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from merge_kit.methods.passthrough import Passthrough
from merge_kit.plan.layer_origins import LayerOrigin
from merge_kit.plan.values import Step

Scales = Mapping[str, float]
"""Of one layer: kind of tensor (`o_proj`) -> factor; "" where all have the same."""

SHOWN = 4
"""Kinds of tensors that are listed before `and 3 more`."""


def layer_scales(
    origins: Iterable[LayerOrigin], steps: Iterable[Step]
) -> dict[tuple[str, int], Scales]:
    """Return what is scaled in each layer of the stacks that slices build; layers as they are lack.

    Only layers that are taken from one model are looked at: a factor that another stage applied is
    no part of this one.
    """
    places = {f"{o.stack}{_dot(o.stack)}{o.layer}.": o for o in origins if not o.method}
    if not places:
        return {}
    found: dict[tuple[str, int], dict[str, float | None]] = {}
    for step in steps:
        for target in step.outputs:
            origin = places.get(_lead(target.key, places))
            if origin is not None:
                factor = _factor(step, origin.sources[0][0])
                kind = _kind(target.key)
                of_layer = found.setdefault((origin.stack, origin.layer), {})
                of_layer[kind] = of_layer.get(kind) if factor is None else factor
    return {place: _scaled(kinds) for place, kinds in found.items() if any(_given(kinds))}


def scale_note(scales: Sequence[Scales]) -> str:
    """Return `, o_proj and down_proj x 0.7` for the layers of a run, "" where nothing is scaled.

    Args:
        scales: Of each layer; all scale the same kinds.
    """
    kinds: dict[str, list[str]] = {}
    for kind in scales[0]:
        factors = [of_layer[kind] for of_layer in scales]
        shown = _course(factors)
        kinds.setdefault(shown, []).append(kind)
    return "".join(f", {_listed(names)} x {factor}" for factor, names in kinds.items())


def _course(factors: Sequence[float]) -> str:
    """Return how factors go from the first layer to the last: `1 to 0.5`, or over a turn."""
    low, high, ends = min(factors), max(factors), (factors[0], factors[-1])
    if low == high:
        return f"{low:g}"
    if {low, high} == set(ends):
        return f"{ends[0]:g} to {ends[1]:g}"
    return f"{low:g} to {high:g}"


def _listed(names: Sequence[str]) -> str:
    if names == [""]:
        return "all"
    if len(names) > SHOWN:
        return f"{', '.join(names[:SHOWN])} and {len(names) - SHOWN} more"
    *most, last = names
    return f"{', '.join(most)} and {last}" if most else last


def _scaled(kinds: Mapping[str, float | None]) -> Scales:
    """Return the kinds that are scaled, as one if every tensor is and by the same factor."""
    if len(set(kinds.values())) == 1:
        return {"": next(factor for factor in kinds.values() if factor is not None)}
    return {kind: factor for kind, factor in kinds.items() if factor is not None}


def _given(kinds: Mapping[str, float | None]) -> list[bool]:
    return [factor is not None for factor in kinds.values()]


def _factor(step: Step, key: str) -> float | None:
    """Return the factor on a tensor of a model, None where there is none."""
    if not isinstance(step.method, Passthrough) or not step.method.scale:
        return None
    whose = step.models[0].partition(":")[0].partition("+")[0]
    return step.method.scale[0] if whose == key else None


def _lead(key: str, places: Mapping[str, object]) -> str:
    """Return the beginning of a tensor's name that is a layer, "" if none is."""
    parts = key.split(".")
    leads = (".".join(parts[:i]) + "." for i in range(1, len(parts)))
    return next((lead for lead in leads if lead in places), "")


def _kind(key: str) -> str:
    """Return the module that a tensor belongs to, without its path."""
    return key.removesuffix(".weight").removesuffix(".bias").rpartition(".")[2]


def _dot(prefix: str) -> str:
    return "" if not prefix or prefix.endswith("/") else "."
