"""What is known of bytes that one run copies to several places."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterable

from merge_kit.core.tensors import ByteSpan
from merge_kit.plan.sources import Stored
from merge_kit.plan.values import Step

MOST_BYTES = 1 << 20
"""Digests that are kept at most: those of some gigabytes of weights."""


class Repeats:
    """Digests of pieces that are copied again, so that each is read for its hash once.

    Args:
        steps: Those of the run. What none of them copies twice is not kept, nor is anything after
            its last copy.
    """

    def __init__(self, steps: Iterable[Step] = ()) -> None:
        copied = (step.inputs[0] for step in steps if step.action == "copy")
        counts = Counter(source.span for source in copied if isinstance(source, Stored))
        self._times = {span: count for span, count in counts.items() if count > 1}
        self._found: dict[tuple[ByteSpan, int], tuple[bytes, int]] = {}
        self._held = 0
        self._lock = threading.Lock()

    def known(self, source: Stored, piece: int) -> bytes | None:
        """Return the digests of a piece of a tensor, None if they must be computed."""
        with self._lock:
            found = self._found.pop((source.span, piece), None)
            if found is None:
                return None
            digests, left = found
            self._held -= len(digests)
            self._keep((source.span, piece), digests, left - 1)
            return digests

    def add(self, source: Stored, piece: int, digests: bytes) -> None:
        """Keep digests that were computed, if the piece is copied again."""
        with self._lock:
            left = self._times.get(source.span, 1) - 1
            if (source.span, piece) not in self._found:  # else another thread was first
                self._keep((source.span, piece), digests, left)

    def _keep(self, place: tuple[ByteSpan, int], digests: bytes, left: int) -> None:
        if left > 0 and self._held + len(digests) <= MOST_BYTES:
            self._found[place] = digests, left
            self._held += len(digests)
