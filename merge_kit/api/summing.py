"""The method that computes sums of models and task vectors, pruned ones too, and measures them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from merge_kit.api.changes import Difference, Prune, Sum
from merge_kit.api.requests import Node
from merge_kit.methods import dropping, ops, order
from merge_kit.methods.base import MergeMethod, Scan, Scans, Slab
from merge_kit.methods.reductions import Gram
from merge_kit.methods.reductions import Sum as SumOf

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, slots=True)
class Leaf:
    """A difference by the positions of its models; base -1 for none."""

    model: int
    base: int


@dataclass(frozen=True, slots=True)
class Branch:
    """A pruned sum; `number` names its scan."""

    terms: tuple[tuple[float, Leaf | Branch], ...]
    prune: Prune
    number: int

    @property
    def scan(self) -> str:
        """Name of the scan that finds its threshold, "" if it takes none."""
        return f"cut-{self.number}" if self.prune.how == "magnitude" else ""


Tree = tuple[tuple[float, Leaf | Branch], ...]


@dataclass(frozen=True, kw_only=True)
class Summed(MergeMethod):
    """Models plus task vectors.

    out = sum of task vectors in order, then plus the models in order

    Attributes:
        models: (weight, position) of each model.
        sums: The first is added to the models; all of them are measured.
        measured: "products" and "signs", those that are scanned.
    """

    method_name: ClassVar[str] = "sum"

    models: tuple[tuple[float, int], ...] = ()
    sums: tuple[Tree, ...]
    measured: tuple[str, ...] = ()

    def scans(self) -> Sequence[Scan]:
        """Return the thresholds of what is pruned, then the measures."""
        found = [_cut(branch) for branch in self._branches() if branch.scan]
        cuts = tuple(scan.name for scan in found)
        if "products" in self.measured:
            found.append(Scan("products", Gram(), of=self._rows, uses=cuts))
        if "signs" in self.measured:
            found.append(Scan("signs", SumOf(), of=self._signs, uses=cuts))
        return found

    def merge(self, slab: Slab, scans: Scans) -> Tensor:
        """Return the models plus the first sum."""
        total = _total(self.sums[0], slab, scans) if self.sums[0] else None
        for weight, position in self.models:
            row = ops.scaled(slab.tensors[position], weight)
            total = row if total is None else total.add_(row)
        return slab.tensors.new_zeros(slab.tensors.shape[1]) if total is None else total

    def scratch_bytes(self, models: int, elements: int) -> int:
        """Return the bytes of the sums, and of what is pruned on the way."""
        del models
        depth = 1 + max((_depth(tree) for tree in self.sums), default=0)
        rows = len(self.sums) + 2 * depth + 3 * bool(self.measured)
        return 8 * elements * (rows + 1)

    def _branches(self) -> Iterator[Branch]:
        seen: set[int] = set()
        for tree in self.sums:
            for branch in _branches(tree):
                if branch.number not in seen:
                    seen.add(branch.number)
                    yield branch

    def _rows(self, slab: Slab, scans: Scans) -> list[Tensor]:
        return [_total(tree, slab, scans) for tree in self.sums]

    def _signs(self, slab: Slab, scans: Scans) -> list[Tensor]:
        """Return where two or more sums are not zero, and where their signs differ."""
        counted = slab.tensors.new_zeros(slab.tensors.shape[1])
        balance = counted.clone()
        for row in self._rows(slab, scans):
            signs = row.sign_()
            balance.add_(signs)
            counted.add_(signs.abs_())
        agree = balance.abs_().eq_(counted)  # 1 where all that are not zero agree
        several = counted.ge_(2)
        return [several, several - several * agree]


def _total(tree: Tree, slab: Slab, scans: Scans) -> Tensor:
    """Return a sum, one term after the other, so that slabs do not matter."""
    total: Tensor | None = None
    for weight, node in tree:
        row = ops.scaled(_row(node, slab, scans), weight)
        total = row if total is None else total.add_(row)
    return slab.tensors.new_zeros(slab.tensors.shape[1]) if total is None else total


def _row(node: Leaf | Branch, slab: Slab, scans: Scans) -> Tensor:
    """Return a difference, or what is kept of a sum, as a new tensor."""
    if isinstance(node, Leaf):
        model = slab.tensors[node.model]
        return model.clone() if node.base < 0 else model - slab.tensors[node.base]
    row, prune = _total(node.terms, slab, scans), node.prune
    if prune.how == "magnitude":
        (cut,) = scans[node.scan]
        return order.keep_top(row, cut, slab)
    key = (prune.seed, "dare", prune.position, slab.name)
    return dropping.drop(row, prune.density, key, slab.offset)


def _cut(branch: Branch) -> Scan:
    def rows(slab: Slab, scans: Scans) -> list[Tensor]:
        return [_total(branch.terms, slab, scans)]

    top = order.Top((branch.prune.density,), least=1)
    inner = tuple(one.scan for one in _branches(branch.terms) if one.scan)
    reduction = order.MagnitudeAt(((0, top),))
    return Scan(branch.scan, reduction, of=rows, uses=inner, scope=branch.prune.scope)


def _branches(tree: Tree) -> Iterator[Branch]:
    """Yield what is pruned, the inner ones first."""
    for _, node in tree:
        if isinstance(node, Branch):
            yield from _branches(node.terms)
            yield node


def _depth(tree: Tree) -> int:
    inner = [_depth(node.terms) for _, node in tree if isinstance(node, Branch)]
    return 1 + max(inner, default=0)


class Trees:
    """Makes trees of sums: models become positions.

    Args:
        nodes: In the order of the slab's rows.
    """

    def __init__(self, nodes: Sequence[Node]) -> None:
        self._at = {node.key: i for i, node in enumerate(nodes)}
        self._numbers: dict[object, int] = {}

    def position(self, node: Node) -> int:
        """Return the row of a model."""
        return self._at[node.key]

    def tree(self, terms: Sum) -> Tree:
        """Return a sum as a tree."""
        found: list[tuple[float, Leaf | Branch]] = []
        for weight, change in terms:
            if isinstance(change, Difference):
                base = -1 if change.base is None else self.position(change.base)
                found.append((weight, Leaf(self.position(change.model), base)))
            else:
                number = self._numbers.setdefault(change.key, len(self._numbers))
                found.append((weight, Branch(self.tree(change.terms), change.prune, number)))
        return tuple(found)
