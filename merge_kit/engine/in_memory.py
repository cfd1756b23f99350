"""Merges tensor by tensor: operands in files or in memory, results handed over as tensors.

The arithmetic is that of `run_plan`: the same kernel, the same slabs, the same order of sums.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from merge_kit.core.dtypes import DTYPES
from merge_kit.core.tensors import TensorSpec
from merge_kit.engine.artefacts import find
from merge_kit.engine.diagnose import not_finite
from merge_kit.engine.kernel import NOTHING_FOUND, Kernel, NotFinite
from merge_kit.engine.operands import Artefacts
from merge_kit.engine.pool import Pool, Task
from merge_kit.engine.statistics import (
    Gathered,
    InOrder,
    Passes,
    chunks,
    gather,
    ranges,
    slabs,
    thinning,
)
from merge_kit.engine.threads import one_torch_thread
from merge_kit.engine.workspace import Workspace
from merge_kit.errors import CheckpointError, MismatchError, UsageError
from merge_kit.io.reader import Reader
from merge_kit.io.torch_dtypes import torch_dtype
from merge_kit.io.values import WeightFile
from merge_kit.methods.reductions import CHUNK
from merge_kit.methods.rounding import nonfinite, round_into
from merge_kit.plan.sources import Memory, Source, Stored
from merge_kit.plan.values import Artefact, Step
from merge_kit.plan.whole_model import Group, group_of, groups, model_scans

_NAMES: dict[torch.dtype, str] = {
    getattr(torch, dtype.torch_name): dtype.name
    for dtype in DTYPES.values()
    if dtype.bits >= 8 and hasattr(torch, dtype.torch_name)
}
Results = Mapping[str, Any]
Shared = Mapping[Group, Results]
Parts = list[tuple[Step, tuple[int, int]]]


def in_memory(name: str, value: object) -> tuple[TensorSpec, Memory]:
    """Return a tensor as an operand; it is copied only if it is not contiguous or not on the CPU.

    Raises:
        UsageError: If it is no dense tensor of a dtype that safetensors files hold.
    """
    if not isinstance(value, Tensor):
        problem = f"is of type {type(value).__name__}, expected a torch.Tensor"
        raise UsageError(problem, where=name, hint="pass tensors only")
    if value.layout != torch.strided or value.is_meta or value.dtype not in _NAMES:
        kind = "a tensor without data" if value.is_meta else f"{value.layout}, {value.dtype}"
        problem = f"is {kind}, expected a dense tensor of a dtype of safetensors"
        raise UsageError(problem, where=name, hint="convert or load it first")
    flat = value.detach().cpu().contiguous().flatten()
    dtype, shape = _NAMES[value.dtype], tuple(value.shape)
    return TensorSpec(name, dtype, shape), Memory(flat, dtype, shape)


def fetch(reader: Reader, source: Source) -> Tensor:
    """Return the elements of a file or of memory unchanged; memory is shared, not copied.

    Raises:
        CheckpointError: If the file cannot be read, or torch has no such dtype.
    """
    if isinstance(source, Memory):
        found: Tensor = source.tensor
        return found.view(source.shape)
    assert isinstance(source, Stored)  # nothing else is passed through
    kind, shape = DTYPES[source.dtype], source.shape
    if not hasattr(torch, kind.torch_name or "-"):
        problem = f"torch has no dtype for {source.dtype}"
        raise CheckpointError(problem, where=str(source.span.path), hint="convert the model first")
    raw = torch.empty(source.span.nbytes, dtype=torch.uint8)
    reader.read_into(source.span.path, source.span.start, raw.numpy().data)
    if kind.bits < 8:  # two elements in a byte
        shape = (*shape[:-1], shape[-1] * kind.bits // 8)
    return raw.view(torch_dtype(source.dtype)).view(shape)


def check_equal(reader: Reader, step: Step) -> None:
    """Check that the copies of an integer or bool tensor are equal in all models.

    Raises:
        MismatchError: If two differ.
    """
    if not step.agree:
        return
    first = fetch(reader, step.inputs[0])
    for other, model in zip(step.agree, step.agree_models, strict=True):
        if not torch.equal(first, fetch(reader, other)):
            raise MismatchError(
                f"{first.dtype} values differ between {step.models[0]} and {model}, and cannot "
                "be averaged",
                where=step.outputs[0].key,
                hint="take this tensor from one of the models",
            )


def merge_each(
    steps: Sequence[Step],
    files: Iterable[WeightFile],
    emit: Callable[[int, Tensor], None],
    *,
    workers: int,
    allow_nonfinite: bool = False,
    found: Artefacts = NOTHING_FOUND,
) -> None:
    """Merge steps of one output each and hand over each result, rounded, in its shape.

    Args:
        steps: With slab sizes; no step feeds another.
        files: The files that are read, as they were when the steps were planned.
        emit: Called from worker threads with the step's index and a new tensor.
        found: What was found before.

    Raises:
        NonFiniteError: If merged values are not finite and that is not allowed.
        CheckpointError: If a file cannot be read or has changed.
    """
    with Reader(files) as reader, one_torch_thread():
        shared = _whole_model(reader, steps, workers, lax=allow_nonfinite, found=found)

        def task(index: int) -> Task:
            def run(work: Workspace) -> Sequence[Task]:
                step = steps[index]
                kernel = Kernel(reader, allow_nonfinite=allow_nonfinite, found=found)
                known = shared.get(group_of(step), {})
                kernel.scans[id(step)] = _scanned(kernel, step, known, work)
                emit(index, _merged(kernel, step, work, allow_nonfinite=allow_nonfinite))
                return ()

            return run

        _run([task(i) for i in range(len(steps))], workers)
        reader.check_all()


def find_each(
    artefacts: Sequence[Artefact], files: Iterable[WeightFile], found: Artefacts
) -> Artefacts:
    """Return what artefacts hold, found now, by their keys.

    Args:
        artefacts: Whose sources are in files or in memory.
        files: As in `merge_each`.
        found: What was found before.
    """
    made = dict(found)
    with Reader(files) as reader, one_torch_thread():
        for one in artefacts:
            operands = Kernel(reader, found=made).operands
            made[one.key] = find(one.task, operands, threading.Event())
        reader.check_all()
    return made


def scan_each(
    steps: Sequence[Step],
    files: Iterable[WeightFile],
    *,
    workers: int,
    found: Artefacts = NOTHING_FOUND,
) -> list[Results]:
    """Return what the scans of each step find: name -> result."""
    results: list[Results] = [{}] * len(steps)
    with Reader(files) as reader, one_torch_thread():
        shared = _whole_model(reader, steps, workers, lax=False, found=found)

        def task(index: int) -> Task:
            def run(work: Workspace) -> Sequence[Task]:
                step = steps[index]
                known = shared.get(group_of(step), {})
                results[index] = _scanned(Kernel(reader, found=found), step, known, work)
                return ()

            return run

        _run([task(i) for i in range(len(steps))], workers)
        reader.check_all()
    return results


def _run(tasks: Sequence[Task], workers: int) -> None:
    Pool(max(1, min(workers, len(tasks))), threading.Event()).run(tasks)


def _scanned(kernel: Kernel, step: Step, known: Results, work: Workspace) -> Results:
    """Return the results of a step's scans over its own tensor, beside what is known."""
    assert step.method is not None
    passes = Passes([s for s in step.method.scans() if s.scope == "tensor"], known)
    while passes.due():
        fold = InOrder()
        for i, span in enumerate(chunks(step, passes)):
            fold.put(i, _gather(kernel, step, passes, span, work))
        passes.finish(fold.total)
    return passes.results


def _whole_model(
    reader: Reader,
    steps: Sequence[Step],
    workers: int,
    *,
    lax: bool,
    found: Artefacts = NOTHING_FOUND,
) -> Shared:
    """Return the statistics of scope "model" by group of steps."""
    return {
        group: _gathered(reader, members, workers, lax=lax, found=found)
        for group, members in groups(steps).items()
    }


def _gathered(
    reader: Reader, steps: Sequence[Step], workers: int, *, lax: bool, found: Artefacts
) -> Results:
    passes = Passes(model_scans(steps[0]), {}, thinning(steps))
    while passes.due():
        parts = [(step, span) for step in steps for span in chunks(step, passes)]
        fold = InOrder()

        def task(index: int, parts: Parts = parts, fold: InOrder = fold) -> Task:
            def run(work: Workspace) -> Sequence[Task]:
                step, span = parts[index]
                kernel = Kernel(reader, allow_nonfinite=lax, found=found)
                fold.put(index, _gather(kernel, step, passes, span, work))
                return ()

            return run

        _run([task(i) for i in range(len(parts))], workers)
        passes.finish(fold.total)
    return passes.results


def _gather(
    kernel: Kernel, step: Step, passes: Passes, span: tuple[int, int], work: Workspace
) -> Gathered:
    try:
        return gather(kernel, step, passes, span, work)
    except NotFinite as error:
        raise not_finite(kernel, error.step or step, work) from None


def _merged(kernel: Kernel, step: Step, work: Workspace, *, allow_nonfinite: bool) -> Tensor:
    try:
        return _merged_whole(kernel, step, work, allow_nonfinite=allow_nonfinite)
    except NotFinite as error:
        raise not_finite(kernel, error.step or step, work) from None


def _merged_whole(kernel: Kernel, step: Step, work: Workspace, *, allow_nonfinite: bool) -> Tensor:
    (target,) = step.outputs
    with torch.inference_mode(mode=False):  # what is handed out is an ordinary tensor
        out = torch.empty(target.spec.numel, dtype=torch_dtype(target.spec.dtype))
    for span in ranges(step, CHUNK):
        for start, stop in slabs(step, span):
            (values,) = kernel.merge(step, kernel.load(step, start, stop, work))
            round_into(values, out[start:stop])
    total = float(out.sum())
    infinite = total - total != 0 and nonfinite(out)  # perhaps only the sum is not finite
    if infinite and not allow_nonfinite:
        raise NotFinite
    with torch.inference_mode(mode=False):
        return out.view(target.spec.shape)
