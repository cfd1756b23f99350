"""Models as the planner sees them: checkpoints on disk, or the results of other stages."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Literal

from merge_kit.architecture.config import read_config
from merge_kit.architecture.stacks import (
    Stack,
    described_stack,
    find_stacks,
    first_layer_extras,
    first_layer_lacks,
    split_layer,
)
from merge_kit.core.tensors import TensorSpec
from merge_kit.io.adapter_values import Adapter
from merge_kit.io.values import Checkpoint
from merge_kit.plan.applying.changes import Change
from merge_kit.plan.sources import Source, Stored


@dataclass(frozen=True, slots=True)
class Held:
    """A tensor of a model.

    Attributes:
        component: Folder of the component that holds it, "" for the root.
        spec: Name in the file; dtype as users know it, also where a stage feeds float32.
        source: How to read it.
    """

    component: str
    spec: TensorSpec
    source: Source


@dataclass(frozen=True, slots=True)
class Part:
    """One component of a model: its folder, the stem of its files, its config.json."""

    path: str
    stem: str
    config_text: str | None


@dataclass(frozen=True, slots=True)
class Ingredient:
    """A tensor of a model or an adapter that a tensor of an overlay is made of, or leaves out.

    Attributes:
        what: What becomes of it where the overlay's tensor is used as it is.
        why: Why it is dropped.
    """

    model: Model
    tensor: str
    what: Literal["merged", "copied", "dropped"]
    why: str = ""


@dataclass(frozen=True, slots=True)
class Changed:
    """A tensor of an overlay as the tensor below it plus changes, where it is no more than that."""

    under: Source
    changes: tuple[Change, ...]


@dataclass(frozen=True, slots=True, eq=False)
class Overlay:
    """What adapters make of a model; tensors that are not named here are those of the model.

    Attributes:
        under: The model.
        adapters: Each with its weight.
        made_of: For each tensor that adapters change, what it is made of.
        changed: Those of them that are the model's own plus changes.
        notes: What the user should know, one sentence each.
    """

    under: Model
    adapters: tuple[tuple[Model, float], ...]
    made_of: Mapping[str, tuple[Ingredient, ...]]
    changed: Mapping[str, Changed]
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, eq=False)
class Model:
    """A model by its tensors.

    Attributes:
        key: "input-1", or the name of the stage that makes it.
        label: What messages call it.
        tensors: By name, with the component's folder in front ("unet/conv.weight").
        checkpoint: Where it lies; None for the result of a stage.
        adapter: What it changes, if it is an adapter; its tensors are those of its file.
        overlay: What it is made of, if it is a model with adapters applied: it has the key and the
            checkpoint of that model.
        overlays: Models with this one below, by adapters and weights; see `plan.applying.applied`.
    """

    key: str
    label: str
    parts: tuple[Part, ...]
    tensors: Mapping[str, Held]
    checkpoint: Checkpoint | None = None
    adapter: Adapter | None = None
    overlay: Overlay | None = None
    overlays: dict[tuple[tuple[Model, float], ...], Model] = field(default_factory=dict, repr=False)
    _by_layer: dict[str, dict[int, dict[str, str]]] = field(default_factory=dict, repr=False)
    _extras: dict[str, frozenset[str]] = field(default_factory=dict, repr=False)
    _lacks: dict[str, frozenset[str]] = field(default_factory=dict, repr=False)

    @cached_property
    def specs(self) -> Mapping[str, TensorSpec]:
        """Specs by full name."""
        return {name: held.spec for name, held in self.tensors.items()}

    @cached_property
    def config(self) -> Mapping[str, object] | None:
        """The main component's config.json."""
        text = self.main.config_text
        return None if text is None else read_config(text, f"{self.label}/config.json")

    @property
    def main(self) -> Part:
        """The root's component, else the first."""
        return next((part for part in self.parts if not part.path), self.parts[0])

    @cached_property
    def stacks(self) -> tuple[Stack, ...]:
        """All layer stacks."""
        return find_stacks(self.tensors)

    @cached_property
    def described(self) -> Stack | None:
        """The stack that config.json describes."""
        return described_stack(self.config, self.stacks)

    def by_layer(self, stack: Stack) -> Mapping[int, Mapping[str, str]]:
        """Return layer -> suffix -> full name for one stack."""
        if stack.prefix not in self._by_layer:
            layers: dict[int, dict[str, str]] = {}
            for name in self.tensors:
                found = split_layer(name, stack)
                if found is not None:
                    layers.setdefault(found[0], {})[found[1]] = name
            self._by_layer[stack.prefix] = layers
        return self._by_layer[stack.prefix]

    def first_layer_extras(self, stack: Stack) -> frozenset[str]:
        """Return the suffixes of what a stack stores in its first layer for all of its layers."""
        if stack.prefix not in self._extras:
            self._extras[stack.prefix] = first_layer_extras(self.by_layer(stack))
        return self._extras[stack.prefix]

    def first_layer_lacks(self, stack: Stack) -> frozenset[str]:
        """Return the suffixes of what every layer of a stack has but the first."""
        if stack.prefix not in self._lacks:
            self._lacks[stack.prefix] = first_layer_lacks(self.by_layer(stack))
        return self._lacks[stack.prefix]


def full_name(component: str, name: str) -> str:
    """Return a tensor's name with its component's folder in front."""
    return f"{component}/{name}" if component else name


def from_checkpoint(key: str, checkpoint: Checkpoint) -> Model:
    """Return a checkpoint as a model."""
    tensors = {
        full_name(component.path, name): Held(
            component.path,
            stored.spec,
            Stored(stored.span, stored.spec.dtype, stored.spec.shape),
        )
        for component in checkpoint.components
        for name, stored in component.tensors.items()
    }
    parts = tuple(Part(c.path, c.stem, c.config_text) for c in checkpoint.components)
    return Model(key, f"{key}:{checkpoint.name}", parts, tensors, checkpoint)


def from_adapter(key: str, adapter: Adapter) -> Model:
    """Return an adapter as a model whose tensors are those of its file."""
    return replace(from_checkpoint(key, adapter.checkpoint), adapter=adapter)
