"""The tensors of a base and of a model that was trained from it, side by side."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from typing import Literal

from merge_kit.architecture.ties import is_head
from merge_kit.architecture.turned import is_turned
from merge_kit.errors import MergeKitError, MismatchError
from merge_kit.io.adapter_values import Kind
from merge_kit.plan.applying.names import match_names
from merge_kit.plan.assemble import tied_embedding
from merge_kit.plan.extracting.names import (
    Naming,
    factored_kind,
    module_now,
    naming,
)
from merge_kit.plan.models import Held, Model

SHOWN = 5
"""Names that an error lists."""

_BUFFERS = (".attn.bias", ".masked_bias", "inv_freq", "position_ids")
"""Ends of names that older programs stored, and newer ones compute."""


@dataclass(frozen=True, slots=True)
class Pair:
    """One tensor of both models.

    Attributes:
        name: Its name in the base, or in the model where the base has none.
        module: Path of the module that has it, as programs see it.
        base: None where the base has none.
        tuned: None where the model has none, and the base's is one that programs compute.
        ours: Which tensor of the base that is: of a tied head, the embedding.
        theirs: Which tensor of the model.
        kind: As what it is factored, None if it is not.
        turned: Whether it is stored as (in, out).
    """

    name: str
    module: str
    base: Held | None
    tuned: Held | None
    ours: str
    theirs: str
    kind: Kind | None = None
    turned: bool = False

    @property
    def leaf(self) -> str:
        """Its name inside the module."""
        return self.name.rpartition(".")[2]

    @property
    def is_computed(self) -> bool:
        """Whether only one of the two has it, and programs compute it."""
        if self.base is not None:
            return self.tuned is None
        assert self.tuned is not None  # one of the two is there
        is_mask = len(self.tuned.spec.shape) > 1 or not self.name.endswith(".bias")
        return is_mask and self.name.endswith(_BUFFERS)

    @property
    def known(self) -> Literal["equal", "different", "unknown"]:
        """What headers say of whether it is changed."""
        if self.is_computed:
            return "equal"
        if self.base is None or self.tuned is None:
            return "different"
        if self.base.spec.shape != self.tuned.spec.shape:
            return "different"
        return "equal" if self.base.source == self.tuned.source else "unknown"

    @property
    def matrix(self) -> tuple[int, int]:
        """Outputs and inputs."""
        held = self.tuned or self.base
        assert held is not None
        shape = held.spec.shape
        rows, columns = (shape[0], prod(shape[1:])) if shape else (1, 1)
        return (columns, rows) if self.turned else (rows, columns)


class Pairs:
    """Matches a model's tensors with its base's.

    Attributes:
        naming: How programs name the base's modules.
        errors: What does not fit.
        pairs: In the order of the base's files, what the base lacks at the end.
        theirs: Name in the base -> name in the model.
    """

    def __init__(self, base: Model, tuned: Model) -> None:
        self.base, self.tuned = base, tuned
        self.errors: list[MergeKitError] = []
        self.naming = naming(base.config, base.tensors)
        self.theirs = self._names()
        self.pairs = tuple(self._pairs())
        self._lacking()

    def _names(self) -> dict[str, str]:
        """Return the model's name for each tensor of the base; prefixes may differ."""
        same = {name: name for name in self.base.tensors if name in self.tuned.tensors}
        if len(same) == len(self.tuned.tensors):
            return same
        found = match_names(self.tuned.tensors, self.base.tensors).found
        return same | {ours: name for name, ours in found.items() if ours not in same}

    def _pairs(self) -> Iterator[Pair]:
        for name in self.base.tensors:
            yield self._pair(name)
        taken, names = set(self.theirs.values()), self._own_naming()
        for name, held in self.tuned.tensors.items():
            if name not in taken:
                ours = tied_embedding(self.base, name, held.spec.shape) or ""
                below = self.base.tensors[ours] if ours else None
                module = module_now(names.module(name))
                yield Pair(name, module, below, held, ours, name)

    def _own_naming(self) -> Naming:
        """Return how programs name the modules of the model."""
        return naming(self.tuned.config or self.base.config, self.tuned.tensors)

    def _pair(self, name: str) -> Pair:
        base, module = self.base.tensors[name], self.naming.module(name)
        theirs = self.theirs.get(name) or self._stand_in(name, base)
        tuned = self.tuned.tensors[theirs] if theirs else None
        kind = None if base.component else factored_kind(name, base.spec)
        if tuned is None or kind is None:
            return Pair(name, module_now(module), base, tuned, name, theirs)
        turned = kind == "linear" and is_turned(self.base.config, module)
        pair = Pair(name, module, base, tuned, name, theirs, kind, turned)
        if base.spec.shape != tuned.spec.shape:
            self.errors.append(
                MismatchError(
                    f"{self.base.label} has shape {list(base.spec.shape)}, {self.tuned.label} "
                    f"{list(tuned.spec.shape)}",
                    where=name,
                    hint="is it the base that the model was trained from? "
                    "`mergekit inspect A B` lists what differs",
                )
            )
        return pair

    def _stand_in(self, name: str, held: Held) -> str:
        """Return the embedding of a tied model for a head that it does not store, "" if none."""
        found = tied_embedding(self.tuned, name, held.spec.shape)
        if found is None and is_head(name):  # a vocabulary of another size
            found = tied_embedding(self.tuned, name, None)
        return found or ""

    def _lacking(self) -> None:
        lacks = [p.name for p in self.pairs if p.tuned is None and not p.name.endswith(_BUFFERS)]
        if lacks:
            shown = ", ".join(lacks[:SHOWN]) + (", ..." if len(lacks) > SHOWN else "")
            self.errors.append(
                MismatchError(
                    f"lacks {len(lacks)} tensors that {self.base.label} has: {shown}",
                    where=self.tuned.label,
                    hint="is it the base that the model was trained from?",
                )
            )
