"""Progress events of a run."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a run is.

    Attributes:
        done_bytes: Bytes of weights written, and read where a pass only reads.
        total_bytes: What `done_bytes` will be at the end.
        seconds: Since the start of the run.
        tensor: Key of the tensor that was worked on last.
    """

    done_bytes: int
    total_bytes: int
    seconds: float
    tensor: str
