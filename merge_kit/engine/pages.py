"""Memory straight from the system, and freed memory back to it.

The C library keeps what a thread freed for that thread, in pieces that the next buffer may not fit
into: what a process holds then grows beyond what its buffers take.
"""

from __future__ import annotations

import ctypes
import gc
import mmap

import torch
from torch import Tensor

LARGE = 2**20
"""Bytes from which a buffer gets pages of its own, which go back when it is freed."""


def buffer(elements: int, dtype: torch.dtype) -> Tensor:
    """Return an uninitialised (elements,); a large one has pages of its own."""
    count = elements * dtype.itemsize
    if count < LARGE:
        return torch.empty(elements, dtype=dtype)
    pages = mmap.mmap(-1, count, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    return torch.frombuffer(pages, dtype=dtype, count=elements)


def give_back() -> None:
    """Give back what the C library keeps of freed memory, where it is one that can be told to."""
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(ctypes.c_size_t(0))
