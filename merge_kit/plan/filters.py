"""Filters of parameters that match no tensor: said, since a recipe may be meant for other names."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from merge_kit.core.names import nearest
from merge_kit.recipe.values import Parameters, Setting

_MOST_NAMES = 2000
"""Different names of modules that are looked through for the nearest one."""


@dataclass(slots=True)
class _Watched:
    """A setting with filters.

    Attributes:
        left: Its filters that have matched nothing so far.
        names: The tensors that they were held to.
    """

    parameter: str
    setting: Setting
    left: list[str]
    names: list[str] = field(default_factory=list)


class Filters:
    """Which filters of a stage's parameters have matched a tensor."""

    def __init__(self) -> None:
        self._watched: dict[int, tuple[Parameters, list[_Watched]]] = {}

    def see(self, levels: Sequence[Parameters], tensors: Sequence[str]) -> None:
        """Hold the filters of these levels to the names of a tensor, any of which may match."""
        for level in levels:
            if id(level) not in self._watched:
                self._watched[id(level)] = level, list(_with_filters(level))
            for one in self._watched[id(level)][1]:
                if one.left:
                    one.left = [part for part in one.left if not any(part in t for t in tensors)]
                    one.names += tensors

    def notes(self) -> Iterator[str]:
        """Yield a sentence for each filter that has matched none of the tensors it was held to."""
        every = [one for _, watched in self._watched.values() for one in watched]
        for one in sorted(every, key=lambda one: (one.setting.mark.line, one.setting.mark.column)):
            for part in one.left:
                yield (
                    f"{one.setting.mark}: {one.parameter} has a filter {part!r} that is in no "
                    f"tensor's name here, and has no effect{_nearest(part, one.names)}"
                )


def _with_filters(level: Parameters) -> Iterator[_Watched]:
    for parameter, setting in level.items():
        filters = (rule.filter for rule in setting.rules)
        left = list(dict.fromkeys(part for part in filters if part not in (None, "", "*")))
        if left:
            yield _Watched(parameter, setting, [part for part in left if part is not None])


def _nearest(part: str, names: Sequence[str]) -> str:
    """Return `; did you mean 'o_proj'?`, or nothing where no module has nearly this name."""
    wanted = part.strip(".").split(".")
    if any(word.isdigit() for word in wanted):
        return ""  # a layer's number is right or wrong, but like no other
    words = len(wanted)
    found: dict[str, None] = {}
    for name in dict.fromkeys(names):
        path = name.removesuffix(".weight").removesuffix(".bias").split(".")
        for i in range(len(path) - words + 1):
            if not path[i].isdigit():
                found.setdefault(".".join(path[i : i + words]))
        if len(found) > _MOST_NAMES:
            break
    hint = nearest(".".join(wanted), found)
    return f"; {hint}" if hint.startswith("did") else ""
