r"""Regular expressions from files that nobody vouches for, matched in bounded time.

Adapters name modules by patterns: a key K means the modules whose name `re.match` finds
`(.*\.)?(K)$` in, the first key of several wins. `re` itself backtracks, and a key such as
`(a+)+b` keeps it busy for years. Here all keys become one automaton, which walks each name once,
from its end: whether a pattern matches does not depend on the order of trying, so the answer is
the same. What an automaton cannot do (back references, looking around) is refused by name. Keys
that are one whole name, as configs have thousands of, are looked up.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from merge_kit.core.pattern_states import States, compile_pattern
from merge_kit.errors import CheckpointError

MAX_PATTERNS = 20_000
MAX_LETTERS = 1_000
MAX_WORK = 10_000_000
"""Letters walked and states visited; less than a second."""

_WHOLE_NAME = re.compile(r"\^((?:[\w/-]|\\[^\w\s])*)\$?")
_ESCAPED = re.compile(r"\\(.)")


class NamePatterns:
    """Patterns over dotted names, the first that matches wins.

    Args:
        patterns: In their order.
        where: File and key, for messages.

    Raises:
        CheckpointError: If there are too many that are no whole names, or one is too long, not
            valid, or needs more than an automaton.
    """

    def __init__(self, patterns: Sequence[str], *, where: str) -> None:
        whole = [_whole_name(pattern) for pattern in patterns]
        if whole.count(None) > MAX_PATTERNS:
            problem = f"has {whole.count(None)} patterns, expected at most {MAX_PATTERNS}"
            raise CheckpointError(problem, where=where, hint="join patterns that say the same")
        self._where = where
        self._whole: dict[str, int] = {}
        self._states = States()
        self._work = 0
        starts = []
        for number, pattern in enumerate(patterns):
            if len(pattern) > MAX_LETTERS:
                problem = f"pattern {pattern[:40]!r}... has {len(pattern)} letters"
                hint = f"a pattern has at most {MAX_LETTERS}"
                raise CheckpointError(problem, where=where, hint=hint)
            name = whole[number]
            if name is not None:
                self._whole.setdefault(name, number)
                continue
            starts.append(compile_pattern(self._states, pattern, number, where=where))
        self._starts = tuple(starts)
        self._groups: dict[frozenset[int], int] = {}
        self._members: list[tuple[int, ...]] = []
        self._accepted: list[int | None] = []
        self._moves: dict[tuple[int, str], int] = {}
        self._start: int | None = None

    def first(self, name: str) -> int | None:
        """Return the number of the first pattern that matches a name, or None.

        Raises:
            CheckpointError: If all names asked for so far took more than MAX_WORK.
        """
        found = (self._whole.get(name), self._walk(name))
        return min((number for number in found if number is not None), default=None)

    def _walk(self, name: str) -> int | None:
        """Return what the automaton finds."""
        if not self._starts:
            return None
        if self._start is None:
            self._start = self._group(self._starts, at_end=True)
        group, best = self._start, None
        self._spend(len(name))
        for place in range(len(name), 0, -1):
            accepted = self._accepted[group]
            if accepted is not None and name[place - 1] == ".":
                best = accepted if best is None else min(best, accepted)
            group = self._move(group, name[place - 1])
            if not self._members[group]:
                return best
        # At the first letter, `^` holds too.
        last = self._closed(self._members[group], at_end=not name, at_begin=True)
        found = [n for n in (self._states.accepts(state) for state in last) if n is not None]
        return min(found if best is None else [best, *found], default=None)

    def _move(self, group: int, letter: str) -> int:
        found = self._moves.get((group, letter))
        if found is None:
            step = self._states.step
            moved = (step(state, letter) for state in self._members[group])
            found = self._group([state for state in moved if state is not None], at_end=False)
            self._spend(4 * len(self._members[group]))
            self._moves[group, letter] = found
        return found

    def _group(self, states: Sequence[int], *, at_end: bool) -> int:
        members = frozenset(self._closed(states, at_end=at_end, at_begin=False))
        found = self._groups.get(members)
        if found is None:
            found = self._groups[members] = len(self._members)
            self._members.append(tuple(members))
            numbers = (self._states.accepts(state) for state in members)
            self._accepted.append(min((n for n in numbers if n is not None), default=None))
        return found

    def _closed(self, states: Sequence[int], *, at_end: bool, at_begin: bool) -> set[int]:
        """Return the states that are reached from some without a letter, those included."""
        seen, pending = set(states), list(states)
        while pending:
            for state in self._states.free(pending.pop(), at_end=at_end, at_begin=at_begin):
                if state not in seen:
                    seen.add(state)
                    pending.append(state)
        self._spend(4 * len(seen))
        return seen

    def _spend(self, work: int) -> None:
        self._work += work
        if self._work > MAX_WORK:
            problem = "the patterns take too long to match with the names of the modules"
            hint = "write fewer or plainer patterns, or the full names of the modules"
            raise CheckpointError(problem, where=self._where, hint=hint)


def _whole_name(pattern: str) -> str | None:
    """Return the only name that a pattern matches, if it is written as "^name", with escapes."""
    found = _WHOLE_NAME.fullmatch(pattern)
    return None if found is None else _ESCAPED.sub(r"\1", found[1])
