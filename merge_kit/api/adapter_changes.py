"""What adapters change when no base is named: each weight by the name that the adapter has."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from merge_kit.api.overlays import Composed
from merge_kit.core.tensors import TensorSpec
from merge_kit.errors import MismatchError, UsageError
from merge_kit.io.adapter_values import Adapter, Update
from merge_kit.plan.changes import Change
from merge_kit.plan.models import Held, Model, Part
from merge_kit.plan.sources import Generated

if TYPE_CHECKING:
    from merge_kit.api.held import HeldModel

Shapes = Mapping[str, tuple[int, ...]]
_HINT = "name its base: mk.TaskVector(mk.load(base).with_adapter(adapter), base)"


@dataclass(frozen=True, slots=True, eq=False)
class Alone(Composed):
    """The changes of one adapter, and zeros for what only others change.

    Attributes:
        shapes: Of all tensors.
    """

    adapter: HeldModel
    shapes: Shapes

    @property
    def key(self) -> object:
        """What equal ones have in common."""
        return "alone", self.adapter.key, tuple(self.shapes)

    @property
    def parts(self) -> Sequence[HeldModel]:
        """The adapter."""
        return (self.adapter,)

    def model(self) -> Model:
        """Return the changes as a model without files."""
        found = dict(changes(self.adapter))
        tensors = {
            name: Held(
                "",
                TensorSpec(name, "F32", shape),
                found[name].added_to(None) if name in found else Generated("zeros", shape),
            )
            for name, shape in self.shapes.items()
        }
        return Model("input", "input", (Part("", "model", None),), tensors)

    def __str__(self) -> str:
        return str(self.adapter)


def all_shapes(adapters: Sequence[HeldModel]) -> Shapes:
    """Return the shape of everything that one of several adapters changes.

    Raises:
        MismatchError: If two adapters change weights of one name and two shapes.
        UsageError: If what one of them changes depends on a base.
    """
    shapes: dict[str, tuple[int, ...]] = {}
    for adapter in adapters:
        for name, change in changes(adapter):
            known = shapes.setdefault(name, change.shape)
            if known != change.shape:
                problem = f"has shape {list(known)}, in {adapter} {list(change.shape)}"
                hint = "only adapters of one base model can be added"
                raise MismatchError(problem, where=name, hint=hint)
    return shapes


def changes(held: HeldModel) -> Iterator[tuple[str, Change]]:
    """Yield what an adapter adds to each tensor, by name.

    Raises:
        UsageError: If that depends on a base.
    """
    adapter = held.model.adapter
    assert adapter is not None
    problem = _needs_base(adapter)
    if problem is not None:
        raise UsageError(problem, where=str(held), hint=_HINT)
    for update in adapter.updates:
        turned = update.kind == "embedding" or update.transposed
        yield (
            f"{update.module}.weight",
            Change(update, _shape(update), update.scale, "transposed" if turned else "straight"),
        )
        if update.bias is not None:
            shape = update.bias.spec.shape
            yield f"{update.module}.bias", Change(update, shape, update.scale, bias=True)


def _shape(update: Update) -> tuple[int, ...]:
    outputs, inputs = update.b.spec.shape[0], update.a.spec.shape[1:]
    turned = update.kind == "embedding" or update.transposed
    return (*inputs, outputs) if turned else (outputs, *inputs)


def _needs_base(adapter: Adapter) -> str | None:
    """Return why the changes are not known without a base, None if they are."""
    if any(update.magnitude is not None for update in adapter.updates):
        return "what DoRA changes depends on the weights that it is added to"
    if adapter.saved or adapter.rows:
        return "it holds tensors whole, which change a base by what the base is not"
    if any(update.kind == "experts" for update in adapter.updates):
        return "whether weights of experts are transposed depends on the base"
    return None
