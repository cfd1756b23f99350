"""What reading a recipe finds: all problems in one list, and notes; typed access to nodes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

from merge_kit.core.names import nearest
from merge_kit.errors import MergeKitError, RecipeError, UsageError, raise_all
from merge_kit.recipe.keys import DEAD_KEYS
from merge_kit.recipe.lookup import converted
from merge_kit.recipe.nodes import MAX_WHOLE, Node, SetMark, describe
from merge_kit.recipe.values import Mark

MAX_PROBLEMS = 100
"""Problems after which reading stops; nobody reads more at once."""

Choice = TypeVar("Choice", bound=str)


@dataclass(slots=True)
class Findings:
    """Problems with their places, and notes."""

    problems: list[tuple[Mark, MergeKitError]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def error(self, mark: Mark, problem: str, hint: str = "") -> None:
        """Record a problem; a usage error where an override caused it.

        Raises:
            Problems: If there are now MAX_PROBLEMS of them.
        """
        kind = UsageError if isinstance(mark, SetMark) else RecipeError
        self.problems.append((mark, kind(problem, where=str(mark), hint=hint)))
        if len(self.problems) >= MAX_PROBLEMS:
            self.raise_all()

    def raise_all(self) -> None:
        """Raise the problems, if there are any, in the order of the text."""
        found = sorted(self.problems, key=lambda pair: (pair[0].line, pair[0].column))
        raise_all([error for _, error in found])

    def wrong(self, node: Node, expected: str, hint: str = "") -> None:
        """Record that a node holds something else than what was expected."""
        self.error(node.mark, f"{node.name} is {describe(node)}, expected {expected}", hint)

    def note(self, mark: Mark, sentence: str) -> None:
        """Record what was accepted without effect."""
        self.notes.append(f"{mark}: {sentence}")

    def text(self, node: Node) -> str | None:
        """Return non-empty text, or None with a problem recorded."""
        if isinstance(node.content, str) and node.content.strip():
            return node.content
        is_scalar = isinstance(node.content, bool | int | float)
        self.wrong(node, "text", "put it in quotes" if is_scalar else "")
        return None

    def whole(self, node: Node) -> int | None:
        """Return a whole number from 0 to MAX_WHOLE, or None with a problem recorded."""
        content = node.content
        if isinstance(content, str | int | float) and not isinstance(content, bool):
            number = converted(content, int)
            if isinstance(number, int) and 0 <= number <= MAX_WHOLE:
                return number
        self.wrong(node, "a whole number from 0", "write one number, such as 0 or 16")
        return None

    def choice(self, node: Node, choices: Sequence[Choice]) -> Choice | None:
        """Return one of the choices, or None with a problem recorded."""
        for choice in choices:
            if node.content == choice:
                return choice
        self.wrong(node, " or ".join(choices), nearest(str(node.content), choices))
        return None

    def items(self, node: Node) -> tuple[Node, ...]:
        """Return the entries of a list; none, with a problem recorded, if it is no list."""
        if isinstance(node.content, tuple):
            return node.content
        self.wrong(node, "a list", "start each entry with a dash")
        return ()

    def mapping(self, node: Node) -> Mapping[str, Node]:
        """Return the entries of a mapping; none, with a problem recorded, if it is no mapping."""
        if isinstance(node.content, Mapping):
            return node.content
        self.wrong(node, "a mapping", "write KEY: VALUE, one a line")
        return {}

    def fields(
        self,
        node: Node,
        valid: Mapping[str, str],
        required: Sequence[str] = (),
        hints: Mapping[str, str] | None = None,
    ) -> dict[str, Node]:
        """Return the entries of a mapping with known keys; entries that are null are left out.

        Args:
            node: What should be the mapping.
            valid: The keys that it may have, with their descriptions.
            required: The keys that it must have.
            hints: What to say of certain unknown keys, instead of the nearest valid one.
        """
        entries = self.mapping(node)
        for key, value in entries.items():
            if key in valid:
                continue
            if key in DEAD_KEYS:
                self.note(value.key, f"{key} has no effect ({DEAD_KEYS[key]})")
                continue
            hint = (hints or {}).get(key) or nearest(key, valid)
            self.error(value.key, f"unknown key {key!r} in {node.name}", hint)
        found = {k: v for k, v in entries.items() if k in valid and v.content is not None}
        if isinstance(node.content, Mapping):
            for key in required:
                if key not in found:
                    place = entries[key].mark if key in entries else node.mark
                    self.error(place, f"{key} is missing in {node.name}", f"{key}: {valid[key]}")
        return found
