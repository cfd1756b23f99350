"""Writes whole tensors to their places in an output."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

import torch
from torch import Tensor

from merge_kit.io.writer import Writer
from merge_kit.plan.values import Shard, Target


class TensorWriter:
    """Writes whole tensors to their places in the shards of an output folder."""

    def __init__(self, folder: Path, shards: Sequence[Shard]) -> None:
        self._paths = [folder / shard.name for shard in shards]
        self._shards, self._writer = shards, Writer()

    def __enter__(self) -> Self:
        for path, shard in zip(self._paths, self._shards, strict=True):
            self._writer.create(path, shard.nbytes, shard.header)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._writer.close()

    def write(self, target: Target, tensor: Tensor) -> None:
        """Write a contiguous tensor of the target's dtype.

        Raises:
            OutputError: If the system refuses.
        """
        content = tensor.flatten().view(torch.uint8).numpy().data
        self._writer.write(self._paths[target.shard], target.offset, content)
