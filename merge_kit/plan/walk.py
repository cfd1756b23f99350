"""Walks the sources of a step."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import fields, is_dataclass, replace
from typing import Any

from merge_kit.plan.sources import (
    SOURCES,
    Chosen,
    Columns,
    Concat,
    LowRank,
    Merged,
    Normed,
    Permuted,
    Projected,
    Rows,
    Scaled,
    Source,
    Stored,
    Sum,
    Transposed,
    View,
)
from merge_kit.plan.values import Step


def operands(step: Step) -> list[Source]:
    """Return base, inputs and further operands of a step."""
    base = [] if step.base is None else [step.base]
    return [*base, *step.inputs, *(source for _, source in step.aux)]


def operand_shape(step: Step) -> tuple[int, ...]:
    """Return the shape of the operands that slabs are cut of; of none, it has no elements."""
    if step.inputs:
        return step.inputs[0].shape
    return step.outputs[0].spec.shape if step.shape is None else (0,)


def is_whole_aux(step: Step, source: Source) -> bool:
    """Return whether a further operand is whole in every slab."""
    return source.shape != operand_shape(step)


def parts(source: Source) -> list[Source]:
    """Return the sources that a source is made of; a step that feeds it is not looked into.

    Of sources that are read alike and one is chosen of, the first stands for all.
    """
    match source:
        case Rows() | View() | Permuted() | Transposed():
            return [source.source]
        case Concat() | Columns() | Chosen():
            one = isinstance(source, Chosen) and source.plain
            return list(source.sources[:1] if one else source.sources)
        case Sum():
            return [part for _, part in source.terms]
        case Normed():
            return [source.source, source.magnitude]
        case Scaled():
            return [source.source, source.factors]
        case LowRank():
            return [s for s in (source.weight, source.a, source.b) if s is not None]
        case Projected():
            return [s for s in (source.source, source.left, source.right) if s is not None]
        case _:
            return []


def with_parts(source: Source, change: Callable[[Source], Source]) -> Source:
    """Return a source made of what its parts are changed to, itself if nothing changes."""
    inside = parts(source)
    made = {id(part): change(part) for part in inside}
    if all(made[id(part)] is part for part in inside):
        return source
    if isinstance(source, Chosen) and source.plain:
        return replace(source, sources=tuple(map(change, source.sources)))
    changed: dict[str, Any] = {}
    for entry in fields(source):
        value = getattr(source, entry.name)
        if entry.name == "sources":
            changed[entry.name] = tuple(made[id(part)] for part in value)
        elif entry.name == "terms":
            changed[entry.name] = tuple((factor, made[id(part)]) for factor, part in value)
        elif id(value) in made:
            changed[entry.name] = made[id(value)]
    return replace(source, **changed)


def merged_below(source: Source) -> Iterator[Merged]:
    """Yield every result of another stage below a source, itself if it is one, inner ones first.

    Each is yielded once, however often it is read.
    """
    yield from _merged_below(source, set())


def _merged_below(source: Source, seen: set[int]) -> Iterator[Merged]:
    if isinstance(source, Merged):
        if id(source) in seen:
            return
        seen.add(id(source))
    for part in parts(source):
        yield from _merged_below(part, seen)
    if isinstance(source, Merged):
        for operand in operands(source.step):
            yield from _merged_below(operand, seen)
        yield source


def feeding(step: Step) -> Iterator[Merged]:
    """Yield the steps that feed a step directly, once for each place where they do."""
    pending = operands(step)
    while pending:
        source = pending.pop()
        if isinstance(source, Merged):
            yield source
        else:
            pending.extend(parts(source))


def merged_sources(step: Step) -> list[Merged]:
    """Return every feeding step below a step, each once, after those that feed it in turn."""
    found: dict[int, Merged] = {}
    seen = set[int]()
    for operand in operands(step):
        for source in _merged_below(operand, seen):
            found.setdefault(id(source.step), source)
    return list(found.values())


def stored(source: Source) -> Iterator[Stored]:
    """Yield every run of file bytes below a source, through feeding steps too."""
    if isinstance(source, Stored):
        yield source
    for part in source.sources if isinstance(source, Chosen) else parts(source):
        yield from stored(part)
    if isinstance(source, Merged):
        for operand in operands(source.step):
            yield from stored(operand)


def sources_in(value: Any) -> Iterator[Source]:
    """Yield the sources in a value: in its fields, its items, or itself."""
    if isinstance(value, SOURCES):
        yield value
    elif isinstance(value, Mapping):
        yield from (s for inner in value.values() for s in sources_in(inner))
    elif isinstance(value, tuple | list):
        yield from (s for inner in value for s in sources_in(inner))
    elif is_dataclass(value):
        yield from (s for f in fields(value) for s in sources_in(getattr(value, f.name)))


def with_sources(value: Any, change: Callable[[Source], Source]) -> Any:
    """Return a value whose sources are what they are changed to; see `sources_in`."""
    if isinstance(value, SOURCES):
        return change(value)
    if isinstance(value, Mapping):
        return {key: with_sources(inner, change) for key, inner in value.items()}
    if isinstance(value, tuple | list):
        return type(value)(with_sources(inner, change) for inner in value)
    if is_dataclass(value) and not isinstance(value, type):
        return replace(
            value, **{f.name: with_sources(getattr(value, f.name), change) for f in fields(value)}
        )
    return value
