"""What several adapters change: by module, with everything checked that must agree."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

from merge_kit.core.dtypes import is_float
from merge_kit.errors import MergeKitError, MismatchError, PlanError
from merge_kit.io.adapter_values import Adapter, Kind, Update
from merge_kit.plan.inputs import Inputs
from merge_kit.plan.models import Model
from merge_kit.recipe.values import Entry, Stage


@dataclass(frozen=True, slots=True)
class Member:
    """One adapter that a stage lists.

    Attributes:
        index: Of the first entry that names it; entries that name it again are no members.
        entries: Positions of all entries that name it.
        renames: Path that its names begin with -> what they are to begin with instead.
    """

    entry: Entry
    model: Model
    adapter: Adapter
    index: int
    entries: tuple[int, ...]
    renames: Mapping[str, str] = field(default_factory=dict)

    def renamed(self, name: str) -> str:
        """Return a name of its file as the other adapters have it."""
        path = name
        while path:
            if path in self.renames:
                return self.renames[path] + name[len(path) :]
            path = path.rpartition(".")[0]
        return name


@dataclass(frozen=True, slots=True)
class Change:
    """What one adapter does to a module."""

    member: Member
    update: Update


@dataclass(frozen=True, slots=True)
class ModuleGroup:
    """What adapters do to one module.

    Attributes:
        name: Of the module.
        changes: At least one, in the order of the adapters.
    """

    name: str
    changes: tuple[Change, ...]

    @property
    def first(self) -> Update:
        """The change of the first adapter that has one."""
        return self.changes[0].update

    @property
    def kind(self) -> Kind:
        return self.first.kind

    @property
    def weight(self) -> str:
        """Name of the tensor in a full model."""
        return self.name if self.kind == "experts" else f"{self.name}.weight"

    @property
    def shape(self) -> tuple[int, int]:
        """Outputs and inputs of the matrix that b @ a is, of one expert."""
        return matrix_shape(self.first)


def matrix_shape(update: Update) -> tuple[int, int]:
    """Return (outputs, inputs) of b @ a, of one expert for experts."""
    a, b = update.a.spec, update.b.spec
    inner = update.rank * max(update.experts, 1)
    return b.numel // max(inner, 1), a.numel // max(inner, 1)


def members(stage: Stage, inputs: Inputs) -> tuple[list[Member], list[MergeKitError]]:
    """Return the adapters of a stage, each once, and an error for each model that is none."""
    found: dict[str, Member] = {}
    errors: list[MergeKitError] = []
    for i, entry in enumerate(stage.models):
        model = inputs.find(entry.model)
        if model.adapter is None:
            errors.append(_no_adapter(stage, entry, model))
        elif model.key in found:
            old = found[model.key]
            again = (*old.entries, i)
            found[model.key] = Member(old.entry, model, old.adapter, old.index, again)
        else:
            found[model.key] = Member(entry, model, model.adapter, i, (i,))
    return list(found.values()), errors


def _no_adapter(stage: Stage, entry: Entry, model: Model) -> PlanError:
    return PlanError(
        f"{model.label} is a model, and {stage.merge_method} combines adapters",
        where=str(entry.model.mark),
        hint="make an adapter of it first (mergekit extract), or write base+adapter under a "
        "method that merges models",
    )


def groups(adapters: Sequence[Member]) -> list[ModuleGroup]:
    """Return the modules that adapters change, in the order of the first that has each.

    How the weight is stored is what the first says: b @ a is the same for all.
    """
    found: dict[str, list[Change]] = {}
    for member in adapters:
        for update in member.adapter.updates:
            changes = found.setdefault(member.renamed(update.module), [])
            turned = changes[0].update.transposed if changes else update.transposed
            same = update if update.transposed == turned else replace(update, transposed=turned)
            changes.append(Change(member, same))
    return [ModuleGroup(name, tuple(changes)) for name, changes in found.items()]


def problems(modules: Sequence[ModuleGroup]) -> Iterator[MergeKitError]:
    """Yield what keeps adapters from being combined."""
    for module in modules:
        for change in module.changes:
            yield from _unfit(module, change)


def _unfit(module: ModuleGroup, change: Change) -> Iterator[MergeKitError]:
    first, other = module.changes[0], change
    one, two = _described(first.update), _described(other.update)
    if one != two:
        yield MismatchError(
            f"{first.member.model.label} changes {one}, {other.member.model.label} {two}",
            where=module.name,
            hint="were they made for one model? leave one of them out",
        )
    for stored in change.update.stored:
        if not is_float(stored.spec.dtype):
            yield MismatchError(
                f"has dtype {stored.spec.dtype}, expected a float",
                where=f"{change.member.model.label}: {stored.spec.name}",
                hint="convert the adapter to float32 first",
            )


def _described(update: Update) -> str:
    """Return what must be equal in all adapters that change a module."""
    out, into = matrix_shape(update)
    kernel = f" with a kernel of {list(update.a.spec.shape[2:])}" if update.a.spec.shape[2:] else ""
    experts = f" of {update.experts} experts" if update.experts else ""
    return f"{update.kind} [{out}, {into}]{kernel}{experts}"
