"""Greedy soups: models are averaged one by one as long as a score gets better."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import isnan
from typing import TYPE_CHECKING, Any

from merge_kit.api.binding import bind, listed
from merge_kit.api.lazy_merge import LazyMerge
from merge_kit.api.nodes import as_node, grounded
from merge_kit.errors import UsageError

if TYPE_CHECKING:
    from merge_kit.api.nodes import Operand

Score = Callable[[LazyMerge], float]
_NAME = "greedy_soup"


@dataclass(frozen=True, slots=True)
class Tasting:
    """One model that was tried.

    Attributes:
        position: Of the model in the list that was given.
        alone: Its own score.
        score: Of the average with those chosen before; of the first, its own.
        accepted: Whether it is in the soup.
    """

    position: int
    alone: float
    score: float
    accepted: bool


@dataclass(frozen=True, slots=True)
class Soup:
    """A greedy soup.

    Attributes:
        merge: The average of the chosen models.
        score: Its score.
        tastings: Every model, in the order in which they were tried.
    """

    merge: LazyMerge
    score: float
    tastings: tuple[Tasting, ...]

    @property
    def chosen(self) -> tuple[int, ...]:
        """Positions of the chosen models, in the order in which they were taken."""
        return tuple(one.position for one in self.tastings if one.accepted)


def greedy_soup(models: Sequence[Operand], score: Score, *, base: Operand | None = None) -> Soup:
    """Return the average of those models that make it better, tried from the best one down.

    The first is the model of the highest score. Each of the others is taken if the average with
    it scores strictly higher than the average without it. Averages are those of the original
    models, rounded once: `linear` of the chosen ones, with the same bits. At equal scores the
    model that stands first is tried first.

    `score` is called 2 n - 1 times, and models are read only as often as it asks for tensors.
    (Wortsman et al. 2022, Model soups, https://arxiv.org/abs/2203.05482)

    Args:
        models: As for `linear`, one or more.
        score: Takes a merge, with `state_dict()` and `save(folder)`; returns a number on held-out
            data, higher is better.
        base: If given, the average is taken of the task vectors, and config and tokenizer are the
            base's.

    Raises:
        UsageError: If there are no models, the base is one of them, `score` is no function, or a
            score is no number.
    """
    taster: Any = score
    if not callable(taster):
        problem = f"found a score of type {type(taster).__name__}, expected a function"
        raise UsageError(problem, where=_NAME, hint=f"write {_NAME}([a, b], score)")
    start = None if base is None else grounded(as_node(base), None, _NAME)
    found = [grounded(as_node(model), start, _NAME) for model in listed(_NAME, models)]
    if not found:
        problem = "found no models, expected at least one"
        raise UsageError(problem, where=_NAME, hint=f"write {_NAME}([a, b], score)")
    if start is not None and start.key in {node.key for node in found}:
        raise UsageError("the base is among the models", where=_NAME, hint="leave base out")

    def average(positions: Sequence[int]) -> LazyMerge:
        method = "linear" if start is None else "task_arithmetic"
        told = {"weight": 1.0, "normalize": True}
        return LazyMerge(bind(method, [found[i] for i in positions], start, None, told))

    average(range(len(found)))  # what is wrong with the list is told before anything is scored
    alone = [_scored(score, average([i])) for i in range(len(found))]
    first, *rest = sorted(range(len(found)), key=lambda i: (-alone[i], i))
    chosen, best = [first], alone[first]
    tastings = [Tasting(first, best, best, accepted=True)]
    for i in rest:
        new = _scored(score, average([*chosen, i]))
        tastings.append(Tasting(i, alone[i], new, new > best))
        if new > best:
            chosen, best = [*chosen, i], new
    return Soup(average(chosen), best, tuple(tastings))


def _scored(score: Score, merge: LazyMerge) -> float:
    found: Any = score(merge)  # a 0-d tensor will do
    try:
        number = float(found)
    except (TypeError, ValueError, OverflowError, RuntimeError) as exc:
        problem = f"the score is of type {type(found).__name__}, expected a number"
        raise UsageError(problem, where=_NAME, hint="return a float, higher is better") from exc
    if isnan(number):
        problem = "the score is NaN, expected a number that can be compared"
        raise UsageError(problem, where=_NAME, hint="return -inf for a model that is no good")
    return number
