"""An item as a step: shapes and dtypes checked, method evaluated, sources chosen."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from hashlib import blake2b
from typing import Literal

from merge_kit.core.dtypes import is_float, promoted
from merge_kit.core.tensors import TensorSpec
from merge_kit.methods.base import MergeMethod, PerModel
from merge_kit.methods.linear import Linear
from merge_kit.methods.passthrough import Passthrough
from merge_kit.methods.registry import parameters
from merge_kit.plan.applying.applied import change_from
from merge_kit.plan.evaluate import Evaluator
from merge_kit.plan.evidence import Aux, Evidence
from merge_kit.plan.filters import Filters
from merge_kit.plan.fitting import refuse_arithmetic, same_shape
from merge_kit.plan.items import Item, Part
from merge_kit.plan.models import Held
from merge_kit.plan.sources import Merged, Source, Stored
from merge_kit.plan.values import Step, Target
from merge_kit.plan.walk import parts as source_parts
from merge_kit.recipe.values import Stage

FLOAT64_MODELS = 4
"""Above so many models sums are in float64: float32 would miss law 4's bound."""


@dataclass(frozen=True, slots=True)
class Made:
    """A tensor of a stage's result, and the step that makes it.

    Attributes:
        takes: The parts of the item that it is made of; of integers that may differ, only one.
    """

    item: Item
    held: Held
    step: Step
    fate: Literal["merged", "copied"]
    takes: tuple[Part, ...]


def seed_of(name: str | None, seed: int) -> int:
    """Return the seed of a stage: a name makes its masks independent of those of other stages."""
    if name is None:
        return seed
    return int.from_bytes(blake2b(f"{seed} {name}".encode(), digest_size=6).digest(), "big")


class StepMaker:
    """Turns the items of one stage into steps.

    Args:
        seed: Of the run.
        group: Number of the stage, for statistics over the whole model.
        evidence: Statistics that models are weighed by; default: by paths in the working directory.
    """

    def __init__(
        self, stage: Stage, seed: int, group: int, evidence: Evidence | None = None
    ) -> None:
        self.stage, self.seed, self.group = stage, seed_of(stage.name, seed), group
        self.evidence = evidence or Evidence(None)
        self.filters = Filters()
        self._evaluator = Evaluator()

    def make(self, item: Item) -> Made:
        """Return the step of an item; targets are placed later.

        Raises:
            MergeKitError: If parts do not fit one another, or the method cannot take them.
        """
        same_shape(item)
        self._watch(item)
        if item.action == "copy":
            return self._copied(item, item.parts[0])
        method, base, inputs = self._evaluator.method(item)
        dtypes = [part.model.tensors[part.name].spec.dtype for part in item.parts]
        if method.copies():
            return self._passed(item, inputs[0])
        if not all(is_float(dtype) for dtype in dtypes):
            return self._agreeing(item, dtypes)
        if method.statistics_of:
            return self._weighed(item, method, inputs)
        return self._merge(item, method, base, inputs, dtypes)

    def _watch(self, item: Item) -> None:
        """Hold filters to the names of an item: of the output, and of the inputs."""
        names = [part.stands_for or part.name for part in item.parts]
        self.filters.see(item.levels, [item.name, *names])
        for part, name in zip(item.parts, names, strict=True):
            self.filters.see((part.entry.parameters,), [name])

    def _weighed(self, item: Item, method: MergeMethod, inputs: tuple[Part, ...]) -> Made:
        """Return a merge of models by statistics; a base is no part of it."""
        aux = self.evidence.operands(item, method, inputs)
        if not aux:
            method = Linear(weight=getattr(method, "weight"))  # noqa: B009  (not of every method)
        dtypes = [_held(part).spec.dtype for part in inputs]
        return self._merge(replace(item, parts=inputs), method, None, inputs, dtypes, aux)

    def _out_dtype(self, dtypes: Sequence[str]) -> str:
        named = self.stage.out_dtype or self.stage.dtype
        return named or promoted(list(dtypes))

    def _merge(
        self,
        item: Item,
        method: MergeMethod,
        base: Part | None,
        inputs: tuple[Part, ...],
        dtypes: list[str],
        aux: Aux = (),
    ) -> Made:
        out = self._out_dtype(dtypes)
        shape = _held(item.parts[0]).spec.shape
        sources = [_source(part) for part in item.parts]
        is_wide = out == "F64" or any(_reads_float64(source) for source in sources)
        wide = is_wide or len(sources) > FLOAT64_MODELS or _is_extreme(method)
        spec = TensorSpec(_held(item.parts[0]).spec.name, out, shape)
        spec = replace(spec, name=_file_name(item))
        given, deltas = _inputs(method, base, inputs)
        step = Step(
            action="merge",
            outputs=(Target(item.name, spec, -1, 0),),
            inputs=given,
            models=tuple(part.model.label for part in inputs),
            deltas=deltas if any(deltas) else (),
            method=method,
            base=None if base is None else _source(base),
            weights=tuple(getattr(method, "weight", ()) or (1.0,) * len(inputs)),
            aux=aux,
            compute="F64" if wide else "F32",
            group=self.group,
            seed=self.seed,
            note=item.note,
        )
        between: Literal["F32", "F64"] = "F64" if is_wide else "F32"
        merged = Merged(step, self.stage.out_dtype or self.stage.dtype or between, shape)
        return Made(item, Held(item.component, spec, merged), step, "merged", item.parts)

    def of_source(
        self, item: Item, source: Source, dtype: str, takes: tuple[Part, ...] | None = None
    ) -> Made:
        """Return a tensor that is read from any source, in the stage's dtype or else in this one.

        Args:
            item: Its name, and the parts that it is made of.
            dtype: As in a header.
            takes: Those of the parts that become part of it; all by default.
        """
        named = self.stage.out_dtype or self.stage.dtype
        out = named if named and is_float(dtype) else dtype
        spec = TensorSpec(_file_name(item), out, source.shape)
        wide = out == "F64" or _reads_float64(source)
        compute: Literal["F32", "F64"] = "F64" if wide else "F32"
        step = Step(
            action="merge",
            outputs=(Target(item.name, spec, -1, 0),),
            inputs=(source,),
            models=tuple(dict.fromkeys(part.model.label for part in item.parts))[:1]
            or ("generated",),
            method=Passthrough(),
            weights=(1.0,),
            compute=compute,
            group=self.group,
            seed=self.seed,
            note=item.note,
        )
        merged = Merged(step, named or compute, source.shape)
        held = Held(item.component, spec, merged)
        return Made(item, held, step, "merged", item.parts if takes is None else takes)

    def _copied(self, item: Item, part: Part) -> Made:
        """Return a copy whatever dtype the stage names; what is still in float32 takes it."""
        in_flight = _source(part).dtype != _held(part).spec.dtype and part.model.overlay is None
        return self._passed(item, part) if in_flight else self._as_it_is(item, part)

    def _passed(self, item: Item, part: Part) -> Made:
        """Return a copy, or a conversion where the stage names another dtype."""
        held, source = _held(part), _source(part)
        named = self.stage.out_dtype or self.stage.dtype
        as_it_is = named == source.dtype == held.spec.dtype
        if named is None or as_it_is or not is_float(held.spec.dtype):
            return self._as_it_is(item, part)
        return self._converted(item, part, named)

    def _as_it_is(self, item: Item, part: Part) -> Made:
        """Return a copy, or a conversion of what an adapter holds whole in another dtype."""
        held, source = _held(part), _source(part)
        if isinstance(source, Stored) and source.dtype != held.spec.dtype:
            return self._converted(item, part, held.spec.dtype)
        return self._copy(item, part, ())

    def _converted(self, item: Item, part: Part, dtype: str) -> Made:
        held, source = _held(part), _source(part)
        spec = replace(held.spec, name=_file_name(item), dtype=dtype)
        step = _through(self._copy_step(item, part, spec), source)
        merged = Merged(step, dtype, spec.shape)
        return Made(item, Held(item.component, spec, merged), step, "merged", (part,))

    def _agreeing(self, item: Item, dtypes: list[str]) -> Made:
        """Return a copy of an integer tensor that must be equal in all models."""
        refuse_arithmetic(item, dtypes)
        base = next((part for part in item.parts if part.is_base), item.parts[0])
        conflict = self.stage.on_conflict
        if conflict != "error":
            return self._copy(item, base if conflict == "base" else item.parts[0], ())
        others = tuple(part for part in item.parts if part is not item.parts[0])
        return self._copy(item, item.parts[0], others)

    def _copy(self, item: Item, part: Part, others: tuple[Part, ...]) -> Made:
        """Return a copy; what another stage computes keeps its dtype."""
        source = _source(part)
        spec = replace(_held(part).spec, name=_file_name(item))
        step = replace(
            self._copy_step(item, part, spec),
            agree=tuple(_source(other) for other in others),
            agree_models=tuple(other.model.label for other in others),
        )
        if not isinstance(source, Stored):
            step = _through(step, source)
        changed = part.model.overlay is not None and step.action == "merge"
        fate: Literal["merged", "copied"] = "merged" if changed else "copied"
        return Made(item, Held(item.component, spec, source), step, fate, (part, *others))

    def _copy_step(self, item: Item, part: Part, spec: TensorSpec) -> Step:
        return Step(
            action="copy",
            outputs=(Target(item.name, spec, -1, 0),),
            inputs=(_source(part),),
            models=(part.model.label,),
            group=self.group,
            note=item.note,
        )


def _is_extreme(method: MergeMethod) -> bool:
    """Return whether a parameter, or the ratio of two, may leave the range of float32."""
    for parameter in parameters(type(method)):
        found = getattr(method, parameter.field)
        for value in found if isinstance(found, PerModel) else (found,):
            if isinstance(value, float) and value and not 1e-15 <= abs(value) <= 1e15:
                return True
    return False


def _inputs(
    method: MergeMethod, base: Part | None, inputs: Sequence[Part]
) -> tuple[tuple[Source, ...], tuple[bool, ...]]:
    """Return the inputs, as differences from the base where adapters make them of it."""
    sources, deltas = [], []
    for part in inputs:
        change = None
        if base is not None and method.operates_on == "deltas":
            change = change_from(part.model, part.name, base.model, base.name)
        sources.append(_source(part) if change is None else change)
        deltas.append(change is not None)
    return tuple(sources), tuple(deltas)


def _through(step: Step, source: Source) -> Step:
    """Return a copy of what another stage computes: its own step where that is possible."""
    if isinstance(source, Merged) and not source_parts(source):
        inner = source.step
        same_name = inner.outputs[0].key == step.outputs[0].key  # noise and statistics go by it
        exact = source.dtype in (step.outputs[0].spec.dtype, inner.compute)  # no rounding between
        if same_name and exact:
            return replace(inner, outputs=step.outputs, note=step.note or inner.note)
    is_wide = step.outputs[0].spec.dtype == "F64" or _reads_float64(source)
    wide: Literal["F32", "F64"] = "F64" if is_wide else "F32"
    return replace(step, action="merge", method=Passthrough(), compute=wide, weights=(1.0,))


def _reads_float64(source: Source) -> bool:
    """Return whether a source, or a factor of what is added to it, is in float64."""
    return source.dtype == "F64" or any(_reads_float64(part) for part in source_parts(source))


def _held(part: Part) -> Held:
    return part.model.tensors[part.name]


def _source(part: Part) -> Source:
    return _held(part).source


def _file_name(item: Item) -> str:
    prefix = f"{item.component}/" if item.component else ""
    return item.name.removeprefix(prefix)
