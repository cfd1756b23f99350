"""What a recipe says, checked: frozen values, no YAML."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from math import floor
from pathlib import Path
from types import MappingProxyType
from typing import Literal

from merge_kit.core.layers import Layers

Scalar = float | int | bool | str


@dataclass(frozen=True, slots=True)
class Mark:
    """A place in a recipe: file (as the user named it), line and column from 1."""

    file: str
    line: int
    column: int

    def __str__(self) -> str:
        return f"{self.file}:{self.line}:{self.column}"


@dataclass(frozen=True, slots=True)
class Rule:
    """One entry of a setting: a constant or gradient, for tensors whose name contains `filter`.

    Attributes:
        values: One value, or the anchors of a gradient.
        filter: Plain case-sensitive substring of the tensor's name; None and "*" match all.
    """

    values: tuple[Scalar, ...]
    filter: str | None = None

    def matches(self, tensor: str) -> bool:
        return self.filter is None or self.filter == "*" or self.filter in tensor

    def at(self, t: float) -> Scalar:
        """Return the value at t in [0, 1], linear between anchors; bools and text do not mix."""
        if len(self.values) == 1:
            return self.values[0]
        x = t * (len(self.values) - 1)
        i = min(floor(x), len(self.values) - 1)
        low, high = self.values[i], self.values[min(i + 1, len(self.values) - 1)]
        if isinstance(low, bool | str) or isinstance(high, bool | str):
            return low
        return low if x == i else (1 - (x - i)) * low + (x - i) * high


@dataclass(frozen=True, slots=True)
class Setting:
    """The value of one parameter at one level of a recipe."""

    rules: tuple[Rule, ...]
    mark: Mark

    def at(self, tensor: str, t: float) -> Scalar | None:
        """Return the value for a tensor at depth t, or None where no rule matches (not set)."""
        for rule in self.rules:
            if rule.matches(tensor):
                return rule.at(t)
        return None


Parameters = Mapping[str, Setting]
NO_PARAMETERS: Parameters = MappingProxyType({})


@dataclass(frozen=True, slots=True)
class ModelRef:
    """A reference to a model, as written; equal if all but its text and its place are equal.

    Attributes:
        text: The reference as the user wrote it (an existing path wins over its special meaning).
        path: Path, Hub id or stage name, without revision and adapters.
        revision: What follows `@`, or None.
        adapters: References of LoRA adapters to apply, in order.
        weights: What the change of each adapter is multiplied by; empty where that is 1 for all.
    """

    path: str
    revision: str | None = None
    adapters: tuple[str, ...] = ()
    text: str = field(default="", compare=False)
    mark: Mark = field(default=Mark("", 0, 0), compare=False)
    weights: tuple[float, ...] = ()

    def applied(self) -> tuple[tuple[str, float], ...]:
        """Return the reference of each adapter with its weight."""
        weights = self.weights or (1.0,) * len(self.adapters)
        return tuple(zip(self.adapters, weights, strict=True))


@dataclass(frozen=True, slots=True)
class Prompts:
    """Texts that a router is to send to an expert, and texts that it is not to send there."""

    positive: tuple[str, ...]
    negative: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Entry:
    """One model of a list, or one source of a slice (`layers` is then set).

    Attributes:
        prompts: What its expert is for, where models become experts.
    """

    model: ModelRef
    parameters: Parameters
    mark: Mark
    layers: Layers | None = None
    prompts: Prompts | None = None


@dataclass(frozen=True, slots=True)
class Slice:
    """A run of output layers and where they come from.

    Attributes:
        merge_method: Method of this slice, instead of the recipe's.
    """

    sources: tuple[Entry, ...]
    mark: Mark
    base_model: ModelRef | None = None
    parameters: Parameters = field(default_factory=lambda: NO_PARAMETERS)
    merge_method: str | None = None


@dataclass(frozen=True, slots=True)
class Module:
    """What becomes of one named stack or component: models or slices, never both."""

    name: str
    mark: Mark
    models: tuple[Entry, ...] = ()
    slices: tuple[Slice, ...] = ()
    parameters: Parameters = field(default_factory=lambda: NO_PARAMETERS)


@dataclass(frozen=True, slots=True)
class TensorRule:
    """One rule of `tensors:`; fields left out inherit the recipe's.

    Attributes:
        match: Glob over whole tensor names.
        copy: The model whose tensor is taken unchanged, or None.
        drop: Whether the tensor is left out.
    """

    match: str
    mark: Mark
    merge_method: str | None = None
    parameters: Parameters = field(default_factory=lambda: NO_PARAMETERS)
    models: tuple[Entry, ...] | None = None
    copy: ModelRef | None = None
    drop: bool = False


@dataclass(frozen=True, slots=True)
class TokenizerChoice:
    """Which tokenizer files the output takes: "base", "union", or those of a model."""

    source: ModelRef | Literal["base", "union"]
    mark: Mark


@dataclass(frozen=True, slots=True)
class Stage:
    """One document of a recipe: a merge whose result is the output or feeds other stages.

    Exactly one of models, slices, modules is non-empty, or `tensors` alone is.

    Attributes:
        name: The document's name, None for the one that is written out.
        dtype: Output dtype as in a header ("BF16"), or None for the inputs' own.
        out_dtype: Overrides dtype for what is stored.
        on_conflict: What to do with integer and bool tensors that differ between models.
        uses: Adapters that are made at once: the folder of each, and its weights in the order of
            models.
        shared_experts: Models whose MLPs become experts that every token passes.
    """

    merge_method: str
    mark: Mark
    name: str | None = None
    base_model: ModelRef | None = None
    models: tuple[Entry, ...] = ()
    slices: tuple[Slice, ...] = ()
    modules: tuple[Module, ...] = ()
    tensors: tuple[TensorRule, ...] = ()
    parameters: Parameters = field(default_factory=lambda: NO_PARAMETERS)
    dtype: str | None = None
    out_dtype: str | None = None
    tokenizer: TokenizerChoice | None = None
    on_conflict: Literal["error", "base", "first"] = "error"
    uses: tuple[tuple[str, tuple[float, ...]], ...] = ()
    shared_experts: tuple[Entry, ...] = ()


@dataclass(frozen=True, slots=True)
class Recipe:
    """What the user asked for, checked.

    Attributes:
        stages: In an order in which each comes after those it refers to; the last is the output.
        source: Name of the recipe's file as the user gave it, or "<recipe>".
        folder: Where relative paths are looked up first; None for a recipe made in memory.
        text: The recipe as YAML, with the overrides applied if there were any.
        seed: Seed of everything random.
        shard_size_bytes: Largest size of an output shard, unless one tensor is larger.
        output: Output folder that the recipe names, relative to the working directory, or None.
        notes: What was accepted without effect, one sentence each with its place.
    """

    stages: tuple[Stage, ...]
    source: str
    folder: Path | None
    text: str
    seed: int = 0
    shard_size_bytes: int = 5_000_000_000
    output: str | None = None
    notes: tuple[str, ...] = ()
