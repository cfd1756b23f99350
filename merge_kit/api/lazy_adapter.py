"""Adapters that are made when they are asked for, from adapters or from models on disk."""

from __future__ import annotations

from os import PathLike
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from merge_kit.api.held import HeldModel
from merge_kit.api.merging import Size, merge, plan
from merge_kit.api.requests import Request, paths, with_dtype
from merge_kit.errors import UsageError
from merge_kit.plan.values import Plan

if TYPE_CHECKING:
    from torch import Tensor

    from merge_kit.api.mergeable import DType


class LazyAdapter:
    """A method that makes a LoRA adapter, and what it makes it of.

    Nothing is read but headers before the result is asked for. What `save` writes may stand
    wherever an adapter may.
    """

    def __init__(self, request: Request) -> None:
        self._request = request

    def recipe(self) -> list[dict[str, Any]]:
        """Return the documents of the recipe that says the same.

        Raises:
            UsageError: If a model is in memory, and has no path.
        """
        on_disk = paths(self._request)
        if on_disk is None:
            memory = next(m for m in self._request.inputs() if m.reference is None)
            problem = f"an adapter is made of what is on disk, found {memory}"
            raise UsageError(problem, where=self._request.method, hint="save it first")
        return self._request.documents(self._request.names(on_disk))

    def plan(self, *, threads: int | None = None, memory: Size | None = None) -> Plan:
        """Return everything that `save` would do, from headers alone.

        Raises:
            MergeKitError: Everything that is wrong with adapters and parameters, in one list.
        """
        return plan(self.recipe(), threads=threads, memory=memory)

    def state_dict(
        self, *, dtype: DType | None = None, threads: int | None = None
    ) -> dict[str, Tensor]:
        """Return the factors by the names that `save` writes; the same bits.

        The adapter is written to a temporary folder, which is gone afterwards.

        The arguments are those of `save`.
        """
        with TemporaryDirectory(prefix="merge_kit-") as folder:
            made = self.save(Path(folder) / "adapter", dtype=dtype, threads=threads)
            return HeldModel(made).state_dict()

    def save(
        self,
        folder: str | PathLike[str],
        *,
        overwrite: bool = False,
        dtype: DType | None = None,
        threads: int | None = None,
        allow_nonfinite: bool = False,
    ) -> Path:
        """Write the adapter into a folder, which appears whole or not at all, and return its path.

        Args:
            overwrite: Replace a folder that is there.
            dtype: Of the factors, for example torch.bfloat16; default: the inputs' own.
            threads: Workers; one for each processor by default.
            allow_nonfinite: Write NaN and infinities, instead of stopping.

        Raises:
            MergeKitError: The cause in one line or list; no output was written.
        """
        request = with_dtype(self._request, dtype)
        return merge(
            LazyAdapter(request).recipe(),
            Path(folder),
            overwrite=overwrite,
            threads=threads,
            allow_nonfinite=allow_nonfinite,
        ).output

    def __repr__(self) -> str:
        models = ", ".join(str(model) for model in self._request.models)
        return f"<{self._request.method} of {models}>"
