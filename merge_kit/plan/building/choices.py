"""One of several sources for each place, in an order that is found before the run.

A choice among results of a stage would hold the steps of all of them, at every place: with 128
experts, 128 times as many steps as there are tensors. Where they differ in nothing but the bytes
that they are made of, a step is made of choices among these bytes instead.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

from merge_kit.plan.sources import SOURCES, Chosen, Merged, Source, Stored, View
from merge_kit.plan.values import Step

_OWN = frozenset({"outputs", "base", "inputs", "aux", "note"})
"""What steps that do alike may differ in."""


@dataclass(frozen=True, slots=True)
class Order:
    """Where the order is found.

    Attributes:
        key: Of the artefact.
        name: Of the vector in it that holds for each place the number of its source.
    """

    key: str
    name: str

    def choices(self, sources: Sequence[Source]) -> tuple[Source, ...]:
        """Return for each place the one of these sources that stands there."""
        first = sources[0]
        if all(source is first or source == first for source in sources):
            return tuple(sources)
        if all(isinstance(source, Merged) for source in sources):
            made = self._merged(sources)
        elif all(type(source) is type(first) for source in sources):
            made = self._composed(sources)
        else:
            made = None
        return self._chosen(tuple(sources)) if made is None else made

    def _chosen(self, sources: tuple[Source, ...]) -> tuple[Source, ...]:
        plain = all(map(_is_plain, sources)) or _are_views(sources)
        places = range(len(sources))
        return tuple(Chosen(sources, self.key, self.name, place, plain) for place in places)

    def _merged(self, sources: Sequence[Source]) -> tuple[Source, ...] | None:
        """Return steps of choices; None where the steps of the sources do not all do alike."""
        held = [source for source in sources if isinstance(source, Merged)]
        steps = [one.step for one in held]
        if len({(one.dtype, one.shape, one.spill) for one in held}) > 1 or not _alike(steps):
            return None
        inputs = zip(*map(self.choices, zip(*(s.inputs for s in steps), strict=True)), strict=True)
        names = [name for name, _ in steps[0].aux]
        columns = [self.choices(column) for column in zip(*map(_aux, steps), strict=True)]
        bases = [step.base for step in steps if step.base is not None]
        lower = self.choices(bases) if bases else (None,) * len(steps)
        made = []
        for place, (own, row) in enumerate(zip(held, inputs, strict=True)):
            aux = tuple((n, c[place]) for n, c in zip(names, columns, strict=True))
            step = replace(own.step, inputs=row, base=lower[place], aux=aux)
            made.append(replace(own, step=step))
        return tuple(made)

    def _composed(self, sources: Sequence[Source]) -> tuple[Source, ...] | None:
        """Return sources made of choices; None where they differ in more than they are made of."""
        changed: list[dict[str, Any]] = [{} for _ in sources]
        for entry in fields(sources[0]):
            values = [getattr(source, entry.name) for source in sources]
            if all(value == values[0] for value in values):
                continue
            columns = self._column(entry.name, values)
            if columns is None:
                return None
            for place, value in enumerate(columns):
                changed[place][entry.name] = value
        pairs = zip(sources, changed, strict=True)
        return tuple(replace(source, **own) for source, own in pairs)

    def _column(self, name: str, values: Sequence[Any]) -> Sequence[Any] | None:
        """Return what stands at each place in one field that is a source, or holds sources."""
        if all(isinstance(value, SOURCES) for value in values):
            if len({(value.dtype, value.shape) for value in values}) > 1:
                return None
            return self.choices(values)
        if name not in ("sources", "terms") or len({len(value) for value in values}) > 1:
            return None
        if name == "sources":
            columns = [self._column("", column) for column in zip(*values, strict=True)]
            return None if None in columns else list(zip(*columns, strict=True))
        factors = [tuple(factor for factor, _ in value) for value in values]
        inner = self._column("sources", [tuple(s for _, s in value) for value in values])
        if inner is None or any(factor != factors[0] for factor in factors):
            return None
        return [tuple(zip(factors[0], row, strict=True)) for row in inner]


def _is_plain(source: Source) -> bool:
    """Return whether a source is a run of bytes of a file, whichever it is."""
    if isinstance(source, Chosen):
        return source.plain
    return isinstance(source.source if isinstance(source, View) else source, Stored)


def _are_views(sources: Sequence[Source]) -> bool:
    """Return whether sources are views of one, so that the first tells what reading any takes."""
    inner = [source.source for source in sources if isinstance(source, View)]
    return len(inner) == len(sources) and all(source is inner[0] for source in inner)


def _aux(step: Step) -> tuple[Source, ...]:
    return tuple(source for _, source in step.aux)


def _alike(steps: Sequence[Step]) -> bool:
    """Return whether steps do the same to operands of the same shapes and dtypes."""
    first = steps[0]
    if first.method is None or first.method.by_name or first.agree:
        return False
    if len(first.outputs) > 1 or first.shape is not None:
        return False
    return all(step is first or _like(first, step) for step in steps)


def _like(one: Step, other: Step) -> bool:
    same = all(
        getattr(one, entry.name) == getattr(other, entry.name)
        for entry in fields(one)
        if entry.name not in _OWN
    )
    return same and _outline(one) == _outline(other)


def _outline(step: Step) -> Sequence[object]:
    """Return what the operands and the result of a step are, but for where they come from."""
    operands = [*step.inputs, *_aux(step), *([] if step.base is None else [step.base])]
    specs = [(target.spec.dtype, target.spec.shape) for target in step.outputs]
    return [step.base is None, [name for name, _ in step.aux], specs] + [
        (source.dtype, source.shape) for source in operands
    ]
