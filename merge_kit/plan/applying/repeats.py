"""One weight that an adapter holds for several modules, where the model's files have it once.

peft replaces modules, not weights: a new embedding that an encoder, a decoder and a head share is
stored for each of them.
"""

from __future__ import annotations

from dataclasses import dataclass

from merge_kit.architecture.ties import head_name
from merge_kit.io.adapter_bytes import same_bytes
from merge_kit.io.adapter_values import Saved
from merge_kit.plan.applying.untied import Ties
from merge_kit.plan.models import Model

_SHARED = "shared.weight"
_SIDES = ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight")


@dataclass(frozen=True, slots=True)
class Repeats:
    """What an adapter holds whole, without repeats.

    Attributes:
        saved: What is not said a second time.
        left: Each repeat, with what it repeats.
        of_head: Whether a head that cannot be parted from its embedding is among the repeats.
    """

    saved: tuple[Saved, ...]
    left: tuple[tuple[Saved, Saved], ...] = ()
    of_head: bool = False


def repeats_of(adapter: Model, model: Model, ties: Ties) -> Repeats:
    """Return what an adapter holds whole; equal bytes alone are a repeat."""
    assert adapter.adapter is not None
    saved = adapter.adapter.saved
    owner = next((one for one in saved if _is_owner(one, ties)), None)
    if owner is None:
        return Repeats(saved)
    tied = [one for one in saved if one is not owner and _is_tied(one, owner, model, ties)]
    left = [one for one in tied if same_bytes(one.stored, owner.stored)]
    return Repeats(
        tuple(one for one in saved if one not in left),
        tuple((one, owner) for one in left),
        any(head_name([one.tensor]) is not None for one in left),
    )


def _is_owner(saved: Saved, ties: Ties) -> bool:
    """Return whether this is an embedding that several modules have."""
    if saved.why != "modules_to_save":
        return False
    return _is_named(saved.tensor, _SHARED) or bool(ties.problem and saved.tensor == ties.embedding)


def _is_tied(saved: Saved, owner: Saved, model: Model, ties: Ties) -> bool:
    """Return whether the model has no other tensor for this than for the owner."""
    if saved.why != "modules_to_save":
        return False
    if head_name([saved.tensor]) is not None:
        return bool(ties.problem)
    lead = owner.tensor.removesuffix(_SHARED)
    side = next((side for side in _SIDES if saved.tensor == lead + side), "")
    return side != "" and not any(_is_named(name, side) for name in model.tensors)


def _is_named(name: str, end: str) -> bool:
    return name == end or name.endswith((f".{end}", f"/{end}"))
