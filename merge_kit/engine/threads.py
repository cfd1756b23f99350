"""How many threads torch may use while workers merge."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager

import torch

SWITCH_SECONDS = 1e-4
"""How long a worker waits for another one's Python: what they call takes about as long."""


@contextmanager
def one_torch_thread() -> Iterator[None]:
    """Let torch use one thread: the workers are the parallelism, and sums keep one order."""
    before, interval = torch.get_num_threads(), sys.getswitchinterval()
    torch.set_num_threads(1)
    sys.setswitchinterval(SWITCH_SECONDS)
    try:
        yield
    finally:
        torch.set_num_threads(before)
        sys.setswitchinterval(interval)
