"""A tensor as each adapter has it, and as all of them together make it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations

from merge_kit.core.dtypes import is_float
from merge_kit.core.tensors import TensorSpec
from merge_kit.errors import MismatchError
from merge_kit.io.adapter_values import Saved, TokenRows
from merge_kit.plan.applying.changes import Change
from merge_kit.plan.applying.fitting import What
from merge_kit.plan.models import Model
from merge_kit.plan.sources import Concat, Rows, Source, Sum, of_file


@dataclass(frozen=True, slots=True)
class Version:
    """One adapter's part in one tensor: the tensor below it, with these things done to it."""

    adapter: Model
    weight: float
    whats: tuple[What, ...]

    @property
    def changes(self) -> tuple[Change, ...]:
        """What is added, without the weight."""
        return tuple(what for what in self.whats if isinstance(what, Change))

    @property
    def weighted(self) -> tuple[Change, ...]:
        """What is added, times the weight."""
        return tuple(change.times(self.weight) for change in self.changes)

    @property
    def saved(self) -> Saved | None:
        """What stands in place of the tensor below, or None."""
        return next((what for what in self.whats if isinstance(what, Saved)), None)

    @property
    def rows(self) -> TokenRows | None:
        """Rows that stand in place of those of the tensor below, or None."""
        return next((what for what in self.whats if isinstance(what, TokenRows)), None)

    @property
    def is_sum(self) -> bool:
        """Whether it is the tensor below plus changes."""
        return all(isinstance(what, Change) and not _is_dora(what) for what in self.whats)

    def is_copy(self, spec: TensorSpec) -> bool:
        """Return whether a tensor of this spec is then one of the adapter's, byte for byte."""
        saved = self.saved
        alone = len(self.whats) == 1 and self.weight == 1
        return alone and saved is not None and saved.stored.spec.dtype == spec.dtype

    def source(self, under: Source) -> Source:
        """Return the tensor as this adapter has it when it is alone and its weight is 1."""
        saved, rows = self.saved, self.rows
        if saved is not None:
            under = of_file(saved.stored)
        if rows is not None:
            under = _with_rows(under, rows)
        for change in self.changes:
            under = change.normed(under) if _is_dora(change) else change.added_to(under)
        return under

    def tensors(self) -> Iterator[str]:
        """Yield the names of the tensors of the adapter's file that this takes."""
        for what in self.whats:
            if not isinstance(what, Change):
                yield what.stored.spec.name
                continue
            bias = what.update.bias
            for one in what.update.stored:
                if (one is bias) is what.bias:
                    yield one.spec.name


def combined(under: Source, versions: Sequence[Version]) -> Source:
    """Return a tensor plus the difference that each version makes to it, times its weight."""
    others = [version for version in versions if not version.is_sum]
    total = under
    if len(others) == 1 and others[0].weight == 1:
        total = others[0].source(under)
    elif others:
        own = 1.0 - sum(version.weight for version in others)
        terms = [(version.weight, version.source(under)) for version in others]
        total = Sum((*([(own, under)] if own else []), *terms))
    for version in versions:
        if version.is_sum:
            for change in version.weighted:
                total = change.added_to(total)
    return total


def refuse_doubles(name: str, spec: TensorSpec, versions: Sequence[Version]) -> None:
    """Refuse what has no one meaning: a tensor, or a row of it, that two adapters hold whole.

    Raises:
        MismatchError: If there is such, if one adapter changes the tensor twice, or if a tensor
            that is not of floats has a weight.
    """
    for version in versions:
        if len({type(what) for what in version.whats}) < len(version.whats):
            raise MismatchError(
                f"two of its modules are {name}",
                where=version.adapter.label,
                hint="apply it to the model that it was made for",
            )
        if version.weight != 1 and not is_float(spec.dtype):
            raise MismatchError(
                f"holds {name}, of {spec.dtype}, whole; it cannot be weighed by {version.weight:g}",
                where=version.adapter.label,
                hint="leave its weight out",
            )
    for one, other in combinations(versions, 2):
        if overlap(one, other):
            raise MismatchError(
                f"holds {name} whole, and so does {one.adapter.label}",
                where=other.adapter.label,
                hint="merge the two as models, each with a weight: MODEL+ONE and MODEL+OTHER",
            )


def overlap(one: Version, other: Version) -> bool:
    """Return whether both replace some of the same rows."""
    if one.saved is not None or other.saved is not None:
        return all(v.saved is not None or v.rows is not None for v in (one, other))
    if one.rows is None or other.rows is None:
        return False
    return not set(one.rows.tokens).isdisjoint(other.rows.tokens)


def _is_dora(change: Change) -> bool:
    return change.update.magnitude is not None and not change.bias


def _with_rows(under: Source, rows: TokenRows) -> Source:
    count = under.shape[0]
    order = list(range(count))
    for i, token in enumerate(rows.tokens):
        order[token] = count + i
    return Rows(Concat((under, of_file(rows.stored))), tuple(order))
