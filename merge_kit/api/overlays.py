"""Models that are made of others when they are opened: adapters on top, and changes alone."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from merge_kit.core.dtypes import is_float
from merge_kit.errors import UsageError
from merge_kit.io.values import WeightFile
from merge_kit.plan.applying.applied import apply_adapters, change_from
from merge_kit.plan.models import Held, Model
from merge_kit.plan.sources import Sum

if TYPE_CHECKING:
    from merge_kit.api.held import HeldModel


class Composed(ABC):
    """What a model is made of, that is no path and no mapping of tensors."""

    @property
    @abstractmethod
    def key(self) -> object:
        """What equal ones have in common."""

    @property
    @abstractmethod
    def parts(self) -> Sequence[HeldModel]:
        """The models and adapters that it is made of."""

    @abstractmethod
    def model(self) -> Model:
        """Return the model; nothing is read but headers."""

    @property
    def name(self) -> str:
        """Names of the folders, never paths."""
        return "+".join(part.name for part in self.parts)

    @property
    def files(self) -> tuple[WeightFile, ...]:
        """The weight files, each once."""
        files = [file for part in self.parts for file in part.files]
        return tuple({file.path: file for file in files}.values())

    @property
    def reference(self) -> dict[str, Any] | None:
        """How a recipe names it, None if no recipe can."""
        return None

    @property
    def roots(self) -> tuple[Path, ...]:
        """Where it lies on disk."""
        return tuple(root for part in self.parts for root in part.roots)


@dataclass(frozen=True, slots=True)
class Applied:
    """An adapter with its weight, the factor of its change."""

    adapter: HeldModel
    weight: float

    def __str__(self) -> str:
        return str(self.adapter) if self.weight == 1 else f"{self.weight:g} * {self.adapter}"


@dataclass(frozen=True, slots=True, eq=False)
class OnTop(Composed):
    """A model with adapters on top; each is applied to the weights that the model has itself."""

    base: HeldModel
    adapters: tuple[Applied, ...]

    @property
    def key(self) -> object:
        """What equal ones have in common."""
        adapters = tuple((one.adapter.key, one.weight) for one in self.adapters)
        return "on top", self.base.key, adapters

    @property
    def parts(self) -> Sequence[HeldModel]:
        """The model and the adapters."""
        return (self.base, *(one.adapter for one in self.adapters))

    def model(self) -> Model:
        """Return the model, whose tensors are its base's or are formed."""
        models: dict[object, Model] = {}  # one that is named twice counts with both weights
        for one in self.adapters:
            models.setdefault(one.adapter.key, one.adapter.model)
        weighted = [(models[one.adapter.key], one.weight) for one in self.adapters]
        return apply_adapters(self.base.model, weighted)

    @property
    def reference(self) -> dict[str, Any] | None:
        """How a recipe names it, None if the model below is not on disk."""
        if self.base.path is None:
            return None
        lora = [{"path": str(one.adapter.path), "weight": one.weight} for one in self.adapters]
        return {"model": {"path": str(self.base.path)}, "lora": lora}

    def __str__(self) -> str:
        return " + ".join(map(str, (self.base, *self.adapters)))


def models_of(held: Sequence[HeldModel]) -> dict[object, Model]:
    """Return models by key, where adapters are on top of the very model that is among them.

    What is loaded twice from memory is two models; a change of one would be no change of the other.
    """
    bases = {one.key: one for one in held if not isinstance(one.composed, OnTop)}
    found = {}
    for one in held:
        found[one.key] = one.model
        if isinstance(one.composed, OnTop):
            base = bases.setdefault(one.composed.base.key, one.composed.base)
            if base is not one.composed.base:
                found[one.key] = replace(one.composed, base=base).model()
    return found


def on_top(model: HeldModel, adapters: Sequence[Applied]) -> OnTop:
    """Return a model with adapters on top, beside those that it has already.

    Raises:
        UsageError: If the model is an adapter itself.
    """
    if model.model.adapter is not None:
        problem = f"{model} is an adapter, expected a model below the adapters"
        raise UsageError(problem, hint="name the base model first")
    if isinstance(model.composed, OnTop):
        return OnTop(model.composed.base, (*model.composed.adapters, *adapters))
    return OnTop(model, tuple(adapters))


@dataclass(frozen=True, slots=True, eq=False)
class OnlyChange(Composed):
    """What adapters make of a model, minus that model: factors' products, where that is all.

    Tensors that are no floats are those of the model with adapters.

    Attributes:
        whole: A model with adapters on top.
        base: What is below the adapters, with fewer adapters on top or none.
    """

    whole: HeldModel
    base: HeldModel

    @property
    def key(self) -> object:
        """What equal ones have in common."""
        return "only change", self.whole.key, self.base.key

    @property
    def parts(self) -> Sequence[HeldModel]:
        """The model with adapters."""
        return (self.whole,)

    def model(self) -> Model:
        """Return the changes by the names of the model's tensors."""
        whole, base = self.whole.model, self.base.model
        below = self.whole.composed
        if isinstance(below, OnTop) and below.base.key == self.base.key:
            base = below.base.model  # the same tensors in memory, however often they are loaded
        tensors = {name: _change(whole, name, base) for name in whole.tensors}
        return replace(whole, tensors=tensors, overlay=None, overlays={})

    def __str__(self) -> str:
        return f"({self.whole} - {self.base})"


def is_below(base: HeldModel, model: HeldModel) -> bool:
    """Return whether adapters make one model of the other, or of what both have below."""
    lowest = base.composed.base if isinstance(base.composed, OnTop) else base
    return isinstance(model.composed, OnTop) and model.composed.base.key == lowest.key


def _change(whole: Model, name: str, base: Model) -> Held:
    held = whole.tensors[name]
    if not is_float(held.spec.dtype):
        return held
    below = name if name in base.tensors else _tied(whole, name)
    source = change_from(whole, name, base, below)
    if source is None:
        source = Sum(((1.0, held.source), (-1.0, base.tensors[below].source)))
    dtype = "F64" if "F64" in (held.spec.dtype, source.dtype) else "F32"
    return Held(held.component, replace(held.spec, dtype=dtype), source)


def _tied(whole: Model, head: str) -> str:
    """Return the embedding that a head was tied to before adapters changed one of the two."""
    assert whole.overlay is not None
    return whole.overlay.made_of[head][0].tensor
