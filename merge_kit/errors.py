"""Every error that a user, a file or a network can cause.

MergeKitError
├── UsageError            2  the command line or a library call
│   └── OutputExistsError 2  the output is there already, or is an input
├── RecipeError           2  the recipe text, at file:line:column
├── PlanError             2  what was asked cannot be planned (method, memory, ranges)
│   └── ParameterError    2  a method's parameter is out of range
├── CheckpointError       3  an input's files
│   └── MismatchError     3  inputs that do not fit one another
├── NonFiniteError        3  NaN, infinity or saturation in a merged tensor
├── SolveError            3  a solve or decomposition that did not succeed
├── OutputError           4  disk or system, while writing
│   └── LockedError       4  another run works on the same output
├── HubError              5  the Hub
├── InterruptedRun  130/143  a signal stopped the run; it can be resumed
└── Problems                 several of the above at once; the exit code of the first
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar


class MergeKitError(Exception):
    """A problem with a place, in one line, and an action that helps.

    Attributes:
        problem: What was found and what was expected.
        where: `file:line:column`, or model and tensor; empty if there is no place.
        hint: An action, or empty.
    """

    exit_code: ClassVar[int] = 1

    def __init__(self, problem: str, *, where: str = "", hint: str = "") -> None:
        super().__init__(problem)
        self.problem = problem
        self.where = where
        self.hint = hint

    def __str__(self) -> str:
        line = f"{self.where}: {self.problem}" if self.where else self.problem
        return f"{line}\n  hint: {self.hint}" if self.hint else line

    def code(self) -> int:
        """Return the exit code of the process that this error ends."""
        return self.exit_code


class UsageError(MergeKitError):
    """The command line or a call of the library is wrong."""

    exit_code = 2


class OutputExistsError(UsageError):
    """The output is there already, is an input, or lies inside one."""


class RecipeError(MergeKitError):
    """The recipe's text is wrong; `where` is file:line:column."""

    exit_code = 2


class PlanError(MergeKitError):
    """What the recipe asks for cannot be planned."""

    exit_code = 2


class ParameterError(PlanError):
    """A parameter of a method is out of its range.

    Attributes:
        parameter: The recipe's key; the planner turns it into file:line:column.
    """

    def __init__(self, parameter: str, problem: str, *, where: str = "", hint: str = "") -> None:
        super().__init__(f"{parameter} {problem}", where=where, hint=hint)
        self.parameter = parameter


class CheckpointError(MergeKitError):
    """An input's files are broken, incomplete or not supported."""

    exit_code = 3


class MismatchError(CheckpointError):
    """Inputs that do not fit one another: names, shapes, dtypes, vocabularies."""


class NonFiniteError(MergeKitError):
    """A merged tensor holds NaN or infinity, or does not fit the output dtype."""

    exit_code = 3


class SolveError(MergeKitError):
    """A solve or a decomposition did not succeed."""

    exit_code = 3


class OutputError(MergeKitError):
    """The disk or the system refused a write."""

    exit_code = 4


class LockedError(OutputError):
    """Another run works on the same output."""


class HubError(MergeKitError):
    """The Hub, or the way to it, failed."""

    exit_code = 5


class InterruptedRun(MergeKitError):
    """A signal stopped the run.

    Attributes:
        signal: The signal's number, 2 (SIGINT) or 15 (SIGTERM).
    """

    def __init__(self, signal: int, *, where: str = "", hint: str = "") -> None:
        super().__init__("stopped by a signal", where=where, hint=hint)
        self.signal = signal

    def code(self) -> int:
        """Return 128 plus the signal's number, as shells do."""
        return 128 + self.signal


class Problems(MergeKitError):
    """Several problems, found together and reported in one list.

    Attributes:
        errors: At least one error, in the order in which they were found.
    """

    def __init__(self, errors: Sequence[MergeKitError]) -> None:
        self.errors = tuple(errors)
        super().__init__(f"{len(self.errors)} problems")

    def __str__(self) -> str:
        return "\n".join(str(error) for error in self.errors)

    def code(self) -> int:
        """Return the exit code of the first problem."""
        return self.errors[0].code()


def raise_all(errors: Sequence[MergeKitError]) -> None:
    """Raise nothing, the one error, or `Problems` with all of them."""
    if len(errors) == 1:
        raise errors[0]
    if errors:
        raise Problems(errors)
