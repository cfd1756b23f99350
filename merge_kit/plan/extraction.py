"""The stage that makes an adapter of the difference between two models."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from merge_kit.architecture.quantised import quantisation_problem
from merge_kit.architecture.stacks import find_stacks
from merge_kit.core.dtypes import promoted
from merge_kit.core.tensors import TensorSpec
from merge_kit.errors import MismatchError, PlanError
from merge_kit.methods.lora_extract import LoraExtract
from merge_kit.methods.passthrough import Passthrough
from merge_kit.plan.adapter_made import AdapterPlan, OutModule
from merge_kit.plan.assemble import depth
from merge_kit.plan.changes import alone
from merge_kit.plan.evaluate import Evaluator
from merge_kit.plan.extraction_files import fates, files, notes
from merge_kit.plan.extraction_pairs import Pair, Pairs
from merge_kit.plan.extraction_rest import Rest, rest_of
from merge_kit.plan.findings import Findings
from merge_kit.plan.inputs import Inputs
from merge_kit.plan.items import Item, Part
from merge_kit.plan.models import Held, Model
from merge_kit.plan.models import Part as ModelPart
from merge_kit.plan.sources import Source, Stored, Transposed, View
from merge_kit.plan.steps import seed_of
from merge_kit.plan.values import Fitted, ModuleRank, Step, Target
from merge_kit.recipe.values import NO_PARAMETERS, Entry, Stage

_PREFIX = "base_model.model."


def extraction(
    stage: Stage,
    inputs: Inputs,
    findings: Findings,
    *,
    seed: int,
    number: int,
    fitted: Sequence[Fitted] | None,
) -> AdapterPlan:
    """Return what a stage does that makes an adapter of a model and its base.

    Args:
        seed: Of the run.
        number: Of the stage.
        fitted: What a look at the weights found; None before that.

    Raises:
        MergeKitError: Whatever is wrong, all of it in one list.
    """
    _check_form(stage)
    assert stage.base_model is not None  # checked
    base, tuned = inputs.find(stage.base_model), inputs.find(stage.models[0].model)
    _check_models(stage, base, tuned, findings)
    findings.raise_any()
    pairs = Pairs(base, tuned)
    for error in pairs.errors:
        findings.problem(error)
    findings.raise_any()
    known = None if fitted is None else {one.key: one for one in fitted}
    maker = _Maker(stage, pairs, seed_of(stage.name, seed), number, known)
    for pair in pairs.pairs:
        maker.look(pair)
    rest = maker.rest(findings)
    findings.raise_any()
    if not maker.modules and not rest.whole:
        raise PlanError(
            f"{tuned.label} and {base.label} are equal in every tensor: there is no adapter",
            where=str(stage.mark),
            hint="rest: drop left out what differs" if rest.dropped else "name another model",
        )
    steps = (*maker.steps, *(maker.whole(name, held) for name, held in rest.whole.items()))
    factored = frozenset(one.module for one in maker.modules)
    return AdapterPlan(
        steps=steps,
        parts=(ModelPart("", "adapter_model", None),),
        files=files(stage, inputs, pairs, maker.modules, rest),
        fits=tuple(maker.fits) if fitted is None else (),
        ranks=tuple(maker.ranks),
        fates=fates(inputs.models, pairs, factored, rest),
        modules=tuple(maker.modules),
        notes=notes(stage, pairs, rest),
    )


def _check_form(stage: Stage) -> None:
    """Refuse what is no pair of a base and a model.

    Raises:
        PlanError: If there is no base, not one model, or another form than models.
    """
    hint = "name the base under base_model, and one model under models"
    if stage.base_model is None:
        problem = f"{stage.merge_method} needs a base_model"
    elif len(stage.models) != 1 or stage.models[0].model == stage.base_model:
        found = len([e for e in stage.models if e.model != stage.base_model])
        problem = f"{stage.merge_method} takes 1 model beside the base, found {found}"
    elif stage.slices or stage.modules or stage.tensors:
        problem = f"{stage.merge_method} takes models, and no slices, modules or rules over tensors"
    else:
        return
    raise PlanError(problem, where=str(stage.mark), hint=hint)


def _check_models(stage: Stage, base: Model, tuned: Model, findings: Findings) -> None:
    for model in (base, tuned):
        folders = sorted({held.component for held in model.tensors.values()})
        if len(folders) > 1:
            findings.problem(
                PlanError(
                    f"{model.label} has several components: {', '.join(f or '.' for f in folders)}",
                    where=str(stage.mark),
                    hint="name the folder of one of them, in the model and in its base",
                )
            )
        dtypes = {spec.dtype for spec in model.specs.values()}
        problem = quantisation_problem(model.config or {}, dtypes)
        if problem is not None:
            hint = "name the model that it was made from"
            findings.problem(MismatchError(problem, where=model.label, hint=hint))
        if model.adapter is not None:
            findings.problem(
                PlanError(
                    f"{model.label} is an adapter already",
                    where=str(stage.mark),
                    hint="write base+adapter to extract from a model with it, or lora_svd to "
                    "lower its rank",
                )
            )


@dataclass(frozen=True, slots=True)
class _Look:
    """What is known of a pair: its rank (1 for what is not factored), 0 if it is not changed."""

    rank: int
    certain: bool


class _Maker:
    """Makes the steps of an adapter."""

    def __init__(
        self, stage: Stage, pairs: Pairs, seed: int, number: int, known: dict[str, Fitted] | None
    ) -> None:
        self._stage, self._pairs, self._seed, self._number = stage, pairs, seed, number
        self.found = known or {}
        self._is_fitted = known is not None
        self._evaluator = Evaluator()
        self._stacks = find_stacks(pairs.base.tensors)
        self._others: list[tuple[Pair, _Look]] = []
        self._choices: dict[str, str] = {}
        self.steps: list[Step] = []
        self.fits: list[Step] = []
        self.ranks: list[ModuleRank] = []
        self.modules: list[OutModule] = []

    def look(self, pair: Pair) -> None:
        """Take in a pair: its factors, or what is known of it."""
        if pair.known == "equal":
            return
        method = self._method(pair)
        if pair.kind is None:
            self._choices[pair.name] = method.rest
            self._others.append((pair, self._of_other(pair)))
            return
        bound = method.rank_bound((), pair.matrix)
        rank = self._rank(pair, method, bound)
        if rank:
            self.steps.append(self._factors(pair, method, rank))
            self.modules.append(OutModule("", pair.module, pair.kind, rank, 1.0))
            self.ranks.append(ModuleRank(pair.module, rank, method.energy is not None, _a(pair)))

    def _method(self, pair: Pair) -> LoraExtract:
        """Return the method with its parameters for a pair.

        Raises:
            MergeKitError: If a parameter is missing or wrong.
        """
        stage = self._stage
        assert stage.base_model is not None  # checked
        base = Entry(stage.base_model, NO_PARAMETERS, stage.base_model.mark)
        item = Item(
            name=pair.name,
            component="",
            parts=(
                Part(stage.models[0], self._pairs.tuned, pair.name, is_base=False),
                Part(base, self._pairs.base, pair.name, is_base=True),
            ),
            levels=(stage.models[0].parameters, stage.parameters),
            t=depth(pair.name, self._stacks),
            method=stage.merge_method,
            mark=stage.mark,
        )
        method, _, _ = self._evaluator.method(item)
        assert isinstance(method, LoraExtract)  # the stage was told by that
        return method

    def _rank(self, pair: Pair, method: LoraExtract, bound: int) -> int:
        """Return the rank of a matrix, the largest that it can have before it is looked at."""
        if not self._is_fitted:
            look = self._factors(pair, method, bound) if method.energy else self._compared(pair)
            self.fits.append(look)
            return bound
        if method.energy:
            return self.found[_a(pair)].rank
        return bound if self.found[pair.module].rank else 0

    def _of_other(self, pair: Pair) -> _Look:
        """Return what is known of a tensor that is not factored."""
        if pair.known == "different":
            return _Look(1, certain=True)
        if self._is_fitted:
            return _Look(self.found[pair.name].rank, certain=True)
        self.fits.append(self._compared(pair))
        return _Look(1, certain=False)

    def rest(self, findings: Findings) -> Rest:
        """Return what becomes of what is not factored; what is certainly wrong is a problem."""
        factored = frozenset(one.module for one in self.modules)
        models = (self._pairs.base, self._pairs.tuned)
        certain = [pair for pair, look in self._others if look.rank and look.certain]
        for error in rest_of(self._pairs.pairs, certain, self._choices, factored, models).errors:
            findings.problem(error)
        changed = [pair for pair, look in self._others if look.rank]
        return rest_of(self._pairs.pairs, changed, self._choices, factored, models)

    def _compared(self, pair: Pair) -> Step:
        """Return a look at whether two tensors are equal."""
        base, tuned = pair.base, pair.tuned
        assert base is not None  # known is unknown
        assert tuned is not None
        source, kinds = base.source, (base.source.dtype, tuned.source.dtype)
        if kinds[0] != kinds[1]:
            source = View(source, 0, source.shape)  # as numbers, not as bytes
        return Step(
            action="copy",
            outputs=(Target(pair.module if pair.kind else pair.name, tuned.spec, -1, 0),),
            inputs=(tuned.source,),
            models=(self._pairs.tuned.label,),
            base=source,
            compute="F64" if "F64" in kinds else "F32",
            group=self._number,
        )

    def _factors(self, pair: Pair, method: LoraExtract, rank: int) -> Step:
        base, tuned = pair.base, pair.tuned
        assert base is not None  # known is unknown
        assert tuned is not None
        change = self._change(pair)
        dtype = self._stage.out_dtype or self._stage.dtype
        dtype = dtype or promoted([base.spec.dtype, tuned.spec.dtype])
        kinds = (dtype, base.source.dtype, tuned.source.dtype)
        rows, columns = pair.matrix
        into = tuned.spec.shape[1:] if pair.kind == "convolution" else (columns,)
        ones = (1,) * (len(into) - 1)
        return Step(
            action="merge",
            outputs=(
                _target(_a(pair), dtype, (rank, *into)),
                _target(_b(pair), dtype, (rows, rank, *ones)),
            ),
            inputs=(_laid(tuned.source if change is None else change, pair),),
            models=(self._pairs.tuned.label,),
            method=method,
            base=_laid(base.source, pair) if change is None else None,
            weights=(1.0,),
            compute="F64" if "F64" in kinds else "F32",
            group=self._number,
            seed=self._seed,
            deltas=() if change is None else (True,),
            shape=(rows, columns),
        )

    def _change(self, pair: Pair) -> Source | None:
        """Return the difference of a base and the same with adapters, None if it is no such."""
        tuned = pair.tuned
        assert tuned is not None
        overlay = self._pairs.tuned.overlay
        changed = None if overlay is None else overlay.changed.get(pair.theirs)
        if changed is None or pair.base is None or changed.under != pair.base.source:
            return None
        return alone(changed.changes, tuned.spec.shape)

    def whole(self, name: str, held: Held) -> Step:
        """Return a step that stores a tensor as the model has it."""
        spec, source = held.spec, held.source
        step = Step(
            action="copy",
            outputs=(_target(name, spec.dtype, spec.shape),),
            inputs=(source,),
            models=(self._pairs.tuned.label,),
            group=self._number,
        )
        if isinstance(source, Stored):
            return step
        wide: Literal["F32", "F64"] = "F64" if "F64" in (source.dtype, spec.dtype) else "F32"
        return replace(step, action="merge", method=Passthrough(), compute=wide, weights=(1.0,))


def _target(name: str, dtype: str, shape: tuple[int, ...]) -> Target:
    return Target(name, TensorSpec(name, dtype, shape), -1, 0)


def _a(pair: Pair) -> str:
    return f"{_PREFIX}{pair.module}.lora_A.weight"


def _b(pair: Pair) -> str:
    return f"{_PREFIX}{pair.module}.lora_B.weight"


def _laid(source: Source, pair: Pair) -> Source:
    """Return a weight with its outputs first."""
    return Transposed(source) if pair.turned else source
