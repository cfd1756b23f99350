"""Layers of other models beside those of the model whose config a stack takes: do they fit?"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any

from merge_kit.architecture.config import read_config
from merge_kit.architecture.layer_sizes import (
    HEADS,
    SETTINGS,
    differing_keys,
    differing_settings,
    sizes_by_layer,
)
from merge_kit.architecture.sections import section_of
from merge_kit.architecture.stacks import Stack
from merge_kit.architecture.ties import embedding_for, is_head
from merge_kit.errors import MismatchError
from merge_kit.plan.items import Item
from merge_kit.plan.models import Model

Shape = tuple[int, ...]

_BUFFER = re.compile(r"(^|\.)(inv_freq|masked_bias|relative_position_index|position_ids)$")
_SHOWN = 3
"""Names that are listed."""

_LONG = 40
"""Characters of a value that are shown."""

_MASK_RANK = 3
"""A `bias` of as many axes is a mask that no weight depends on, as in GPT-2."""


class SideBySide:
    """Holds layers to those of the donor, by the names and shapes of their tensors.

    What differs between layers of one model may differ between layers of the output: experts
    beside dense layers, layers of two kinds of attention. Where a config gives sizes layer by
    layer, they follow the layers.
    """

    def __init__(self, donor: Model, stack: Stack) -> None:
        self._donor, self._stack = donor, stack
        self._refused: set[str] = set()  # labels of models
        self._noted: set[str] = set()
        self._configs: dict[tuple[str, str], Mapping[str, Any]] = {}

    def problem(self, model: Model, stack: Stack, layer: int, where: str) -> MismatchError | None:
        """Return why a layer cannot stand beside the donor's, None where it can or was said so."""
        if model is self._donor:
            return None
        shapes = _shapes(model, stack, layer)
        found = (
            self._size(model, stack, layer, shapes)
            or self._kind(model, stack, layer, shapes)
            or self._heads(model, stack, layer)
        )
        if found is None or model.label in self._refused:
            return None
        self._refused.add(model.label)
        return MismatchError(found[0], where=where, hint=found[1])

    def _size(
        self, model: Model, stack: Stack, layer: int, shapes: Mapping[str, Shape]
    ) -> tuple[str, str] | None:
        """Return problem and hint for a tensor of a shape that no layer of the donor has."""
        one, other = self._config, self._config_of(model, stack)
        free = sizes_by_layer(one, self._stack.count) or sizes_by_layer(other, stack.count)
        for suffix, shape in shapes.items():
            own = self._own.get(suffix)
            if own is None or shape in own:
                continue
            known = next(iter(own))
            keys = differing_keys(one, other, known, shape)
            if free and not keys:
                continue
            said = "".join(f"; {key} is {other[key]} there, {one[key]} here" for key in keys)
            problem = (
                f"layer {layer} of {model.label} has {suffix} of shape {list(shape)}, layer "
                f"{own[known]} of {self._donor.label}, whose config is taken, {list(known)}{said}"
            )
            return problem, "stack layers of one size: pad, crop or project a model to it first"
        return None

    def _kind(
        self, model: Model, stack: Stack, layer: int, shapes: Mapping[str, Shape]
    ) -> tuple[str, str] | None:
        """Return problem and hint for a layer of other tensors than the donor's layers have."""
        suffixes = frozenset(shapes)
        if not suffixes or not self._kinds or suffixes in self._kinds:
            return None
        nearest = min(self._kinds, key=lambda kind: (len(kind ^ suffixes), sorted(kind)))
        odd = sorted(nearest ^ suffixes)
        types = self._config.get("model_type"), self._config_of(model, stack).get("model_type")
        biases = all(suffix.endswith("bias") for suffix in odd)
        if not biases and (types[0] == types[1] or None in types):
            return None  # kinds of layers that one architecture may mix
        more = [suffix for suffix in odd if suffix in suffixes]
        verb, named = ("has", more) if more else ("lacks", odd)
        shown = ", ".join(named[:_SHOWN]) + (", ..." if len(named) > _SHOWN else "")
        whose = f"{self._donor.label}, whose config is taken"
        against = f"no layer of {whose}, has" if more else f"the layers of {whose}, have"
        problem = f"layer {layer} of {model.label} {verb} {shown}, which {against}"
        return problem, "stack layers of one architecture"

    def _heads(self, model: Model, stack: Stack, layer: int) -> tuple[str, str] | None:
        """Return problem and hint for a layer whose matrices would be divided otherwise."""
        other = self._config_of(model, stack)
        keys = differing_settings(self._config, other, HEADS)
        if not keys:
            return None
        said = " and ".join(f"{key} {other[key]}" for key in keys)
        here = " and ".join(f"{key} {self._config[key]}" for key in keys)
        problem = (
            f"layer {layer} of {model.label} has {said}, {self._donor.label}, whose config is "
            f"taken, {here}"
        )
        return problem, "stack layers with the same heads"

    def outside(self, items: Sequence[Item], where: str) -> Iterator[MismatchError]:
        """Yield an error for each tensor outside the layers whose shape is not the donor's."""
        for item in items:
            ours = self._like(item.name)
            if not item.parts or ours is None:
                continue
            part = item.parts[0]
            shape = part.model.tensors[part.name].spec.shape
            here = self._donor.tensors[ours].spec.shape
            if shape == here or _is_mask(item.name, shape) or part.model.label in self._refused:
                continue
            keys = differing_keys(
                self._config, self._config_of(part.model, self._stack), here, shape
            )
            whose = "that" if ours == item.name else f"{ours}, the tied head"
            yield MismatchError(
                f"{item.name} of {part.model.label} has shape {list(shape)}, {whose} of "
                f"{self._donor.label}, whose config is taken, {list(here)}"
                + "".join(f"; {key} differs" for key in keys),
                where=where,
                hint="the first slice gives what stands before the layers, the last what stands "
                "after them: take both from models of one size and vocabulary",
            )

    def _like(self, name: str) -> str | None:
        """Return the donor's tensor that one outside the layers must fit.

        Of a head that a tied donor does not store, that is its embedding.
        """
        if name in self._donor.tensors:
            return name
        return embedding_for(name, self._donor.specs) if is_head(name) else None

    def note(self, model: Model, stack: Stack) -> str | None:
        """Return what of a model's config the output does not keep, once for each model."""
        if model is self._donor or model.label in self._noted:
            return None
        self._noted.add(model.label)
        other = self._config_of(model, stack)
        keys = differing_settings(self._config, other, SETTINGS)
        said = ", ".join(f"{key} {_short(other[key])}" for key in keys)
        here = ", ".join(f"{key} {_short(self._config[key])}" for key in keys)
        if not keys:
            return None
        return f"layers of {model.label} are made for {said}; the output's config has {here}"

    @cached_property
    def _own(self) -> Mapping[str, Mapping[Shape, int]]:
        """Of the donor: suffix -> shape -> the first layer with it."""
        found: dict[str, dict[Shape, int]] = {}
        for layer in sorted(self._donor.by_layer(self._stack)):
            for suffix, shape in _shapes(self._donor, self._stack, layer).items():
                found.setdefault(suffix, {}).setdefault(shape, layer)
        return found

    @cached_property
    def _kinds(self) -> frozenset[frozenset[str]]:
        layers = self._donor.by_layer(self._stack)
        return frozenset(frozenset(_shapes(self._donor, self._stack, i)) for i in layers)

    @cached_property
    def _config(self) -> Mapping[str, Any]:
        return self._config_of(self._donor, self._stack)

    def _config_of(self, model: Model, stack: Stack) -> Mapping[str, Any]:
        key = model.label, stack.prefix
        if key not in self._configs:
            self._configs[key] = config_of(model, stack)
        return self._configs[key]


def _shapes(model: Model, stack: Stack, layer: int) -> dict[str, Shape]:
    """Return suffix -> shape of what a layer has of its own, masks left out."""
    extras, names = model.first_layer_extras(stack), model.by_layer(stack).get(layer, {})
    shapes = {suffix: model.tensors[name].spec.shape for suffix, name in names.items()}
    return {s: shape for s, shape in shapes.items() if s not in extras and not _is_mask(s, shape)}


def _short(value: object) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= _LONG else f"{text[:_LONG]}..."


def _is_mask(suffix: str, shape: Shape) -> bool:
    """Return whether a program makes this up itself, whether or not it is stored."""
    mask = suffix.endswith(".bias") and len(shape) >= _MASK_RANK
    return mask or _BUFFER.search(suffix) is not None


def config_of(model: Model, stack: Stack) -> Mapping[str, Any]:
    """Return the object of a model's config that describes a stack, empty without a config."""
    folder = stack.prefix.rpartition("/")[0]
    part = next((part for part in model.parts if part.path == folder), model.main)
    config = model.config
    if part != model.main and part.config_text is not None:
        config = read_config(part.config_text, f"{model.label}/{folder}/config.json")
    section = section_of(config, stack.prefix, stack.count) if config is not None else None
    return (config or {}) if section is None else section.config
