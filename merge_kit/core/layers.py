"""Layers of a source model: ranges and lists."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class LayerRange:
    """Layers of a source model, `start` included, `stop` not."""

    start: int
    stop: int

    def __len__(self) -> int:
        return self.stop - self.start

    def __getitem__(self, k: int) -> int:
        return range(self.start, self.stop)[k]

    def __str__(self) -> str:
        return f"[{self.start}, {self.stop}]"


@dataclass(frozen=True, slots=True)
class LayerList:
    """Layers of a source model in any order."""

    numbers: tuple[int, ...]

    @property
    def stop(self) -> int:
        """The highest layer plus one, 0 if there is none."""
        return max(self.numbers, default=-1) + 1

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, k: int) -> int:
        return self.numbers[k]

    def __str__(self) -> str:
        return str(list(self.numbers))


Layers = LayerRange | LayerList
