"""Arithmetic on models: loaded models, task vectors, and sums of them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from math import isfinite, sqrt
from os import PathLike
from typing import TYPE_CHECKING, overload

from merge_kit.api.deltas import Pair, difference, products
from merge_kit.api.held import HeldModel
from merge_kit.api.lazy_merge import Mergeable
from merge_kit.api.lowering import Request
from merge_kit.errors import UsageError

if TYPE_CHECKING:
    from torch import Tensor
    from torch.nn import Module

    Operand = str | PathLike[str] | Mapping[str, Tensor] | Module | HeldModel
    """What stands for a model: a path, tensors by name, a module, or a model that is loaded."""


@dataclass(frozen=True, slots=True)
class Terms:
    """A sum: weighted models, and weighted task vectors."""

    models: tuple[tuple[float, HeldModel], ...] = ()
    tasks: tuple[Pair, ...] = ()

    def plus(self, other: Terms) -> Terms:
        """Return the sum of two sums, equal terms taken together."""
        models: dict[object, tuple[float, HeldModel]] = {}
        for weight, model in (*self.models, *other.models):
            known = models[model.key][0] if model.key in models else 0.0
            models[model.key] = known + weight, model
        tasks: dict[object, Pair] = {}
        for pair in (*self.tasks, *other.tasks):
            key = pair.model.key, pair.base.key
            known = tasks[key].weight if key in tasks else 0.0
            tasks[key] = Pair(known + pair.weight, pair.model, pair.base)
        return Terms(tuple(models.values()), tuple(tasks.values()))

    def times(self, factor: float) -> Terms:
        """Return the sum with every weight multiplied."""
        if not isfinite(factor):
            raise UsageError(f"found the factor {factor}, expected a finite number")
        return Terms(
            tuple((factor * weight, model) for weight, model in self.models),
            tuple(Pair(factor * p.weight, p.model, p.base) for p in self.tasks),
        )


class TaskVector:
    """What a fine-tune learned: model minus base, or a sum of such differences.

    Nothing is read before a result is asked for.

    Args:
        model: The fine-tune.
        base: The model that it was made from.
    """

    def __init__(self, model: Operand, base: Operand) -> None:
        self._terms = Terms(tasks=(Pair(1.0, load(model), load(base)),))

    def terms(self) -> Terms:
        """Return this as a sum."""
        return self._terms

    def state_dict(self) -> dict[str, Tensor]:
        """Return the differences by name, float32, or float64 where a model is float64.

        Integer and bool tensors are left out.

        Raises:
            MergeKitError: If the models do not fit one another or cannot be read.
        """
        return difference(self._terms.tasks)

    def norm(self) -> float:
        """Return the length over all tensors, summed in float64."""
        return sqrt(sum(table[0][0] for table in products([self._terms.tasks]).values()))

    def cosine(self, other: TaskVector) -> float:
        """Return the cosine of the angle to another task vector, over all tensors.

        Raises:
            UsageError: If one of them is zero.
        """
        tables = products([self._terms.tasks, other.terms().tasks]).values()
        own, both, its = (sum(table[i][j] for table in tables) for i, j in ((0, 0), (0, 1), (1, 1)))
        if own <= 0 or its <= 0:
            hint = "is a fine-tune compared with itself?"
            raise UsageError("a task vector of length 0 has no angle", hint=hint)
        return max(-1.0, min(1.0, both / (sqrt(own) * sqrt(its))))

    @overload
    def __add__(self, other: TaskVector) -> TaskVector: ...
    @overload
    def __add__(self, other: Arithmetic) -> Expression: ...
    def __add__(self, other: object) -> TaskVector | Expression:
        if isinstance(other, TaskVector):
            return _task(self._terms.plus(other.terms()))
        if isinstance(other, Arithmetic):
            return Expression(other.terms().plus(self._terms))
        return NotImplemented

    def __radd__(self, other: object) -> TaskVector:
        """Let `sum` start at 0."""
        return self if other == 0 else NotImplemented

    @overload
    def __sub__(self, other: TaskVector) -> TaskVector: ...
    @overload
    def __sub__(self, other: Arithmetic) -> Expression: ...
    def __sub__(self, other: object) -> TaskVector | Expression:
        if isinstance(other, TaskVector | Arithmetic):
            return self + -other
        return NotImplemented

    def __mul__(self, factor: float) -> TaskVector:
        if not isinstance(factor, int | float):
            return NotImplemented
        return _task(self._terms.times(factor))

    __rmul__ = __mul__

    def __truediv__(self, divisor: float) -> TaskVector:
        return self * _inverse(divisor) if isinstance(divisor, int | float) else NotImplemented

    def __neg__(self) -> TaskVector:
        return self * -1.0

    def __repr__(self) -> str:
        return " + ".join(f"{p.weight:g} * ({p.model} - {p.base})" for p in self._terms.tasks)


class Arithmetic(ABC):
    """What `+`, `-`, `*` and `/` make lazy expressions of."""

    @abstractmethod
    def terms(self) -> Terms:
        """Return this as a sum."""

    def __add__(self, other: Arithmetic | TaskVector) -> Expression:
        if not isinstance(other, TaskVector | Arithmetic):
            return NotImplemented
        return Expression(self.terms().plus(other.terms()))

    def __radd__(self, other: object) -> Expression:
        """Let `sum` start at 0."""
        return Expression(self.terms()) if other == 0 else NotImplemented

    def __sub__(self, other: Arithmetic | TaskVector) -> Expression:
        if not isinstance(other, TaskVector | Arithmetic):
            return NotImplemented
        return Expression(self.terms().plus(other.terms().times(-1.0)))

    def __mul__(self, factor: float) -> Expression:
        if not isinstance(factor, int | float):
            return NotImplemented
        return Expression(self.terms().times(factor))

    __rmul__ = __mul__

    def __truediv__(self, divisor: float) -> Expression:
        return self * _inverse(divisor) if isinstance(divisor, int | float) else NotImplemented

    def __neg__(self) -> Expression:
        return self * -1.0


class LoadedModel(HeldModel, Arithmetic):
    """A model whose tensors are read when they are asked for; see `load`."""

    def terms(self) -> Terms:
        """Return this model, once."""
        return Terms(models=((1.0, self),))

    @overload  # the difference of two models is a task vector
    def __sub__(self, other: LoadedModel) -> TaskVector: ...  # type: ignore[overload-overlap]
    @overload
    def __sub__(self, other: Arithmetic | TaskVector) -> Expression: ...
    def __sub__(self, other: Arithmetic | TaskVector) -> TaskVector | Expression:
        if isinstance(other, LoadedModel):
            return TaskVector(self, other)
        return super().__sub__(other)


class Expression(Mergeable, Arithmetic):
    """A sum of models and task vectors, computed when its result is asked for.

    A model plus task vectors that have it as their base is the method `task_arithmetic`; any
    other sum is the method `linear` with `normalize=False`.
    """

    def __init__(self, terms: Terms) -> None:
        self._terms = terms

    def terms(self) -> Terms:
        """Return the sum."""
        return self._terms

    def request(self) -> Request:
        """Return the sum as the method that computes it."""
        models, tasks = self._terms.models, self._terms.tasks
        if len(models) == 1 and models[0][0] == 1.0:
            base = models[0][1]
            if tasks and all(pair.base.key == base.key for pair in tasks):
                weights = tuple({"weight": pair.weight} for pair in tasks)
                return Request("task_arithmetic", tuple(p.model for p in tasks), base, weights)
        flat = Terms(models)
        for pair in tasks:
            flat = flat.plus(Terms(((pair.weight, pair.model), (-pair.weight, pair.base))))
        own = tuple({"weight": weight} for weight, _ in flat.models)
        return Request("linear", tuple(m for _, m in flat.models), None, own, {"normalize": False})


def load(source: Operand) -> LoadedModel:
    """Return a model whose tensors are read when they are asked for.

    Of a path only headers and config files are read, and tensors with positioned reads, never
    mapped into memory. Tensors of a mapping or a module are used where they are.

    Args:
        source: Path of a folder or of a safetensors file; tensors by name; a torch module; or a
            model that is loaded already.

    Raises:
        CheckpointError: If nothing is at the path, or it is broken.
        UsageError: If it is no model.
    """
    if isinstance(source, LoadedModel):
        return source
    if isinstance(source, HeldModel):
        raise UsageError("found a model without arithmetic", hint="use merge_kit.load")
    return LoadedModel(source)


def _task(terms: Terms) -> TaskVector:
    vector = TaskVector.__new__(TaskVector)
    vector._terms = terms  # noqa: SLF001  (the constructor takes one model and one base)
    return vector


def _inverse(divisor: float) -> float:
    if divisor == 0:
        raise UsageError("found the divisor 0, expected another number")
    return 1 / divisor
