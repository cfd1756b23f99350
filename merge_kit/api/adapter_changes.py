"""What adapters change when no base is named: each weight by the name that the adapter has."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from merge_kit.api.overlays import Composed
from merge_kit.api.shared_modules import aligned, by_module
from merge_kit.core.tensors import TensorSpec
from merge_kit.errors import MismatchError, UsageError
from merge_kit.io.adapter_values import Adapter, Update
from merge_kit.plan.applying.changes import Change, Lie
from merge_kit.plan.findings import Findings
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
        changes: What the adapter adds to tensors, by the names in `shapes`.
    """

    adapter: HeldModel
    shapes: Shapes
    changes: Mapping[str, Change]

    @property
    def key(self) -> object:
        """What equal ones have in common."""
        return "alone", self.adapter.key, tuple(self.shapes), tuple(self.changes)

    @property
    def parts(self) -> Sequence[HeldModel]:
        """The adapter."""
        return (self.adapter,)

    def model(self) -> Model:
        """Return the changes as a model without files."""
        found = self.changes
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


def stand_alone(adapters: Sequence[HeldModel]) -> dict[object, Alone]:
    """Return the changes of adapters by the adapter's key, all with the same tensors.

    Modules that adapters name with other words in front have the name that the first has, and
    their weights lie as the first says.

    Raises:
        MismatchError: If two adapters change weights of one name and two shapes, or names do not
            tell whether they change the same.
        UsageError: If what one of them changes depends on a base.
    """
    held = list({one.key: one for one in adapters}.values())
    findings = Findings()
    keyed = aligned([_adapter(one) for one in held], [str(one) for one in held], findings)
    findings.raise_any()
    shapes: dict[str, tuple[int, ...]] = {}
    found: list[dict[str, Change]] = [{} for _ in held]
    for module, updates in by_module(keyed).items():
        turned = next(update.transposed for update in updates if update is not None)
        for one, update, own in zip(held, updates, found, strict=True):
            if update is None:
                continue
            for name, change in _changes(module, replace(update, transposed=turned)):
                known = shapes.setdefault(name, change.shape)
                if known != change.shape:
                    problem = f"has shape {list(known)}, in {one} {list(change.shape)}"
                    hint = "only adapters of one base model can be added"
                    raise MismatchError(problem, where=name, hint=hint)
                own[name] = change
    return {one.key: Alone(one, shapes, own) for one, own in zip(held, found, strict=True)}


def _adapter(held: HeldModel) -> Adapter:
    """Return an adapter whose changes do not depend on a base."""
    adapter = held.model.adapter
    assert adapter is not None
    problem = _needs_base(adapter)
    if problem is not None:
        raise UsageError(problem, where=str(held), hint=_HINT)
    return adapter


def _changes(module: str, update: Update) -> Iterator[tuple[str, Change]]:
    """Yield what an update adds to each tensor, by name."""
    turned = update.kind == "embedding" or update.transposed
    lie: Lie = "transposed" if turned else "straight"
    yield f"{module}.weight", Change(update, _shape(update), update.scale, lie)
    if update.bias is not None:
        shape = update.bias.spec.shape
        yield f"{module}.bias", Change(update, shape, update.scale, bias=True)


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
