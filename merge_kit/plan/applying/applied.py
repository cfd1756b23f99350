"""A model with adapters applied: an overlay whose sources are the model's own plus changes."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import replace

from merge_kit.architecture.config import with_tied
from merge_kit.architecture.quantised import quantisation_problem
from merge_kit.core.tensors import TensorSpec
from merge_kit.errors import MismatchError
from merge_kit.plan.applying.base_copies import Settled, settle
from merge_kit.plan.applying.base_names import made_for_another
from merge_kit.plan.applying.changes import alone, difference
from merge_kit.plan.applying.fitting import Fitter, Touch
from merge_kit.plan.applying.repeats import Repeats, repeats_of
from merge_kit.plan.applying.untied import ByTensor, part_ties, ties_of
from merge_kit.plan.applying.versions import Version, combined, refuse_doubles
from merge_kit.plan.models import Changed, Held, Ingredient, Model, Overlay, Part
from merge_kit.plan.sources import Source, Stored

Applied = tuple[Model, float]


def apply_adapters(model: Model, adapters: Sequence[Applied]) -> Model:
    """Return a model with the changes of adapters, each times its weight, added to it.

    Every change is made to the model's own weights, so that the order does not matter. An adapter
    that is named twice counts with the sum of its weights; one of weight 0 changes nothing. Equal
    adapters and weights give the same object.

    Raises:
        MismatchError: If an adapter does not fit the model, two of them hold the same tensor
            whole, or the result cannot be stored as this kind of model.
    """
    if model.overlay is not None:
        adapters = (*model.overlay.adapters, *adapters)
        model = model.overlay.under
    summed: dict[Model, float] = defaultdict(float)
    for adapter, weight in adapters:
        summed[adapter] += weight
    key = tuple(summed.items())
    if key not in model.overlays:
        model.overlays[key] = _Maker(model, key).make()
    return model.overlays[key]


class _Maker:
    """Makes one overlay."""

    def __init__(self, model: Model, adapters: tuple[Applied, ...]) -> None:
        self.model, self.adapters, self.weights = model, adapters, dict(adapters)
        self.ties = ties_of(model)
        self.tensors = dict(model.tensors)
        self.made_of: dict[str, tuple[Ingredient, ...]] = {}
        self.changed: dict[str, Changed] = {}
        self.repeats: dict[str, list[Ingredient]] = {}

    def make(self) -> Model:
        """Return the model with the adapters applied."""
        _refuse_quantised(self.model)
        touched, idle, agreed = ByTensor(), ByTensor(), set()
        for adapter, weight in self.adapters:
            repeats = repeats_of(adapter, self.model, self.ties)
            agreed |= {adapter} if repeats.of_head else set()
            for touch in Fitter(adapter, self.model, self.ties.heads, repeats.saved).touches():
                into = touched if weight else idle
                into.setdefault(touch.tensor, {}).setdefault(adapter, []).append(touch.what)
                self._note_repeats(adapter, touch, repeats)
        parted = part_ties(self.ties, touched, agreed)
        for name, whats in touched.items():
            self._add(name, [Version(m, self.weights[m], tuple(ws)) for m, ws in whats.items()])
        for name, whats in idle.items():
            self._leave(name, [Version(m, 0.0, tuple(ws)) for m, ws in whats.items()])
        labels = "+".join(
            adapter.label if weight == 1 else f"{adapter.label}*{weight:g}"
            for adapter, weight in self.adapters
        )
        overlay = Overlay(
            self.model, self.adapters, self.made_of, self.changed, tuple(self._notes(parted))
        )
        return Model(
            self.model.key,
            f"{self.model.label}+{labels}",
            _untied(self.model) if parted else self.model.parts,
            self.tensors,
            self.model.checkpoint,
            overlay=overlay,
        )

    def _note_repeats(self, adapter: Model, touch: Touch, repeats: Repeats) -> None:
        """Keep in mind which tensors of an adapter repeat one that touches the model."""
        for one, owner in repeats.left:
            if owner is touch.what:
                why = f"it repeats {owner.stored.spec.name}"
                left = Ingredient(adapter, one.stored.spec.name, "dropped", why)
                self.repeats.setdefault(touch.tensor, []).append(left)

    def _add(self, name: str, versions: list[Version]) -> None:
        below = name if name in self.model.tensors else self.ties.embedding
        held = self.model.tensors[below]
        spec = self.ties.heads.get(name, held.spec)
        settled = settle(held.source, versions, self.model)
        refuse_doubles(name, spec, settled.versions)
        self.tensors[name] = Held(held.component, spec, combined(settled.under, settled.versions))
        made_of = _ingredients(self.model, below, settled, spec)
        self.made_of[name] = (*made_of, *self.repeats.get(name, ()))
        if all(version.is_sum for version in settled.versions):
            changes = tuple(change for version in settled.versions for change in version.weighted)
            self.changed[name] = Changed(settled.under, changes)

    def _leave(self, name: str, versions: list[Version]) -> None:
        """Say of adapters whose weight is 0 that they are left out."""
        at = name if name in self.tensors else self.ties.embedding
        if at not in self.made_of:
            self.made_of[at] = (Ingredient(self.model, at, "copied"),)
            self.changed[at] = Changed(self.tensors[at].source, ())
        self.made_of[at] += (
            *(one for one in self.repeats.get(name, ()) if one not in self.made_of[at]),
        )
        self.made_of[at] += tuple(
            Ingredient(version.adapter, tensor, "dropped", "its weight is 0")
            for version in versions
            for tensor in version.tensors()
        )

    def _notes(self, parted: bool) -> list[str]:
        found = (made_for_another(adapter, self.model) for adapter, _ in self.adapters)
        notes = [note for note in found if note is not None]
        if parted:
            labels = ", ".join(adapter.label for adapter, _ in self.adapters)
            notes.append(
                f"{self.ties.head} is no longer tied to {self.ties.embedding}: {labels} changes "
                "one of them otherwise than the other"
            )
        return notes


def _ingredients(
    model: Model, below: str, settled: Settled, spec: TensorSpec
) -> Iterator[Ingredient]:
    """Yield what becomes of the tensor below and of those of the adapters."""
    versions = settled.versions
    alone = len(versions) == 1 and versions[0].saved is not None and versions[0].weight == 1
    holder = versions[0].adapter.label if alone else settled.replaced
    if holder:
        yield Ingredient(model, below, "dropped", f"{holder} holds it whole")
    else:
        yield Ingredient(model, below, "merged" if versions else "copied")
    for version in versions:
        copied = len(versions) == 1 and version.is_copy(spec)
        for name in version.tensors():
            yield Ingredient(version.adapter, name, "copied" if copied else "merged")
    yield from settled.ingredients


def _untied(model: Model) -> tuple[Part, ...]:
    """Return a model's components, with a config that says that its head is no embedding."""
    return tuple(
        replace(part, config_text=with_tied(part.config_text, tied=False))
        if part == model.main and part.config_text is not None
        else part
        for part in model.parts
    )


def change_from(one: Model, name: str, other: Model, other_name: str) -> Source | None:
    """Return what has to be added to a tensor of one model to get that of an overlay.

    Returns:
        None where the first is no overlay, or one is more than a sum of changes and the same
        tensor.
    """
    if one.overlay is None:
        return None
    mine, theirs = _as_changed(one, name), _as_changed(other, other_name)
    if mine is None or theirs is None or not _same(mine.under, theirs.under):
        return None
    return alone(difference(mine.changes, theirs.changes), one.tensors[name].spec.shape)


def _as_changed(model: Model, name: str) -> Changed | None:
    overlay = model.overlay
    if overlay is None:
        return Changed(model.tensors[name].source, ())
    if name in overlay.made_of:
        return overlay.changed.get(name)
    return Changed(model.tensors[name].source, ())


def _same(one: Source, other: Source) -> bool:
    """Return whether two sources are known to be one; steps of stages are not looked into."""
    return one is other or (isinstance(one, Stored) and one == other)


def _refuse_quantised(model: Model) -> None:
    dtypes = {spec.dtype for spec in model.specs.values()}
    problem = quantisation_problem(model.config or {}, dtypes)
    if problem is not None:
        raise MismatchError(
            f"{problem}, to which no adapter can be added",
            where=model.label,
            hint="apply the adapter to the model it was made from, and quantise the result",
        )
