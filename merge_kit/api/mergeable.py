"""Merges that are carried out when their result is asked for."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import replace
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING
from uuid import uuid4

from merge_kit.api.in_stages import computed, copies, inner_results, ready
from merge_kit.api.lowering import Lowered, lower
from merge_kit.api.merging import Size, merge
from merge_kit.api.requests import Request, paths, roots, with_dtype
from merge_kit.api.streaming import stream
from merge_kit.core.sizes import parse_size
from merge_kit.plan.cost import worker_count
from merge_kit.plan.findings import Findings
from merge_kit.plan.layout import place
from merge_kit.plan.side_files import side_files
from merge_kit.plan.values import SideFile
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

        Where all models are on disk, memory stays constant; if a recipe can say what is merged
        (it cannot where task vectors are loaded, or pruned each in its own way), this is
        `merge_kit.merge`, and the folder gets config, tokenizer, model card and record. Otherwise
        there are no card and no record, and the other files are those of the base, or of the
        first model, if that one is on disk.

        Args:
            overwrite: Replace a folder that is there.
            shard_size: Largest size of a file, "5GB" or bytes.

        The other arguments are those of `state_dict`.

        Raises:
            MergeKitError: The cause in one line or list; no output was written.
        """
        request = with_dtype(self.request(), dtype)
        on_disk = paths(request)
        if on_disk is not None and request.is_recipe:
            return merge(
                request.documents(request.names(on_disk)),
                Path(folder),
                overwrite=overwrite,
                shard_size=shard_size,
                threads=threads,
                allow_nonfinite=allow_nonfinite,
            ).output
        return write(
            request,
            Path(folder),
            overwrite=overwrite,
            shard_size=shard_size,
            threads=threads,
            allow_nonfinite=allow_nonfinite,
        )


def state_dict(lowered: Lowered, *, workers: int, allow_nonfinite: bool) -> dict[str, Tensor]:
    """Return the tensors of a merge; copies of tensors in memory are copies."""
    from merge_kit.engine.in_memory import merge_each  # noqa: PLC0415  (torch)

    kept, found = inner_results(lowered, workers, allow_nonfinite=allow_nonfinite)
    through = {name: tensor.clone() for name, tensor in copies(lowered, lowered.made)}
    steps = [ready(m.step, kept) for m in lowered.made if computed(m)]
    results: dict[str, Tensor] = {}

    def keep(index: int, tensor: Tensor) -> None:
        results[steps[index].outputs[0].key] = tensor

    merge_each(
        steps,
        lowered.files,
        keep,
        workers=workers,
        allow_nonfinite=allow_nonfinite,
        found=found,
    )
    results |= through
    return {m.item.name: results[m.item.name] for m in lowered.made}


def write(  # noqa: PLR0913  (every option has a name)
    request: Request,
    folder: Path,
    *,
    stem: str | None = None,
    beside: tuple[SideFile, ...] = (),
    overwrite: bool = False,
    shard_size: Size | None = None,
    threads: int | None = None,
    allow_nonfinite: bool = False,
) -> Path:
    """Write a merge that is no recipe, or whose models are not all on disk, and return its folder.

    Args:
        stem: Of the weight files' names; default: as the models have it.
        beside: Further files.
    """
    lowered, workers = lower(request), worker_count(threads)
    if stem is not None:
        lowered = replace(lowered, parts=tuple(replace(p, stem=stem) for p in lowered.parts))
    limit = DEFAULT_SHARD_BYTES if shard_size is None else parse_size(shard_size)
    with stage(folder, overwrite=overwrite, inputs=[*roots(request)], identity=uuid4().hex) as out:
        save = _write if paths(request) is None else stream
        indexes = save(lowered, out.folder, limit, workers, allow_nonfinite=allow_nonfinite)
        write_side_files(out.folder, [*_files(lowered), *indexes, *beside])
        out.commit(sync=False)
    return folder


def _files(lowered: Lowered) -> list[SideFile]:
    """Return config, tokenizer and the like."""
    assembly, findings, donors = lowered.assembly, Findings(), lowered.inputs.donors
    donor = assembly.donor
    while donor.key in donors:  # the result of a merge inside
        donor = donors[donor.key]
    found = side_files(assembly.stage, donor, lowered.parts, lowered.inputs, findings)
    findings.raise_any()
    return found


def _write(
    lowered: Lowered, folder: Path, shard_bytes: int, workers: int, *, allow_nonfinite: bool
) -> list[SideFile]:
    """Write the tensors of a merge as they are made, each whole; return the index files."""
    from merge_kit.engine.in_memory import merge_each  # noqa: PLC0415  (torch)
    from merge_kit.engine.tensor_writer import TensorWriter  # noqa: PLC0415

    kept, found = inner_results(lowered, workers, allow_nonfinite=allow_nonfinite)
    placed, shards, indexes = place(lowered.parts, lowered.made, shard_bytes)
    due = {m.item.name for m in lowered.made if computed(m)}
    steps = [ready(step, kept) for step in placed if step.outputs[0].key in due]
    targets = {step.outputs[0].key: step.outputs[0] for step in placed}
    with TensorWriter(folder, shards) as writer:
        for name, tensor in copies(lowered, lowered.made):
            writer.write(targets[name], tensor)

        def emit(index: int, tensor: Tensor) -> None:
            writer.write(steps[index].outputs[0], tensor)

        merge_each(
            steps,
            lowered.files,
            emit,
            workers=workers,
            allow_nonfinite=allow_nonfinite,
            found=found,
        )
    return indexes
