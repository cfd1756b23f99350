"""Merges that are carried out when their result is asked for."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING
from uuid import uuid4

from merge_kit.api.lowering import Lowered, Request, lower, with_dtype
from merge_kit.api.merging import Size, merge
from merge_kit.core.sizes import parse_size
from merge_kit.io.reader import Reader
from merge_kit.plan.cost import sized, worker_count
from merge_kit.plan.findings import Findings
from merge_kit.plan.layout import place
from merge_kit.plan.side_files import side_files
from merge_kit.publish.side_files import write_side_files
from merge_kit.publish.staging import stage
from merge_kit.recipe.parse import DEFAULT_SHARD_BYTES

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    DType = str | torch.dtype


class Mergeable(ABC):
    """What stands for a merge; nothing is read before the result is asked for."""

    @abstractmethod
    def request(self) -> Request:
        """Return what is to be merged, and how."""

    def state_dict(
        self,
        *,
        dtype: DType | None = None,
        threads: int | None = None,
        allow_nonfinite: bool = False,
    ) -> dict[str, Tensor]:
        """Return the merged tensors by name, the same bits that `save` writes.

        Args:
            dtype: Of the result, for example torch.bfloat16; default: the models' own.
            threads: Workers; one for each processor by default.
            allow_nonfinite: Return NaN and infinities, instead of stopping.

        Raises:
            MergeKitError: Everything that is wrong with models and parameters, in one list.
        """
        return state_dict(
            lower(with_dtype(self.request(), dtype)),
            workers=worker_count(threads),
            allow_nonfinite=allow_nonfinite,
        )

    def save(
        self,
        folder: str | PathLike[str],
        *,
        overwrite: bool = False,
        dtype: DType | None = None,
        shard_size: Size | None = None,
        threads: int | None = None,
        allow_nonfinite: bool = False,
    ) -> Path:
        """Merge into a folder, which appears whole or not at all, and return its path.

        Where all models are on disk, this is `merge_kit.merge`: memory stays constant, and the
        folder gets config, tokenizer, model card and record. Where one is in memory, there are no
        card and no record, and the other files are those of the base, or of the first model, if
        that one is on disk.

        Args:
            overwrite: Replace a folder that is there.
            shard_size: Largest size of a file, "5GB" or bytes.

        The other arguments are those of `state_dict`.

        Raises:
            MergeKitError: The cause in one line or list; no output was written.
        """
        request = with_dtype(self.request(), dtype)
        paths = {model.key: str(model.path) for model in request.inputs() if model.path is not None}
        if len(paths) == len(request.inputs()):
            return merge(
                request.recipe(paths),
                Path(folder),
                overwrite=overwrite,
                shard_size=shard_size,
                threads=threads,
                allow_nonfinite=allow_nonfinite,
            ).output
        lowered, workers = lower(request), worker_count(threads)
        limit = DEFAULT_SHARD_BYTES if shard_size is None else parse_size(shard_size)
        roots = [model.path for model in request.inputs() if model.path is not None]
        with stage(Path(folder), overwrite=overwrite, inputs=roots, identity=uuid4().hex) as out:
            _write(lowered, out.folder, limit, workers, allow_nonfinite=allow_nonfinite)
            out.commit(sync=False)
        return Path(folder)


class LazyMerge(Mergeable):
    """Models and a method; nothing is read before the result is asked for."""

    def __init__(self, request: Request) -> None:
        self._request = request

    def request(self) -> Request:
        """Return what is to be merged, and how."""
        return self._request

    def __repr__(self) -> str:
        models = ", ".join(str(model) for model in self._request.models)
        return f"<{self._request.method} of {models}>"


def state_dict(lowered: Lowered, *, workers: int, allow_nonfinite: bool) -> dict[str, Tensor]:
    """Return the tensors of a merge; copies of tensors in memory are copies."""
    from merge_kit.engine.in_memory import merge_each  # noqa: PLC0415  (torch)

    copies = {name: tensor.clone() for name, tensor in _copies(lowered)}
    steps = [sized(m.step, None) for m in lowered.made if m.fate == "merged"]
    results: dict[str, Tensor] = {}

    def keep(index: int, tensor: Tensor) -> None:
        results[steps[index].outputs[0].key] = tensor

    merge_each(steps, lowered.files, keep, workers=workers, allow_nonfinite=allow_nonfinite)
    results |= copies
    return {m.item.name: results[m.item.name] for m in lowered.made}


def _copies(lowered: Lowered) -> Iterator[tuple[str, Tensor]]:
    """Yield what passes through unchanged, checked to be equal where it must be."""
    from merge_kit.engine.in_memory import check_equal, fetch  # noqa: PLC0415  (torch)

    with Reader(lowered.files) as reader:
        for made in lowered.made:
            if made.fate == "copied":
                check_equal(reader, made.step)
                yield made.item.name, fetch(reader, made.held.source)
        reader.check_all()


def _write(
    lowered: Lowered, folder: Path, shard_bytes: int, workers: int, *, allow_nonfinite: bool
) -> None:
    """Write the tensors of a merge as they are made, and the files beside them."""
    from merge_kit.engine.in_memory import TensorWriter, merge_each  # noqa: PLC0415  (torch)

    placed, shards, indexes = place(lowered.parts, lowered.made, shard_bytes)
    merged = {m.item.name for m in lowered.made if m.fate == "merged"}
    steps = [sized(step, None) for step in placed if step.outputs[0].key in merged]
    targets = {step.outputs[0].key: step.outputs[0] for step in placed}
    with TensorWriter(folder, shards) as writer:
        for name, tensor in _copies(lowered):
            writer.write(targets[name], tensor)

        def emit(index: int, tensor: Tensor) -> None:
            writer.write(steps[index].outputs[0], tensor)

        merge_each(steps, lowered.files, emit, workers=workers, allow_nonfinite=allow_nonfinite)
    assembly = lowered.assembly
    beside = side_files(
        assembly.stage, assembly.donor, lowered.parts, lowered.inputs, findings := Findings()
    )
    findings.raise_any()
    write_side_files(folder, [*beside, *indexes])
