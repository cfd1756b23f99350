"""Arithmetic on models: task vectors, and sums of models and task vectors."""

from __future__ import annotations

from abc import ABC, abstractmethod
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, overload

from merge_kit.api import changes, delta_files, deltas, grounding, methods_of_sums
from merge_kit.api.changes import Difference, How, Prune, Scope
from merge_kit.api.measured import Measured
from merge_kit.api.mergeable import Mergeable
from merge_kit.api.nodes import applied, as_node, grounded
from merge_kit.api.requests import Node, Request, with_dtype
from merge_kit.api.terms import Terms
from merge_kit.errors import UsageError

if TYPE_CHECKING:
    from torch import Tensor

    from merge_kit.api.held import HeldModel
    from merge_kit.api.mergeable import DType
    from merge_kit.api.merging import Size
    from merge_kit.api.nodes import Operand


class TaskVector(Measured):
    """What a fine-tune learned: model minus base, or a sum of such differences.

    Nothing is read before a result is asked for.

    Args:
        model: The fine-tune.
        base: The model that it was made from.
    """

    def __init__(self, model: Operand, base: Operand) -> None:
        self._terms = Terms(tasks=((1.0, _difference(as_node(model), as_node(base))),))

    @classmethod
    def from_adapter(
        cls, adapter: str | PathLike[str] | HeldModel, weight: float = 1.0
    ) -> TaskVector:
        """Return what a LoRA adapter changes; nothing is read but headers.

        Added to a model, or to task vectors of one base, it is the change of that model's weights.
        Alone, it holds the change of each weight by the name that the adapter has for it.

        Args:
            adapter: Path of a folder or file, or an adapter that is loaded.
            weight: What the change is multiplied by.

        Raises:
            CheckpointError: If it is broken.
            UsageError: If it is no adapter.
        """
        one = applied(adapter, weight)
        return _task(Terms(tasks=((one.weight, Difference(one.adapter, None)),)))

    @classmethod
    def load(cls, folder: str | PathLike[str]) -> TaskVector:
        """Return the task vector that `save` wrote into a folder; nothing is read but headers.

        Raises:
            CheckpointError: If there is none, or it is broken.
        """
        return _task(Terms(tasks=((1.0, Difference(delta_files.opened(Path(folder)), None)),)))

    def terms(self) -> Terms:
        """Return this as a sum."""
        return self._terms

    def state_dict(self) -> dict[str, Tensor]:
        """Return the differences by name, float32, or float64 where a model is float64.

        Integer and bool tensors are left out.

        Raises:
            MergeKitError: If the models do not fit one another or cannot be read.
        """
        return deltas.difference(self._terms.tasks)

    def save(
        self,
        folder: str | PathLike[str],
        *,
        overwrite: bool = False,
        dtype: DType | None = None,
        shard_size: Size | None = None,
        threads: int | None = None,
    ) -> Path:
        """Write the differences into a folder of their own, and return its path.

        It holds `delta.safetensors`, the files beside the base's weights, and
        `merge_kit_delta.json`, which says what the differences are of; integer and bool tensors
        are there as the base has them. Where all models are on disk, memory stays constant.

        Args:
            dtype: Of the differences; default: float32, float64 where a model is float64, which
                lose nothing.

        The other arguments are those of a merge's `save`.
        """
        return delta_files.save(
            with_dtype(deltas.request((), self._terms.tasks), dtype),
            self._terms.tasks,
            Path(folder),
            overwrite=overwrite,
            shard_size=shard_size,
            threads=threads,
        )

    def prune(
        self,
        density: float,
        *,
        how: How = "magnitude",
        scope: Scope = "tensor",
        seed: int = 0,
        position: int = 0,
    ) -> TaskVector:
        """Return what pruning keeps of this; nothing is read before a result is asked for.

        Args:
            density: Share of the elements that is kept, in [0, 1].
            how: "magnitude" keeps the largest, as the method `magnitude` does; "random" keeps each
                with this probability and divides it by it, as `dare_linear` does.
            scope: Whether magnitudes are ranked in each tensor or over the whole model.
            seed: Of the random choice.
            position: Task vectors with different positions are pruned by independent choices; it
                is the place of the model among those of `dare_linear`.
        """
        kept = changes.pruned(self._terms.tasks, Prune(density, how, scope, seed, position))
        return _task(Terms(tasks=kept))

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
        return changes.shown(self._terms.tasks)


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


class ModelArithmetic(Arithmetic):
    """Arithmetic of what is one model; the difference of two is a task vector."""

    @abstractmethod
    def node(self) -> Node:
        """Return this as a model of a merge."""

    def terms(self) -> Terms:
        """Return this model, once."""
        return Terms(models=((1.0, self.node()),))

    @overload
    def __sub__(self, other: ModelArithmetic) -> TaskVector: ...  # type: ignore[overload-overlap]
    @overload
    def __sub__(self, other: Arithmetic | TaskVector) -> Expression: ...
    def __sub__(self, other: Arithmetic | TaskVector) -> TaskVector | Expression:
        if isinstance(other, ModelArithmetic):
            return _task(Terms(tasks=((1.0, _difference(self.node(), other.node())),)))
        return super().__sub__(other)


class Expression(Mergeable, Arithmetic):
    """A sum of models and task vectors, computed when its result is asked for.

    A model plus task vectors that have it as their base is the method `task_arithmetic`, or
    `magnitude` or `dare_linear` where they are pruned so. Any other sum of models is `linear` with
    `normalize=False`. What no method computes is computed all the same.
    """

    def __init__(self, terms: Terms) -> None:
        self._terms = terms

    def terms(self) -> Terms:
        """Return the sum."""
        return self._terms

    def request(self) -> Request:
        """Return the sum as the method that computes it."""
        models = self._terms.models
        (tasks,) = grounding.grounded([self._terms.tasks], [node for _, node in models])
        return methods_of_sums.request(models, tasks) or deltas.request(models, tasks)

    def __repr__(self) -> str:
        models = [f"{weight:g} * {model}" for weight, model in self._terms.models]
        return " + ".join([*models, *filter(None, [changes.shown(self._terms.tasks)])])


def _difference(model: Node, base: Node) -> Difference:
    base = grounded(base, None, "the base")
    return Difference(grounded(model, base, "the model"), base)


def _task(terms: Terms) -> TaskVector:
    vector = TaskVector.__new__(TaskVector)
    vector._terms = terms  # noqa: SLF001  (the constructor takes one model and one base)
    return vector


def _inverse(divisor: float) -> float:
    if divisor == 0:
        raise UsageError("found the divisor 0, expected another number")
    return 1 / divisor
