"""One slab: load it, merge it, round it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from merge_kit.core.tensors import BLOCK, numel
from merge_kit.engine.operands import Artefacts, Operands
from merge_kit.engine.workspace import ALIGN, Workspace
from merge_kit.io.reader import Reader
from merge_kit.io.torch_dtypes import torch_dtype
from merge_kit.methods.base import Scans, Slab, Yield
from merge_kit.methods.rounding import nonfinite, round_into
from merge_kit.plan.sources import Merged, elements
from merge_kit.plan.values import Step
from merge_kit.plan.walk import is_whole_aux, operand_shape

NO_SCANS: Scans = MappingProxyType({})
NOTHING_FOUND: Artefacts = MappingProxyType({})


class NotFinite(Exception):  # noqa: N818  (becomes a NonFiniteError once it is located)
    """Operands or a merged slab hold NaN or infinity.

    Attributes:
        step: The step that reads them; None for the one that is merged.
    """

    def __init__(self, step: Step | None = None) -> None:
        super().__init__()
        self.step = step


class Kernel:
    """Loads and merges slabs of one step and of the steps that feed it.

    Attributes:
        operands: Where they are read from.
        scans: Results of the scans of each step, by id of the step.
        facts: What merges found worth knowing, by id of the step.
        allow_nonfinite: Whether NaN and infinity in what is scanned pass.
    """

    def __init__(
        self, reader: Reader, *, allow_nonfinite: bool = False, found: Artefacts = NOTHING_FOUND
    ) -> None:
        self.operands = Operands(reader, self.compute, found)
        self.allow_nonfinite = allow_nonfinite
        self.scans: dict[int, Mapping[str, Any]] = {}
        self.facts: dict[int, Sequence[Mapping[str, float]]] = {}

    def load(self, step: Step, start: int, stop: int, work: Workspace) -> Slab:
        """Return elements [start, stop) of every operand as the step's method wants them."""
        work.enter(step)
        return self._load(step, start, stop, work)

    def load_whole(self, step: Step, work: Workspace) -> Slab:
        """Return all elements of every operand."""
        return self.load(step, 0, numel(operand_shape(step)), work)

    def _load(self, step: Step, start: int, stop: int, work: Workspace) -> Slab:
        assert step.method is not None  # copies are not loaded
        kind, count = torch_dtype(step.compute), stop - start
        has_base = step.base is not None
        rows = work.rows("models", len(step.inputs) + has_base, count, kind)
        base = rows[0] if has_base else None
        tensors = rows[1:] if has_base else rows
        if step.base is not None:
            self.operands.read(step.base, start, stop, rows[0], work)
        for row, source in zip(tensors, step.inputs, strict=True):
            self.operands.read(source, start, stop, row, work)
        if step.method.operates_on == "deltas" and base is not None:
            for i, row in enumerate(tensors):
                if not (step.deltas and step.deltas[i]):
                    row.sub_(base)
        aux = self._aux(step, start, stop, work)
        spec = step.outputs[0].spec
        return Slab(
            tensors=tensors,
            base=base,
            weights=step.weights,
            name=step.outputs[0].key,
            shape=_slab_shape(step),
            models=step.models,
            offset=start,
            seed=step.seed,
            aux=aux,
            ranks=tuple(t.spec.shape[0] for t in step.outputs[::2]) if step.shape else (),
            stored_dtype=spec.dtype,
        )

    def _aux(self, step: Step, start: int, stop: int, work: Workspace) -> dict[str, Tensor]:
        """Return further operands: a range of those of the tensor's shape, the others whole."""
        if not step.aux:
            return {}
        spans = [
            (0, elements(source)) if is_whole_aux(step, source) else (start, stop)
            for _, source in step.aux
        ]
        places, total = [], 0
        for low, high in spans:
            places.append(total)
            total += -(-(high - low) // ALIGN) * ALIGN
        flat, aux = work.rows("aux", 1, total, torch_dtype(step.compute))[0], {}
        for place, (name, source), (low, high) in zip(places, step.aux, spans, strict=True):
            aux[name] = flat[place : place + high - low]
            self.operands.read(source, low, high, aux[name], work)
        return aux

    def check_finite(self, step: Step, slab: Slab) -> None:
        """Check operands before a statistic counts them: NaN would take a place among the largest.

        Raises:
            NotFinite: If one holds NaN or infinity, and that is not allowed.
        """
        if self.allow_nonfinite:
            return
        assert step.method is not None
        rows = list(slab.tensors)
        if slab.base is not None and (step.method.operates_on == "tensors" or not rows):
            rows.append(slab.base)  # else it shows in the deltas
        if step.shape is not None:
            rows += slab.aux.values()  # factors
        for row in rows:
            total = float(row.sum())
            if total - total != 0 and nonfinite(row):  # perhaps only the sum is not finite
                raise NotFinite(step)

    def merge(self, step: Step, slab: Slab) -> Sequence[Tensor]:
        """Return the merged slab, flat, one tensor an output of the step."""
        assert step.method is not None
        if step.method.checks_inputs or step.method.residency() == "tensor":
            self.check_finite(step, slab)
        merged = step.method.merge(slab, self.scans.get(id(step), NO_SCANS))
        if isinstance(merged, Yield):
            self.facts[id(step)] = merged.facts
            merged = merged.tensors
        parts = [merged] if isinstance(merged, Tensor) else list(merged)
        return [part.reshape(-1) for part in parts]

    def facts_by_key(self, step: Step) -> dict[str, Mapping[str, float]]:
        """Return what its merge found worth knowing, by key of the output that it is about."""
        each = 1 if step.shape is None else 2  # a and b
        found = self.facts.get(id(step), ())
        return {step.outputs[each * i].key: dict(facts) for i, facts in enumerate(found)}

    def compute(self, source: Merged, start: int, stop: int, out: Tensor, work: Workspace) -> None:
        """Fill `out` with a range of a feeding step, rounded to the stage's dtype."""
        assert start % BLOCK == 0  # the planner spills what is read otherwise
        (merged,) = self.merge(source.step, self._load(source.step, start, stop, work))
        rounded = torch_dtype(source.dtype)
        if merged.dtype == rounded:
            out.copy_(merged)
        else:
            narrow = torch.empty(merged.shape, dtype=rounded)
            round_into(merged, narrow)
            out.copy_(narrow)


def _slab_shape(step: Step) -> tuple[int, ...]:
    """Return the shape of what a step merges: of its output, or of the matrix that it factors."""
    if step.shape is not None:
        return step.shape
    return step.outputs[0].spec.shape if len(step.outputs) == 1 else step.inputs[0].shape
