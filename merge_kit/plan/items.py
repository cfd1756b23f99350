"""Which input tensors make which output tensor: models, slices, modules and rules as items."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from merge_kit.plan.models import Model
from merge_kit.recipe.values import Entry, Mark, ModelRef, Parameters


@dataclass(frozen=True, slots=True)
class Part:
    """One model's tensor for an output tensor.

    Attributes:
        name: The tensor's full name in that model.
        is_base: Whether it is the base model's.
        stands_for: Name of the tied head that it stands in for, "" where it is none: the model
            does not store the head, and filters look at the head's name.
        added: Whether the base is here although the recipe does not list it.
    """

    entry: Entry
    model: Model
    name: str
    is_base: bool
    stands_for: str = ""
    added: bool = False


@dataclass(frozen=True, slots=True)
class Item:
    """One output tensor.

    Attributes:
        name: Full name in the output.
        component: Folder of its component.
        levels: Parameters of slice, module and recipe, the narrowest first.
        t: Depth in [0, 1].
        action: "merge" by `method`, or "copy" parts[0].
        note: What the plan says about it.
    """

    name: str
    component: str
    parts: tuple[Part, ...]
    levels: tuple[Parameters, ...]
    t: float
    method: str
    mark: Mark
    action: Literal["merge", "copy"] = "merge"
    note: str = ""


@dataclass(frozen=True, slots=True)
class Group:
    """Models that are merged together, and with what parameters.

    Attributes:
        entries: In the order of the recipe, an added base last.
        models: Those of the entries. One may be there twice: `m` and `m@main` of one folder are
            two models, as in the dialect.
        base: The base model of this group, or None.
        base_ref: How the recipe refers to it; the entry with this very reference is the base.
        adds_base: Whether the last entry is a base that the recipe does not list.
    """

    entries: tuple[Entry, ...]
    models: tuple[Model, ...]
    base: Model | None
    base_ref: ModelRef | None
    adds_base: bool
    levels: tuple[Parameters, ...]
    method: str
    mark: Mark

    @property
    def has_base(self) -> bool:
        """Whether the base is one of the models."""
        return any(self.is_base(entry) for entry in self.entries)

    def is_base(self, entry: Entry) -> bool:
        """Return whether an entry is the base."""
        return entry.model == self.base_ref

    def pairs(self) -> Sequence[tuple[Entry, Model]]:
        """Return entries with their models."""
        return tuple(zip(self.entries, self.models, strict=True))


def copied(item: Item, model: Model, name: str, entry: Entry, note: str) -> Item:
    """Return an item as a copy of one model's tensor."""
    part = Part(entry, model, name, is_base=True)
    return replace(item, parts=(part,), action="copy", note=note)
