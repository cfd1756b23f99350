"""Stopping a run: the first signal asks, the second does not wait."""

from __future__ import annotations

import os
import signal
import threading
from contextlib import AbstractContextManager, suppress
from types import FrameType
from typing import Any, Self

SIGNALS = (signal.SIGINT, signal.SIGTERM)
_ASKED = b"\nstopping; what is finished is kept. Once more stops at once.\n"


class Stop(AbstractContextManager["Stop"]):
    """Handlers of SIGINT and SIGTERM while a run lasts.

    Attributes:
        event: Set by the first signal.
        signal: Its number, 0 before it came.
    """

    def __init__(self) -> None:
        self.event = threading.Event()
        self.signal = 0
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Self:
        self._before = {number: signal.signal(number, self._handle) for number in SIGNALS}
        return self

    def __exit__(self, *exc: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        del frame
        if self.signal:
            os._exit(128 + number)
        self.signal = number
        self.event.set()
        with suppress(OSError):
            os.write(2, _ASKED)  # print may be at work in the frame that this interrupts
