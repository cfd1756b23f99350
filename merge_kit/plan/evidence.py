"""Statistics that models are weighed by: files opened once, checked against the models' tensors."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from merge_kit.core.dtypes import is_float
from merge_kit.errors import CheckpointError, MergeKitError, MismatchError, raise_all
from merge_kit.io.strict_json import shown
from merge_kit.methods.base import MergeMethod
from merge_kit.methods.evidence import operand_name
from merge_kit.plan.inputs import locate
from merge_kit.plan.items import Item, Part
from merge_kit.plan.models import Model
from merge_kit.plan.sources import Source
from merge_kit.plan.statistics import Statistics, open_statistics
from merge_kit.plan.values import PlanInput
from merge_kit.recipe.lookup import lookup
from merge_kit.recipe.values import Mark, ModelRef

T = TypeVar("T")
R = TypeVar("R")
Aux = tuple[tuple[str, Source], ...]

_PARAMETER = "statistics"
_KINDS = {"elements": "fisher", "inputs": "gram"}
_COLLECT = "scripts/collect_statistics.py makes such files from a model and a text"
_SHOWN = 5


@dataclass(frozen=True, slots=True)
class _Pair:
    """A model's tensor and the statistics that it is weighed by; `stored` is None without any."""

    statistics: Statistics
    part: Part
    stored: str | None

    @property
    def where(self) -> str:
        return self.statistics.label


class Evidence:
    """Finds the statistics of each model's tensors.

    Args:
        folder: Where relative paths are looked up before the working directory.
        at_hand: Statistics in memory, by the text that stands for their path.
    """

    def __init__(self, folder: Path | None, at_hand: Mapping[str, Model] | None = None) -> None:
        self._folder = folder
        self._by_text: dict[str, Statistics | MergeKitError] = {
            text: Statistics(model.label, text, model) for text, model in (at_hand or {}).items()
        }
        self._by_path: dict[Path, Statistics] = {}

    def operands(self, item: Item, method: MergeMethod, inputs: Sequence[Part]) -> Aux:
        """Return the statistics of an item's inputs; none where the method can do without.

        Raises:
            MergeKitError: If a file is missing or broken, lacks what it should have, or does not
                fit. What holds for a whole file is said alike for every tensor.
        """
        kind = _KINDS[method.statistics_of]
        named = zip(getattr(method, _PARAMETER), inputs, strict=True)
        pairs = _each(lambda one: self._pair(item, one[0], one[1], kind), named)
        if kind == "gram" and not any(pair.stored for pair in pairs):
            return ()
        _each(lambda pair: _refuse_lacking(pair, pairs, kind), pairs)
        make = _of_elements if kind == "fisher" else _of_inputs
        return tuple(_each(lambda one: make(one[0], one[1], pairs[0]), enumerate(pairs)))

    def _pair(self, item: Item, text: str, part: Part, kind: str) -> _Pair:
        found = self._find(text, _mark(item, part))
        pair = _Pair(found, part, found.stored_name(part.name))
        _refuse_strange(pair, kind)
        return pair

    def _find(self, text: str, mark: Mark) -> Statistics:
        if text not in self._by_text:
            try:
                self._by_text[text] = self._open(text, mark)
            except MergeKitError as error:
                self._by_text[text] = error
        found = self._by_text[text]
        if isinstance(found, MergeKitError):
            raise found
        return found

    def _open(self, text: str, mark: Mark) -> Statistics:
        try:
            path = locate(ModelRef(text, text=text, mark=mark), self._folder)
        except CheckpointError as exc:
            raise CheckpointError(
                f"no file of statistics {shown(text)}",
                where=str(mark),
                hint=f"{exc.hint.partition(';')[0]}; {_COLLECT}",
            ) from exc
        real = path.resolve()
        if real not in self._by_path:
            self._by_path[real] = open_statistics(f"{_PARAMETER}-{len(self._by_path) + 1}", path)
        return self._by_path[real]

    def lent(self, text: str, mark: Mark) -> Model:
        """Return a file of other numbers that a stage reads, all of them asked for.

        Raises:
            CheckpointError: If it is missing or broken.
        """
        known = self._by_text.get(text)
        if not isinstance(known, Statistics):
            path = locate(ModelRef(text, text=text, mark=mark), self._folder)
            real = path.resolve()
            if real not in self._by_path:
                self._by_path[real] = open_statistics(f"numbers-{len(self._by_path) + 1}", path)
            known = self._by_text[text] = self._by_path[real]
        known.used.update(known.model.tensors)
        return known.model

    def notes(self) -> list[str]:
        """Return a sentence for each file that holds what nothing asked for."""
        sentences = []
        for one in self._by_path.values():
            left = [name for name in one.model.tensors if name not in one.used]
            if left:
                more = ", ..." if len(left) > _SHOWN else ""
                names = ", ".join(left[:_SHOWN])
                sentences.append(f"{one.label}: nothing merged asks for {len(left)}: {names}{more}")
        return sentences

    def as_values(self) -> tuple[PlanInput, ...]:
        """Return the files as the plan shows them."""
        rows = []
        for one in self._by_path.values():
            checkpoint = one.model.checkpoint
            assert checkpoint is not None
            text = next(t for t, s in self._by_text.items() if s is one)
            rows.append(PlanInput(one.key, checkpoint.name, text, checkpoint.root, one.files))
        return tuple(rows)


def _each(make: Callable[[T], R], items: Iterable[T]) -> list[R]:
    """Return what is made of each item, or raise what is wrong with all of them."""
    made, errors = [], []
    for item in items:
        try:
            made.append(make(item))
        except MergeKitError as error:
            errors.append(error)
    raise_all(errors)
    return made


def _mark(item: Item, part: Part) -> Mark:
    """Return where the recipe names a model's statistics."""
    levels = (part.entry.parameters, *item.levels)
    found = lookup(_PARAMETER, levels, part.stands_for or part.name, item.t)
    return item.mark if found is None else found[1]


def _refuse_strange(pair: _Pair, kind: str) -> None:
    """Refuse a file of another kind, or for another model: no name in it is one of its tensors."""
    one, model = pair.statistics, pair.part.model
    if one.kind not in ("", kind):
        raise MismatchError(
            f"holds statistics of the kind {shown(one.kind)}, expected {kind!r}",
            where=pair.where,
            hint=_COLLECT,
        )
    if not any(one.stored_name(name) for name in model.tensors):
        names = ", ".join(list(one.model.tensors)[:_SHOWN])
        raise MismatchError(
            f"has statistics for no tensor of {model.label}; it has: {names}",
            where=pair.where,
            hint="is it of this model? names must be those of the model's files",
        )


def _refuse_lacking(pair: _Pair, pairs: Sequence[_Pair], kind: str) -> None:
    """Refuse a file without the tensor; list all that it lacks, or all of what other files have."""
    if pair.stored is not None:
        return
    one, model = pair.statistics, pair.part.model
    others = [other.statistics for other in pairs if other.stored is not None]
    wanted = [
        name
        for name, held in model.tensors.items()
        if is_float(held.spec.dtype)
        and one.stored_name(name) is None
        and (kind == "fisher" or any(s.stored_name(name) for s in others))
    ] or [pair.part.name]
    more = ", ..." if len(wanted) > _SHOWN else ""
    beside = "" if kind == "fisher" else f" that {others[0].label} has"
    raise MismatchError(
        f"lacks statistics for {len(wanted)} tensors of {model.label}{beside}: "
        f"{', '.join(wanted[:_SHOWN])}{more}",
        where=pair.where,
        hint="collect them, or take those tensors from one model or average them by a rule under "
        "`tensors:`",
    )


def _of_elements(index: int, pair: _Pair, first: _Pair) -> tuple[str, Source]:
    del first
    wanted = pair.part.model.tensors[pair.part.name].spec.shape
    return operand_name(index), _checked(pair, wanted)


def _of_inputs(index: int, pair: _Pair, first: _Pair) -> tuple[str, Source]:
    name, shape = pair.part.name, pair.part.model.tensors[pair.part.name].spec.shape
    turned = name in pair.statistics.transposed
    if turned != (first.part.name in first.statistics.transposed):
        raise MismatchError(
            f"{pair.where} and {first.where} do not agree whether its first axis is the input's",
            where=name,
            hint=_COLLECT,
        )
    if len(shape) != 2:
        raise MismatchError(
            f"has shape {list(shape)} and a Gram matrix in {pair.where}, expected a matrix",
            where=name,
            hint="only weights of linear layers have Gram matrices",
        )
    inputs = shape[0] if turned else shape[1]
    return operand_name(index, of_columns=turned), _checked(pair, (inputs, inputs))


def _checked(pair: _Pair, wanted: tuple[int, ...]) -> Source:
    """Return the statistics of a tensor if they have this shape and are floats."""
    assert pair.stored is not None
    held = pair.statistics.model.tensors[pair.stored]
    if held.spec.shape != wanted or not is_float(held.spec.dtype):
        found = f"{held.spec.dtype} of shape {list(held.spec.shape)}"
        raise MismatchError(
            f"the statistics of {pair.part.model.label} in {pair.where} are {found}, expected "
            f"floats of shape {list(wanted)}",
            where=pair.part.name,
            hint="are they of this model? " + _COLLECT,
        )
    pair.statistics.used.add(pair.stored)
    return held.source
