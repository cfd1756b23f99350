"""A fine-tune as an adapter of its base."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from merge_kit.api.binding import bind
from merge_kit.api.lazy_adapter import LazyAdapter

if TYPE_CHECKING:
    from merge_kit.api.nodes import Operand


def extract(
    model: Operand,
    base: Operand,
    *,
    rank: int | None = None,
    energy: float | None = None,
    rest: Literal["save", "refuse", "drop"] | None = None,
) -> LazyAdapter:
    """Return a fine-tune as a LoRA adapter of its base; nothing is read but headers.

    It is the method `lora_extract`: of all adapters of this rank, the closest to the change.

    Args:
        model: The fine-tune, on disk.
        base: The model that it was made from, on disk.
        rank: Of each matrix; this or `energy` must be given.
        energy: Share of the sum of squared singular values that is kept of each matrix, in (0, 1].
        rest: What becomes of what is changed and has no low rank (norms, biases, embeddings):
            "save" (the default) stores it whole, "refuse" is an error, "drop" leaves it out.

    Returns an adapter that is made by `.save(folder)` or `.state_dict()`, and planned by `.plan()`.
    """
    told = {"rank": rank, "energy": energy, "rest": rest}
    return LazyAdapter(bind("lora_extract", [model], base, None, told))
