"""A pool of threads over tasks that lead to further tasks."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence

import torch

from merge_kit.engine.workspace import Workspace
from merge_kit.errors import OutputError

Task = Callable[[Workspace], "Sequence[Task]"]
"""Does a piece of work and returns the tasks that have become possible by it."""


class Pool:
    """Runs tasks in order on `workers` threads; what a task leads to goes first.

    Args:
        stop: Set from outside to end early.
    """

    def __init__(self, workers: int, stop: threading.Event) -> None:
        self._workers = workers
        self._stop = stop
        self._ready: deque[Task] = deque()
        self._busy = 0
        self._error: BaseException | None = None
        self._turn = threading.Condition()

    def run(self, tasks: Iterable[Task]) -> None:
        """Run all tasks, and those they lead to.

        Raises:
            BaseException: The first error of any task, after all threads have ended.
        """
        self._ready.extend(tasks)
        threads: list[threading.Thread] = []
        try:
            threads.extend(self._started())
            for thread in threads:
                thread.join()
        finally:
            with self._turn:
                self._ready.clear()
            for thread in threads:
                thread.join()
        if self._error is not None:
            raise self._error

    def _started(self) -> Iterator[threading.Thread]:
        """Start the workers, or as many as the system allows."""
        for i in range(self._workers):
            thread = threading.Thread(target=self._work, name=f"merge-{i}")
            try:
                thread.start()
            except RuntimeError as exc:
                if i == 0:
                    hint = "end other programs, or raise the limit of processes (ulimit -u)"
                    raise OutputError("the system starts no more threads", hint=hint) from exc
                return  # fewer workers give the same bytes
            yield thread

    def _next(self) -> Task | None:
        with self._turn:
            while True:
                if self._error is not None or self._stop.is_set():
                    self._turn.notify_all()
                    return None
                if self._ready:
                    self._busy += 1
                    return self._ready.popleft()
                if not self._busy:
                    self._turn.notify_all()
                    return None
                self._turn.wait(0.5)

    def _work(self) -> None:
        with torch.inference_mode():
            self._tasks(Workspace())

    def _tasks(self, work: Workspace) -> None:
        while (task := self._next()) is not None:
            more: Sequence[Task] = ()
            try:
                more = task(work)
            except BaseException as error:  # noqa: BLE001  (raised again by the caller's thread)
                self._error = self._error or error
            with self._turn:
                self._busy -= 1
                self._ready.extendleft(reversed(more))
                self._turn.notify_all()
