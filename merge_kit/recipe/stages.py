"""Several documents: which one is the output, and an order in which each finds what it needs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from graphlib import CycleError, TopologicalSorter

from merge_kit.recipe.document import Document
from merge_kit.recipe.findings import Findings
from merge_kit.recipe.values import Entry, Mark, ModelRef, Stage


def references(stage: Stage) -> Iterator[ModelRef]:
    """Yield every reference to a model in a stage."""
    if stage.base_model is not None:
        yield stage.base_model
    if stage.tokenizer is not None and isinstance(stage.tokenizer.source, ModelRef):
        yield stage.tokenizer.source
    slices = (*stage.slices, *(part for module in stage.modules for part in module.slices))
    for part in slices:
        if part.base_model is not None:
            yield part.base_model
    for rule in stage.tensors:
        if rule.copy is not None:
            yield rule.copy
    for entry in entries(stage):
        yield entry.model


def entries(stage: Stage) -> Iterator[Entry]:
    """Yield every model that a stage lists, in the order of the recipe."""
    yield from stage.models
    yield from stage.shared_experts
    for part in stage.slices:
        yield from part.sources
    for module in stage.modules:
        yield from module.models
        for part in module.slices:
            yield from part.sources
    for rule in stage.tensors:
        yield from rule.models or ()


def order(documents: Sequence[Document], findings: Findings) -> tuple[Document, ...]:
    """Return the documents in an order in which each comes after those it refers to.

    The output comes last, with its name removed. What is wrong goes to the findings; the result
    then means nothing.
    """
    if len(documents) == 1:
        return (_single(documents[0], findings),)
    _check_names(documents, findings)
    if findings.problems:
        return ()
    named = {d.stage.name: d for d in documents if d.stage.name is not None}
    needs = {d.stage.name: _needs(d.stage, set(named)) for d in documents}
    try:
        names = list(TopologicalSorter(needs).static_order())
    except CycleError as exc:
        _report_cycle(list(reversed(exc.args[1])), named, findings)
        return ()
    if not _check_use(needs, named, findings):
        return ()
    by_name = {d.stage.name: d for d in documents}
    last = by_name[names[-1]]
    return (*(by_name[name] for name in names[:-1]), _without_name(last))


def _single(document: Document, findings: Findings) -> Document:
    if document.name is not None:
        why = "only a recipe of several documents refers to names"
        findings.note(document.name.key, f"name has no effect ({why})")
    return _without_name(document)


def _without_name(document: Document) -> Document:
    return replace(document, stage=replace(document.stage, name=None))


def _needs(stage: Stage, names: set[str]) -> list[str]:
    """Return the stages that a stage refers to, each once, in order."""
    return list(dict.fromkeys(r.path for r in references(stage) if r.path in names))


def _check_names(documents: Sequence[Document], findings: Findings) -> None:
    first: dict[str, Mark] = {}
    unnamed = [d.stage.mark for d in documents if d.name is None]
    for mark in unnamed[1:]:
        problem = f"a second document without a name, the first is in line {unnamed[0].line}"
        findings.error(mark, problem, "give every document but the output a name")
    for document in documents:
        name = document.stage.name
        if name is None or document.name is None:
            continue
        if name in first:
            problem = f"the name {name!r} stands twice, first in line {first[name].line}"
            findings.error(document.name.mark, problem, "names must differ")
        first.setdefault(name, document.name.mark)


def _report_cycle(cycle: list[str | None], named: dict[str, Document], findings: Findings) -> None:
    """Report documents that need one another, at the reference that closes the circle."""
    names = [name for name in cycle if name is not None]
    start, needed = names[0], names[1]
    mark = next(r.mark for r in references(named[start].stage) if r.path == needed)
    circle = " -> ".join(names)
    findings.error(mark, f"documents refer to one another in a circle: {circle}", "break it")


def _check_use(
    needs: dict[str | None, list[str]], named: dict[str, Document], findings: Findings
) -> bool:
    """Return whether exactly one document is referred to by no other."""
    used = {name for found in needs.values() for name in found}
    unused = [name for name in named if name not in used]
    if None in needs:
        for name in unused:
            _report_unused(name, named, findings)
        return not unused
    if len(unused) > 1:
        mark = named[unused[1]].stage.mark
        problem = f"no document refers to {' or '.join(map(repr, unused))}: which is the output?"
        findings.error(mark, problem, "leave the output's document without a name")
    return len(unused) == 1


def _report_unused(name: str, named: dict[str, Document], findings: Findings) -> None:
    node = named[name].name
    mark = node.mark if node is not None else named[name].stage.mark
    hint = "refer to it as a model, or remove it"
    findings.error(mark, f"no document refers to {name!r}", hint)
