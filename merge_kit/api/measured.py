"""What can be measured of task vectors."""

from __future__ import annotations

from abc import ABC, abstractmethod
from math import sqrt

from merge_kit.api import comparing
from merge_kit.api.comparing import By, Comparison
from merge_kit.api.terms import Terms
from merge_kit.errors import UsageError


class Measured(ABC):
    """Lengths, angles and conflicts of signs of task vectors; each call reads the models once."""

    @abstractmethod
    def terms(self) -> Terms:
        """Return this as a sum."""

    def norm(self) -> float:
        """Return the length over all tensors, summed in float64."""
        return sqrt(sum(length**2 for length in self.norms().values()))

    def norms(self, *, by: By = "tensor") -> dict[str, float]:
        """Return the length in each tensor, or in each layer.

        A tensor outside the layers is a layer of its own.
        """
        return comparing.lengths(self.terms().tasks, by)

    def compare(self, other: Measured) -> Comparison:
        """Return lengths, cosine and conflicts of signs, by tensor, by layer and in all.

        The models are read once. `print` shows a table by layer.
        """
        return comparing.compared(self.terms().tasks, _terms(other).tasks)

    def cosine(self, other: Measured) -> float:
        """Return the cosine of the angle to another task vector, over all tensors.

        Raises:
            UsageError: If one of them is zero.
        """
        found = self.compare(other).total.cosine
        if found is None:
            hint = "is a fine-tune compared with itself?"
            raise UsageError("a task vector of length 0 has no angle", hint=hint)
        return found

    def sign_conflict(self, *others: Measured) -> float:
        """Return how often task vectors pull in different directions, over all tensors.

        That is the share of the elements whose signs differ, among those where at least two of
        the task vectors are not zero; 0 if there are none.
        """
        return comparing.conflict([self.terms().tasks, *(_terms(other).tasks for other in others)])


def _terms(other: object) -> Terms:
    """Return what a task vector is compared with as a sum.

    Raises:
        UsageError: If it is no task vector.
    """
    if not isinstance(other, Measured):
        problem = f"found a value of type {type(other).__name__}, expected a task vector"
        raise UsageError(problem, hint="write mk.TaskVector(model, base)")
    return other.terms()
