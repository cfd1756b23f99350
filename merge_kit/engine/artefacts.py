"""Finds what a plan needs of weights or of prompts before its steps run, and keeps it.

What is found is a few small tensors, stored beside the journal: a run that goes on later reads
them, so that it goes on with the same numbers.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from merge_kit.engine.basis import embedding_basis, given_basis
from merge_kit.engine.found import read_found, write_found
from merge_kit.engine.journal import FOLDER
from merge_kit.engine.matching import match_experts
from merge_kit.engine.operands import Operands
from merge_kit.engine.pages import give_back
from merge_kit.engine.prepared import prepared
from merge_kit.engine.routers import find_embedded, find_hidden
from merge_kit.engine.state import RunState
from merge_kit.errors import InterruptedRun
from merge_kit.plan.building.matching_task import DISTANCE, ORDER, ExpertMatching
from merge_kit.plan.building.routers_tasks import EmbeddedRouters, HiddenRouters
from merge_kit.plan.building.width_basis import EmbeddingBasis, GivenBasis
from merge_kit.plan.values import Artefact

Finder = Callable[[Any, Operands, threading.Event], Mapping[str, Tensor]]
"""(task, operands, stop) -> tensors by name; it looks at `stop` now and then, and raises
InterruptedRun if it is set."""

FINDERS: dict[type, Finder] = {
    ExpertMatching: match_experts,
    EmbeddedRouters: find_embedded,
    HiddenRouters: find_hidden,
    EmbeddingBasis: embedding_basis,
    GivenBasis: given_basis,
}
"""How each kind of task is done; see `plan.values.Artefact`."""


_TELLING_BYTES = 16 << 20
"""Bytes read from one event of progress to the next."""


def find_artefacts(run: RunState, stop: threading.Event) -> None:
    """Fill `run.found` with the plan's artefacts: those of an earlier run, or found now.

    Raises:
        InterruptedRun: If `stop` was set.
        MergeKitError: If one cannot be found.
    """
    for artefact in run.plan.artefacts:
        if stop.is_set():
            raise InterruptedRun(2, hint="run the same command again to go on from here")
        path, share = _path(run, artefact), _Share(run, artefact)
        known = read_found(path)
        if known is None:
            operands = prepared(run, stop, share.read)
            try:
                known = find(artefact.task, operands, stop)
            finally:
                operands.close()
            write_found(path, known)
            give_back()
        share.end()
        run.found[artefact.key] = known


class _Share:
    """The part of a run's progress that finding one artefact is: the bytes that it should read."""

    def __init__(self, run: RunState, artefact: Artefact) -> None:
        self._tally, self._key, self._left = run.tally, artefact.key, artefact.read_bytes
        self._silent = 0

    def read(self, count: int) -> None:
        """Count bytes that were read, and tell who listens when they are many."""
        self._silent = min(self._left, self._silent + count)
        if self._silent >= _TELLING_BYTES:
            self._tally.moved(self._silent, self._key)
            self._left, self._silent = self._left - self._silent, 0

    def end(self) -> None:
        """Count what is left, for the next event to tell."""
        with self._tally.lock:
            self._tally.done_bytes += self._left
        self._left = self._silent = 0


def orders(run: RunState) -> dict[str, Sequence[tuple[int, float]]]:
    """Return the orders of experts that a run or one before it found; see `Report.orders`."""
    made: dict[str, Sequence[tuple[int, float]]] = {}
    for artefact in run.plan.artefacts:
        if isinstance(artefact.task, ExpertMatching):
            known = run.found.get(artefact.key) or read_found(_path(run, artefact))
            if known is not None:  # damaged since, and not needed where every step is done
                pairs = zip(known[ORDER].tolist(), known[DISTANCE].tolist(), strict=True)
                where = artefact.task.where
                again = f"{where} ({artefact.key})"  # matched in two stages
                made[again if where in made else where] = tuple(pairs)
    return made


def _path(run: RunState, artefact: Artefact) -> Path:
    return run.folder / FOLDER / f"found-{artefact.key}.safetensors"


def find(task: Any, operands: Operands, stop: threading.Event) -> dict[str, Tensor]:
    """Return the tensors that a task asks for, by name."""
    return dict(FINDERS[type(task)](task, operands, stop))
