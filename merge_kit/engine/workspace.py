"""Buffers that a worker reuses from slab to slab."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

_ALIGN = 16  # elements: 64 bytes of float32
_SKEW = 5 * _ALIGN  # keeps rows of equal length off the same cache sets


class Workspace:
    """One worker's rows of floats and bytes; they grow when asked for more and stay.

    Attributes:
        scratch: File of what the current step spilled, or None.
    """

    def __init__(self) -> None:
        self.scratch: Path | None = None
        self._floats: dict[str, Tensor] = {}
        self._bytes: dict[str, tuple[Tensor, memoryview]] = {}
        self._child: Workspace | None = None

    @property
    def child(self) -> Workspace:
        """The workspace of a step that is recomputed inside another."""
        if self._child is None:
            self._child = Workspace()
        self._child.scratch = self.scratch
        return self._child

    def rows(self, name: str, count: int, elements: int, dtype: torch.dtype) -> Tensor:
        """Return an uninitialised (count, elements); each row is contiguous and aligned."""
        stride = -(-elements // _ALIGN) * _ALIGN + _SKEW
        wanted = max(count, 1) * stride
        flat = self._floats.get(name)
        if flat is None or flat.dtype != dtype or flat.numel() < wanted:
            self._floats.pop(name, None)
            flat = self._floats[name] = torch.empty(wanted, dtype=dtype)
        return flat.as_strided((count, elements), (stride, 1))

    def bytes(self, name: str, count: int) -> tuple[Tensor, memoryview]:
        """Return `count` uninitialised bytes, as a uint8 tensor and as memory."""
        found = self._bytes.get(name)
        if found is None or len(found[1]) < count:
            self._bytes.pop(name, None)
            tensor = torch.empty(count, dtype=torch.uint8)
            found = self._bytes[name] = (tensor, memoryview(tensor.numpy().data))
        return found[0][:count], found[1][:count]

    def release(self) -> None:
        """Give all buffers back."""
        self._floats.clear()
        self._bytes.clear()
        self._child = None
