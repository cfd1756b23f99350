"""Buffers that a worker reuses from slab to slab."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from merge_kit.engine.pages import buffer

ALIGN = 16
"""Elements that rows begin at multiples of: 64 bytes of float32."""

_SPARE = "spare-"

_SKEW = 5 * ALIGN  # keeps rows of equal length off the same cache sets


class Workspace:
    """One worker's rows of floats and bytes; they grow when asked for more and stay.

    Attributes:
        scratch: File of what the current step spilled, or None.
        kept: What readers keep from slab to slab of one step, by keys of their own.
    """

    def __init__(self) -> None:
        self.scratch: Path | None = None
        self.kept: dict[tuple[Any, ...], Any] = {}
        self._step: object = None
        self._depth = 0
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

    def enter(self, step: object) -> None:
        """Give back what was kept for another step, and for those that fed it."""
        if self._step is not step:
            self._step = step
            self._forget()

    def _forget(self) -> None:
        self.kept.clear()
        for name in [name for name in self._floats if name.startswith(_SPARE)]:
            del self._floats[name]  # the bill has them beside the other buffers of one step only
        if self._child is not None:
            self._child._forget()  # noqa: SLF001

    def rows(self, name: str, count: int, elements: int, dtype: torch.dtype) -> Tensor:
        """Return an uninitialised (count, elements); each row is contiguous and aligned."""
        stride = -(-elements // ALIGN) * ALIGN + _SKEW
        wanted = max(count, 1) * stride * dtype.itemsize
        memory = self._floats.get(name)  # of any dtype: steps of different ones take turns
        if memory is None or memory.numel() < wanted:
            memory = None
            self._floats.pop(name, None)
            memory = self._floats[name] = buffer(wanted, torch.uint8)
        flat = memory[:wanted].view(dtype)
        return flat.as_strided((count, elements), (stride, 1))

    @contextmanager
    def spare(self, elements: int, dtype: torch.dtype) -> Iterator[Tensor]:
        """Lend an uninitialised (elements,), apart from those that are lent at the same time."""
        self._depth += 1
        try:
            yield self.rows(f"{_SPARE}{self._depth}", 1, elements, dtype)[0]
        finally:
            self._depth -= 1

    def bytes(self, name: str, count: int) -> tuple[Tensor, memoryview]:
        """Return `count` uninitialised bytes, as a uint8 tensor and as memory."""
        found = self._bytes.get(name)
        if found is None or len(found[1]) < count:
            self._bytes.pop(name, None)
            tensor = buffer(count, torch.uint8)
            found = self._bytes[name] = (tensor, memoryview(tensor.numpy().data))
        return found[0][:count], found[1][:count]

    def release(self) -> None:
        """Give all buffers back."""
        self._step = None
        self.kept.clear()
        self._floats.clear()
        self._bytes.clear()
        self._child = None
