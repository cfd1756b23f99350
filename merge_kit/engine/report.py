"""What a run did."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class Report:
    """What a run did.

    Attributes:
        seconds: Wall time of merging, without start-up.
        peak_bytes: Largest resident memory of the process so far.
        hashes: Tensor key -> xxh3-128 (hex) over the digests of its chunks of BLOCK elements.
        nonfinite: Tensor key -> NaN and infinities written, only with `allow_nonfinite`.
        saturated: Tensor key -> finite values that became infinite in the output dtype, likewise.
        resumed: Steps that an earlier run had finished.
        facts: Module of an adapter that was made (key as in `Plan.ranks`) -> numbers by name, see
            `methods.base.Yield`.
        orders: Experts that were put in order (their model and module) -> for each place, which of
            the model's experts stands there now, and how far it is from the one that it was
            matched with, relative to that one's length.
    """

    seconds: float
    bytes_read: int
    bytes_written: int
    peak_bytes: int
    hashes: Mapping[str, str]
    nonfinite: Mapping[str, int]
    saturated: Mapping[str, int]
    resumed: int
    facts: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    orders: Mapping[str, Sequence[tuple[int, float]]] = field(default_factory=dict)
