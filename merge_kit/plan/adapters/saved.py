"""Tensors and rows that adapters hold whole, in place of the base's."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

from merge_kit.core.dtypes import is_float, promoted
from merge_kit.core.tensors import StoredTensor
from merge_kit.errors import MergeKitError, MismatchError
from merge_kit.methods.updates import AdapterMethod
from merge_kit.plan.adapters.groups import Member
from merge_kit.plan.adapters.modules import Modules
from merge_kit.plan.adapters.names_out import PREFIX, base_layer_name, with_prefix
from merge_kit.plan.sources import Concat, Source, Sum, of_file

_HINT = (
    "set parameters: {saved: first} to take it from the first of them or {saved: mean} to average "
    "it, or leave these adapters out"
)

Weight = Callable[[Member, str], float]
"""What an adapter counts for at the tensor of a name."""


@dataclass(frozen=True, slots=True)
class Holder:
    """One adapter that holds a tensor whole, and what the adapter counts for."""

    member: Member
    tensor: StoredTensor
    weight: float
    tokens: tuple[int, ...] = ()


@dataclass
class Whole:
    """What one adapter that is made holds whole.

    Attributes:
        changed: Modules that it changes by factors.
        tokens: Rows of embeddings, by the embedding's path.
        biases: Whether biases of the base are among it.
    """

    modules: Modules
    folder: str
    method: AdapterMethod
    changed: frozenset[str]
    tokens: dict[str, tuple[int, ...]] = field(default_factory=dict)
    biases: bool = False
    errors: list[MergeKitError] = field(default_factory=list)

    def add(self, members: Sequence[Member], weight: Weight) -> None:
        """Add what adapters hold whole; what cannot be decided is in the errors.

        Args:
            weight: What an adapter counts for at the tensor of a name.
        """
        for (tensor, why), holders in _saved(members, weight).items():
            if why == "modules_to_save" and tensor.rpartition(".")[0] in self.changed:
                self.errors.append(_twofold(tensor, holders[0]))
                continue
            self._tensor(tensor, why, holders)
        saved = {tensor for tensor, _ in _saved(members, weight)}
        for module, holders in _rows(members, weight).items():
            if module in self.changed or f"{module}.weight" in saved:
                self.errors.append(_twofold(f"{module}.weight", holders[0]))
            else:
                self._rows(module, holders)

    def _tensor(self, tensor: str, why: str, holders: Sequence[Holder]) -> None:
        self.biases = self.biases or why == "bias"
        name = self._written(holders[0])
        if why != "modules_to_save" and self.folder not in self.modules.same:
            wrapped = tensor.rpartition(".")[0] in self.changed
            name = base_layer_name(tensor, is_wrapped=wrapped)
        self._decide(name, tensor, holders, is_base=why == "base_layer")

    def _rows(self, module: str, holders: Sequence[Holder]) -> None:
        name, first = self._written(holders[0]), holders[0]
        self.tokens[module] = first.tokens
        if all(holder.tokens == first.tokens for holder in holders):
            self._decide(name, f"{module}.weight", holders)
            return
        every = [token for holder in holders for token in holder.tokens]
        alone = all(holder.weight == 1 for holder in holders) or self.method.saved != "error"
        if len(set(every)) < len(every) or not alone:
            names = _named(holders)
            self.errors.append(
                MismatchError(
                    f"{names} hold different rows of {module}, or count for other than 1",
                    where=f"{module}.weight",
                    hint="leave all but one of these adapters out",
                )
            )
            return
        self.tokens[module] = tuple(every)
        joined = Concat(tuple(of_file(holder.tensor) for holder in holders))
        self._write(name, joined, holders, "copied")

    def _decide(
        self, name: str, tensor: str, holders: Sequence[Holder], *, is_base: bool = False
    ) -> None:
        """Add a tensor: of one adapter, of all if they are equal, or as `saved` says."""
        first, saved = holders[0], self.method.saved
        shapes = {holder.tensor.spec.shape for holder in holders}
        dtypes = {holder.tensor.spec.dtype for holder in holders}
        if len(shapes) > 1:
            problem = (
                f"{_named(holders)} hold it in shapes {', '.join(map(str, map(list, shapes)))}"
            )
            self.errors.append(MismatchError(problem, where=tensor, hint="leave one of them out"))
        elif len(holders) == 1 and (first.weight == 1 or is_base or saved != "error"):
            self._write(name, of_file(first.tensor), holders, "copied")
        elif saved == "first":
            self._write(name, of_file(first.tensor), holders[:1], "copied")
            for other in holders[1:]:
                self._drop(other, f"saved: first takes {first.member.model.label}")
        elif saved == "mean" and is_float(promoted_or_first(dtypes)):
            share = 1 / len(holders)
            mean = Sum(tuple((share, of_file(holder.tensor)) for holder in holders))
            self._write(name, mean, holders, "merged")
        elif len(holders) == 1:
            problem = f"{_named(holders)} holds it whole, and counts for {first.weight:g}, not 1"
            self.errors.append(MismatchError(problem, where=tensor, hint=_HINT))
        elif len(dtypes) > 1:
            problem = f"{_named(holders)} hold it whole, in {' and '.join(sorted(dtypes))}"
            self.errors.append(MismatchError(problem, where=tensor, hint=_HINT))
        else:
            self._equal(name, tensor, holders)

    def _equal(self, name: str, tensor: str, holders: Sequence[Holder]) -> None:
        """Add a copy whose holders must hold the same bytes, which the run looks at first."""
        first, others = holders[0], holders[1:]
        step = self.modules.passed(
            self.folder, name, of_file(first.tensor), first.member.model.label
        )
        self.modules.add(
            replace(
                step,
                agree=tuple(of_file(holder.tensor) for holder in others),
                agree_models=tuple(holder.member.model.label for holder in others),
                note=tensor,
            )
        )
        for holder in holders:
            self.modules.ledger.enter("copied", holder.member.model, [holder.tensor])

    def _write(
        self,
        name: str,
        source: Source,
        holders: Sequence[Holder],
        what: Literal["merged", "copied"],
    ) -> None:
        label = " + ".join(holder.member.model.label for holder in holders)
        self.modules.add(self.modules.passed(self.folder, name, source, label))
        for holder in holders:
            self.modules.ledger.enter(what, holder.member.model, [holder.tensor])

    def _written(self, holder: Holder) -> str:
        """Return the name in the output of a tensor."""
        name = holder.tensor.spec.name
        if self.folder in self.modules.same:
            return name
        return with_prefix(holder.member.renamed(name.removeprefix(PREFIX)))

    def _drop(self, holder: Holder, why: str) -> None:
        self.modules.ledger.enter("dropped", holder.member.model, [holder.tensor], why)


def promoted_or_first(dtypes: set[str]) -> str:
    """Return the dtype of a sum, or one that is no float."""
    return next((d for d in dtypes if not is_float(d)), promoted(sorted(dtypes)))


def _saved(members: Sequence[Member], weight: Weight) -> Mapping[tuple[str, str], list[Holder]]:
    found: dict[tuple[str, str], list[Holder]] = {}
    for member in members:
        for saved in member.adapter.saved:
            tensor = member.renamed(saved.tensor)
            holder = Holder(member, saved.stored, weight(member, tensor))
            found.setdefault((tensor, saved.why), []).append(holder)
    return found


def _rows(members: Sequence[Member], weight: Weight) -> Mapping[str, list[Holder]]:
    found: dict[str, list[Holder]] = {}
    for member in members:
        for rows in member.adapter.rows:
            module = member.renamed(rows.module)
            counts = weight(member, f"{module}.weight")
            holder = Holder(member, rows.stored, counts, rows.tokens)
            found.setdefault(module, []).append(holder)
    return found


def _named(holders: Sequence[Holder]) -> str:
    return " and ".join(holder.member.model.label for holder in holders)


def _twofold(tensor: str, holder: Holder) -> MismatchError:
    return MismatchError(
        f"{holder.member.model.label} holds it whole or in part, and another adapter changes it",
        where=tensor,
        hint="leave one of the two out",
    )
