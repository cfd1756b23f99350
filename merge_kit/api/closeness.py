"""How close adapters are: cosines, norms and common subspaces of their changes, as values."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import sqrt

from merge_kit.errors import UsageError


@dataclass(frozen=True, slots=True)
class Pair:
    """Two adapters in one module, in one layer, or in all; what only one of them changes counts.

    Attributes:
        adapters: Positions of the two.
        squares: Squared norms of their changes.
        dot: The sum of the products of the changes' elements.
        shared: Modules that both change.
        reinforcing: Those of them where the changes point the same way (dot above 0).
        cancelling: Those where they point against each other.
        least: Rank of the smaller change, summed over the shared modules.
        output_common: |U1^T U2|^2 of the spaces that the changes write, summed likewise.
        input_common: The same of the spaces that they read.
        output_chance: What `output_common` is on average for random spaces.
        input_chance: What `input_common` is.
    """

    adapters: tuple[int, int]
    squares: tuple[float, float]
    dot: float = 0.0
    shared: int = 0
    reinforcing: int = 0
    cancelling: int = 0
    least: int = 0
    output_common: float = 0.0
    input_common: float = 0.0
    output_chance: float = 0.0
    input_chance: float = 0.0

    @property
    def norms(self) -> tuple[float, float]:
        """Frobenius norms of the changes."""
        return sqrt(self.squares[0]), sqrt(self.squares[1])

    @property
    def cosine(self) -> float | None:
        """Cosine of the angle between the changes; None if one is zero."""
        one, other = self.norms
        if one <= 0 or other <= 0:
            return None
        return max(-1.0, min(1.0, self.dot / one / other))

    @property
    def interference(self) -> float | None:
        """How much longer (above 0) or shorter (below) the sum is than at right angles.

        That is |d1 + d2|^2 / (|d1|^2 + |d2|^2) - 1, in [-1, 1]: 1 for a change met by itself, -1
        for one that is undone; None if both are zero.
        """
        whole = sum(self.squares)
        return max(-1.0, min(1.0, 2 * self.dot / whole)) if whole > 0 else None

    @property
    def output_overlap(self) -> float | None:
        """Share of the smaller written space that lies in the other; None without one."""
        return self._share(self.output_common)

    @property
    def input_overlap(self) -> float | None:
        """Share of the smaller read space that lies in the other; None without one."""
        return self._share(self.input_common)

    @property
    def output_overlap_by_chance(self) -> float | None:
        """What `output_overlap` is on average for random spaces."""
        return self._share(self.output_chance)

    @property
    def input_overlap_by_chance(self) -> float | None:
        """What `input_overlap` is on average for random spaces."""
        return self._share(self.input_chance)

    def _share(self, common: float) -> float | None:
        return min(1.0, common / self.least) if self.least else None


@dataclass(frozen=True, slots=True)
class Row:
    """All adapters in one module, in one layer, or in all.

    Attributes:
        name: Of the module or layer ("model.layers.3"); "all" for everything.
        norms: Frobenius norm of each adapter's change, 0 where it changes nothing.
        pairs: Every two adapters: first and second, first and third, ...
    """

    name: str
    norms: tuple[float, ...]
    pairs: tuple[Pair, ...]


@dataclass(frozen=True, slots=True)
class AdapterComparison:
    """Adapters side by side; as text it is a table of all pairs.

    Attributes:
        names: Of the adapters, different from one another.
        bases: The base model that each names, "" if it names none.
        modules: A row for each module that one of them changes, in natural order.
        layers: A row for each layer, and for each module outside the layers.
        total: One row for everything.
        notes: What is not compared, one sentence each.
    """

    names: tuple[str, ...]
    bases: tuple[str, ...]
    modules: tuple[Row, ...]
    layers: tuple[Row, ...]
    total: Row
    notes: tuple[str, ...]

    def pair(self, one: int = 0, other: int = 1) -> Pair:
        """Return two adapters in all modules, by their positions.

        Raises:
            UsageError: If they are no two of these adapters.
        """
        wanted = (min(one, other), max(one, other))
        found = next((pair for pair in self.total.pairs if pair.adapters == wanted), None)
        if found is None:
            last = len(self.names) - 1
            problem = f"found the positions {one} and {other}"
            raise UsageError(f"{problem}, expected two different ones from 0 to {last}")
        return found

    def __str__(self) -> str:
        rows: list[tuple[str, ...]] = [("", "", "cosine", "interference", "outputs", "inputs")]
        for pair in self.total.pairs:
            one, other = (self.names[i] for i in pair.adapters)
            numbers = (pair.cosine, pair.interference, pair.output_overlap, pair.input_overlap)
            rows.append((one, other, *(_number(number) for number in numbers)))
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        return "\n".join(_line(row, widths) for row in rows)


def joined(name: str, rows: Sequence[Row]) -> Row:
    """Return the modules of a layer, or all modules, as one row."""
    pairs = tuple(_summed(several) for several in zip(*(row.pairs for row in rows), strict=True))
    squares = [
        sum(norm**2 for norm in norms) for norms in zip(*(r.norms for r in rows), strict=True)
    ]
    return Row(name, tuple(map(sqrt, squares)), pairs)


def _summed(pairs: Sequence[Pair]) -> Pair:
    return Pair(
        pairs[0].adapters,
        (sum(pair.squares[0] for pair in pairs), sum(pair.squares[1] for pair in pairs)),
        dot=sum(pair.dot for pair in pairs),
        shared=sum(pair.shared for pair in pairs),
        reinforcing=sum(pair.reinforcing for pair in pairs),
        cancelling=sum(pair.cancelling for pair in pairs),
        least=sum(pair.least for pair in pairs),
        output_common=sum(pair.output_common for pair in pairs),
        input_common=sum(pair.input_common for pair in pairs),
        output_chance=sum(pair.output_chance for pair in pairs),
        input_chance=sum(pair.input_chance for pair in pairs),
    )


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"


def _line(row: Sequence[str], widths: Sequence[int]) -> str:
    texts = [text.ljust(width) for text, width in zip(row[:2], widths, strict=False)]
    numbers = [text.rjust(width) for text, width in zip(row[2:], widths[2:], strict=True)]
    return "  ".join([*texts, *numbers]).rstrip()
