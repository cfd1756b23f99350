"""The states of an automaton that reads names from their end, made from regular expressions."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Iterator, Sequence
from re import _constants as ops  # type: ignore[attr-defined]  # the names of the tree's nodes
from re import _parser as parser  # type: ignore[attr-defined]
from typing import Any, Literal

from merge_kit.errors import CheckpointError

MAX_STEPS = 2_000
"""Parts of one pattern; those in a repetition `{9}` count nine times."""
MAX_COST = 600_000
"""Of all patterns together: letters of names, and three times the parts of expressions."""

_PLAIN = re.compile(r"[\w./-]*", re.ASCII)
_REFUSED = {
    ops.GROUPREF: "a reference to a group",
    ops.GROUPREF_EXISTS: "a condition on a group",
    ops.ASSERT: "a look ahead or behind",
    ops.ASSERT_NOT: "a look ahead or behind",
    ops.ATOMIC_GROUP: "an atomic group",
    ops.POSSESSIVE_REPEAT: "a possessive repetition",
}
_HINT = "write names, `.`, `.*`, `\\d+`, `[...]`, `(a|b)` and the like only"
_CATEGORIES: dict[Any, Callable[[str], bool]] = {
    ops.CATEGORY_DIGIT: str.isdecimal,
    ops.CATEGORY_NOT_DIGIT: lambda letter: not letter.isdecimal(),
    ops.CATEGORY_SPACE: str.isspace,
    ops.CATEGORY_NOT_SPACE: lambda letter: not letter.isspace(),
    ops.CATEGORY_WORD: lambda letter: letter.isalnum() or letter == "_",
    ops.CATEGORY_NOT_WORD: lambda letter: not (letter.isalnum() or letter == "_"),
}
Place = Literal["begin", "end"]
Test = Callable[[str], bool] | str | None
"""What a letter must be: it passes a function, is this one, or any but a new line."""
_State = tuple[Test, int, list[int], Place | None, int | None]
"""Test and state after it, -1 if it reads nothing; states beside it, where; pattern that ends."""
_NOWHERE: list[int] = []


class States:
    """Numbered states, each with a letter to read, or with states reached without reading.

    Attributes:
        cost: What it took to make them.
    """

    def __init__(self) -> None:
        self.cost = 0
        self._states: list[_State] = []

    def __len__(self) -> int:
        return len(self._states)

    def reads(self, test: Test, following: int) -> int:
        """Add a state that reads one letter."""
        self._states.append((test, following, _NOWHERE, None, None))
        return len(self._states) - 1

    def forks(self, following: list[int], place: Place | None = None) -> int:
        """Add a state that is others at once, everywhere or only at one end of the name."""
        self._states.append((None, -1, following, place, None))
        return len(self._states) - 1

    def joins(self, state: int, following: int) -> None:
        """Make a fork lead to one more state."""
        self._states[state][2].append(following)

    def ends(self, number: int) -> int:
        """Add the last state of a pattern."""
        self._states.append((None, -1, _NOWHERE, None, number))
        return len(self._states) - 1

    def step(self, state: int, letter: str) -> int | None:
        """Return the state after a letter, or None."""
        test, following, _, _, _ = self._states[state]
        if following < 0:
            return None
        if test is None:
            return following if letter != "\n" else None
        passes = letter == test if isinstance(test, str) else test(letter)
        return following if passes else None

    def free(self, state: int, *, at_end: bool, at_begin: bool) -> list[int]:
        """Return the states that are reached without a letter."""
        _, _, free, place, _ = self._states[state]
        holds = place is None or (at_end if place == "end" else at_begin)
        return free if holds else _NOWHERE

    def accepts(self, state: int) -> int | None:
        """Return the number of the pattern that has matched, or None."""
        return self._states[state][4]


def compile_pattern(states: States, pattern: str, number: int, *, where: str) -> int:
    """Add a pattern and return its first state, which stands at the end of a name.

    Raises:
        CheckpointError: If it is not valid or more than an automaton can do.
    """
    last = states.ends(number)
    states.cost += len(pattern)
    if _PLAIN.fullmatch(pattern):  # nearly all; parsing takes longer
        for letter in pattern:
            last = states.reads(None if letter == "." else letter, last)
    else:
        last = _expression(states, pattern, last, where)
    if states.cost > MAX_COST:
        problem = f"the patterns cost more than {MAX_COST} steps together"
        raise CheckpointError(problem, where=where, hint="write fewer or shorter patterns")
    return last


def _expression(states: States, pattern: str, last: int, where: str) -> int:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of sets that will mean something else one day
            tree = parser.parse(pattern)
        return _Builder(states).whole(tree, last)
    except _Refused as exc:
        problem = f"pattern {pattern[:80]!r} has {exc}, which is not supported"
        raise CheckpointError(problem, where=where, hint=_HINT) from None
    except RecursionError:
        problem = f"pattern {pattern[:80]!r} is nested too deeply"
        raise CheckpointError(problem, where=where, hint=_HINT) from None
    except (re.error, OverflowError) as exc:
        problem = f"pattern {pattern[:80]!r} is no regular expression: {exc}"
        raise CheckpointError(problem, where=where, hint=_HINT) from None


class _Refused(Exception):  # noqa: N818 - a step of this module, never an error for users
    """Something in a pattern that is not supported."""


class _Builder:
    """Turns the parts of one pattern into states, each given the state that follows it.

    What follows is what stands before it in the name.
    """

    def __init__(self, states: States) -> None:
        self._states = states
        self._steps = 0

    def whole(self, tree: Any, last: int) -> int:
        if tree.state.flags & ~re.UNICODE:
            raise _Refused("a flag")
        return self.sequence(tree, last)

    def sequence(self, parts: Any, last: int) -> int:
        self._count()
        for part in parts:
            last = self._part(part, last)
        return last

    def _count(self) -> None:
        """Count a part; a repetition of nothing adds no state and takes its time all the same."""
        self._steps += 1
        self._states.cost += 3
        if self._steps > MAX_STEPS:
            raise _Refused(f"more than {MAX_STEPS} steps")

    def _part(self, part: tuple[Any, Any], last: int) -> int:
        self._count()
        kind, value = part
        if kind in _REFUSED:
            raise _Refused(_REFUSED[kind])
        if kind is ops.BRANCH:
            return self._states.forks([self.sequence(one, last) for one in value[1]])
        if kind is ops.SUBPATTERN:
            _, added, removed, inner = value
            if added or removed:
                raise _Refused("a flag")
            return self.sequence(inner, last)
        if kind in {ops.MAX_REPEAT, ops.MIN_REPEAT}:
            least, most, inner = value
            return self._repeat(int(least), most, inner, last)
        if kind is ops.AT:
            return self._states.forks([last], _place(value))
        return self._states.reads(_test(kind, value), last)

    def _repeat(self, least: int, most: Any, inner: Any, last: int) -> int:
        if most == ops.MAXREPEAT:
            loop = self._states.forks([last])
            self._states.joins(loop, self.sequence(inner, loop))
            last = loop
        else:
            for _ in range(int(most) - least):
                last = self._states.forks([last, self.sequence(inner, last)])
        for _ in range(least):
            last = self.sequence(inner, last)
        return last


def _place(value: Any) -> Place:
    if value in {ops.AT_BEGINNING, ops.AT_BEGINNING_STRING}:
        return "begin"
    if value in {ops.AT_END, ops.AT_END_STRING}:
        return "end"
    raise _Refused("a boundary of words")


def _test(kind: Any, value: Any) -> Test:
    if kind is ops.ANY:
        return None
    if kind is ops.LITERAL:
        return chr(value)
    if kind is ops.NOT_LITERAL:
        return lambda letter: letter != chr(value)
    if kind is ops.IN:
        return _member(value)
    raise _Refused(f"a {str(kind).lower()}")


def _member(items: Sequence[tuple[Any, Any]]) -> Callable[[str], bool]:
    negate = bool(items) and items[0][0] is ops.NEGATE
    tests = tuple(_tests_of(items))
    return lambda letter: any(test(letter) for test in tests) is not negate


def _tests_of(items: Sequence[tuple[Any, Any]]) -> Iterator[Callable[[str], bool]]:
    for kind, value in items:
        if kind is ops.LITERAL:
            yield chr(value).__eq__
        elif kind is ops.RANGE:
            yield _range(*value)
        elif kind is ops.CATEGORY:
            yield _CATEGORIES[value]
        elif kind is not ops.NEGATE:
            raise _Refused(f"a {str(kind).lower()}")


def _range(low: int, high: int) -> Callable[[str], bool]:
    return lambda letter: low <= ord(letter) <= high
