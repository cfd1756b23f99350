"""Copies of the base's own weight, which peft saves beside the change of an embedding.

They say what the change was made to, and nothing that the adapter learned: two adapters that bring
equal ones agree.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import combinations

from merge_kit.core.tensors import StoredTensor, TensorSpec
from merge_kit.io.adapter_bytes import same_bytes
from merge_kit.io.adapter_values import Saved
from merge_kit.plan.applying.versions import Version, overlap
from merge_kit.plan.models import Ingredient, Model
from merge_kit.plan.sources import Source, Stored, of_file


@dataclass(frozen=True, slots=True)
class Settled:
    """Versions of one tensor without copies that are no conflict.

    Attributes:
        under: What the versions change.
        versions: Those that still do something.
        ingredients: What became of the copies.
        replaced: Label of an adapter whose copy stands in place of the base's tensor, "" if that
            is used.
    """

    under: Source
    versions: tuple[Version, ...]
    ingredients: tuple[Ingredient, ...] = ()
    replaced: str = ""


def settle(under: Source, versions: Sequence[Version], base: Model) -> Settled:
    """Return versions without copies of the base's weight, where several of them hold a tensor.

    A copy that equals the base's tensor says nothing. Copies that differ from it, and equal one
    another, are what all the adapters were trained on: they stand in its place. Others are left.
    """
    settled = Settled(under, tuple(versions))
    if not any(overlap(one, other) for one, other in combinations(versions, 2)):
        return settled
    own = _as_stored(under)
    if own is not None:
        alike = [v for v in versions if (c := _copy(v)) is not None and same_bytes(c, own)]
        settled = _without(settled, alike, f"it is what {base.label} has")
    copies = [(v, c) for v in settled.versions if (c := _copy(v)) is not None]
    holders = [v for v in settled.versions if v.saved is not None or v.rows is not None]
    if len(copies) < max(len(holders), 2):
        return settled
    first = copies[0][1]
    if all(same_bytes(first, other) for _, other in copies[1:]):
        label = copies[0][0].adapter.label
        settled = replace(_without(settled, holders), under=of_file(first), replaced=label)
    return settled


def _without(settled: Settled, owners: Sequence[Version], why: str = "") -> Settled:
    """Return the versions without the copies that some of them hold.

    Args:
        why: Why the copies are dropped; "" if they are made use of.
    """
    left, ingredients = [], list(settled.ingredients)
    for version in settled.versions:
        copy = _copy(version) if version in owners else None
        if copy is None:
            left.append(version)
            continue
        name = copy.spec.name
        ingredients.append(Ingredient(version.adapter, name, "dropped" if why else "merged", why))
        whats = tuple(w for w in version.whats if not isinstance(w, Saved))
        if whats:
            left.append(replace(version, whats=whats))
    return replace(settled, versions=tuple(left), ingredients=tuple(ingredients))


def _copy(version: Version) -> StoredTensor | None:
    """Return the copy of the base's weight that a version holds."""
    saved = version.saved
    return saved.stored if saved is not None and saved.why == "base_layer" else None


def _as_stored(source: Source) -> StoredTensor | None:
    if not isinstance(source, Stored):
        return None
    return StoredTensor(TensorSpec("", source.dtype, source.shape), source.span)
