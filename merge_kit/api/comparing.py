"""Task vectors compared: lengths, angles and conflicts of signs, by tensor, by layer, in all."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import sqrt
from typing import Any, Literal

from merge_kit.api.changes import Sum
from merge_kit.api.deltas import scanned
from merge_kit.architecture.stacks import outermost
from merge_kit.core.names import natural_key
from merge_kit.errors import UsageError

By = Literal["tensor", "layer"]


@dataclass(frozen=True, slots=True)
class Row:
    """Two task vectors in one tensor, in one layer, or in all.

    Attributes:
        name: Of the tensor or layer ("model.layers.3"); "all" for everything.
        elements: Elements compared.
        dots: Dot products: of the first with itself, of both, of the second with itself.
        both: Elements where neither is zero.
        conflicts: Those of them where the signs differ.
    """

    name: str
    elements: int
    dots: tuple[float, float, float]
    both: int
    conflicts: int

    @property
    def norms(self) -> tuple[float, float]:
        """Length of the first and of the second."""
        return sqrt(self.dots[0]), sqrt(self.dots[2])

    @property
    def cosine(self) -> float | None:
        """Cosine of the angle between them; None if one is zero."""
        own, other = self.norms
        if own <= 0 or other <= 0:
            return None
        return max(-1.0, min(1.0, self.dots[1] / (own * other)))

    @property
    def sign_conflict(self) -> float | None:
        """Share of the elements where neither is zero whose signs differ; None if there are none.

        0 says that the two never pull in different directions, 0.5 is what chance gives.
        """
        return self.conflicts / self.both if self.both else None


@dataclass(frozen=True, slots=True)
class Comparison:
    """Two task vectors side by side; as text it is a table by layer.

    Attributes:
        tensors: A row for each float tensor, in natural order of the names.
    """

    tensors: tuple[Row, ...]

    @property
    def layers(self) -> tuple[Row, ...]:
        """A row for each layer, and for each tensor outside the layers."""
        return tuple(_joined(name, rows) for name, rows in _by_layer(self.tensors).items())

    @property
    def total(self) -> Row:
        """One row for everything."""
        return _joined("all", self.tensors)

    def __str__(self) -> str:
        rows: list[tuple[str, ...]] = [("", "norm", "other", "cosine", "sign conflict")]
        for row in (*self.layers, self.total):
            norms = [f"{norm:.4g}" for norm in row.norms]
            rows.append((row.name, *norms, _number(row.cosine), _number(row.sign_conflict)))
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        return "\n".join(_line(row, widths) for row in rows)


def compared(one: Sum, other: Sum) -> Comparison:
    """Return two sums side by side; the models are read once."""
    found = _scanned([one, other], ["products", "signs"])
    rows = [_row(name, elements, results) for name, elements, results in found]
    return Comparison(tuple(rows))


def lengths(terms: Sum, by: By) -> dict[str, float]:
    """Return the length of a sum in each tensor or layer."""
    if by not in ("tensor", "layer"):
        raise UsageError(f"by is {by!r}, expected 'tensor' or 'layer'")
    squares = {name: _float(r["products"], 0, 0) for name, _, r in _scanned([terms], ["products"])}
    if by == "layer":
        grouped: dict[str, float] = {}
        for name, square in squares.items():
            grouped[layer_of(name)] = grouped.get(layer_of(name), 0.0) + square
        squares = grouped
    return {name: sqrt(square) for name, square in squares.items()}


def conflict(sums: Sequence[Sum]) -> float:
    """Return the share of elements whose signs differ, where two or more sums are not zero."""
    counts = [results["signs"].tolist() for _, _, results in _scanned(sums, ["signs"])]
    several, differing = (sum(int(row[i]) for row in counts) for i in (0, 1))
    return differing / several if several else 0.0


def layer_of(name: str) -> str:
    """Return the layer of a tensor ("model.layers.3"), or its own name outside layers."""
    place = outermost(name)
    if place is None:
        return name
    prefix, layer, _ = place
    return f"{prefix}.{layer}" if prefix and not prefix.endswith("/") else f"{prefix}{layer}"


def _scanned(
    sums: Sequence[Sum], measures: Sequence[str]
) -> list[tuple[str, int, Mapping[str, Any]]]:
    """Return name, elements and measures of each tensor, in natural order."""
    found = [
        (step.outputs[0].key, step.outputs[0].spec.numel, results)
        for step, results in scanned(sums, measures)
    ]
    return sorted(found, key=lambda row: natural_key(row[0]))


def _row(name: str, elements: int, results: Mapping[str, Any]) -> Row:
    products, signs = results["products"], results["signs"].tolist()
    dots = (_float(products, 0, 0), _float(products, 0, 1), _float(products, 1, 1))
    return Row(name, elements, dots, int(signs[0]), int(signs[1]))


def _float(products: Any, row: int, column: int) -> float:
    return float(products[row, column])


def _by_layer(rows: Sequence[Row]) -> dict[str, list[Row]]:
    found: dict[str, list[Row]] = {}
    for row in rows:
        found.setdefault(layer_of(row.name), []).append(row)
    return found


def _joined(name: str, rows: Sequence[Row]) -> Row:
    own, both, its = (sum(row.dots[i] for row in rows) for i in range(3))
    return Row(
        name,
        sum(row.elements for row in rows),
        (own, both, its),
        sum(row.both for row in rows),
        sum(row.conflicts for row in rows),
    )


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"


def _line(row: Sequence[str], widths: Sequence[int]) -> str:
    first, *rest = zip(row, widths, strict=True)
    cells: Iterator[str] = (text.rjust(width) for text, width in rest)
    return "  ".join([first[0].ljust(first[1]), *cells]).rstrip()
