"""The steps that factor what a model has changed, and what must be looked at before them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import hypot
from typing import Literal

from merge_kit.architecture.stacks import find_stacks
from merge_kit.core.dtypes import is_float, promoted
from merge_kit.core.tensors import TensorSpec
from merge_kit.errors import MergeKitError
from merge_kit.methods.lora_extract import LoraExtract
from merge_kit.methods.passthrough import Passthrough
from merge_kit.plan.adapters.made import OutModule
from merge_kit.plan.applying.changes import alone
from merge_kit.plan.assemble import depth
from merge_kit.plan.evaluate import Evaluator
from merge_kit.plan.extracting.looks import compared, measured
from merge_kit.plan.extracting.names import is_expert
from merge_kit.plan.extracting.pairs import Pair, Pairs
from merge_kit.plan.extracting.rest import Rest, rest_of
from merge_kit.plan.filters import Filters
from merge_kit.plan.findings import Findings
from merge_kit.plan.items import Item, Part
from merge_kit.plan.models import Held
from merge_kit.plan.sources import Source, Stored, Transposed
from merge_kit.plan.values import Fitted, ModuleRank, Step, Target
from merge_kit.recipe.values import NO_PARAMETERS, Entry, Stage

_PREFIX = "base_model.model."


@dataclass(frozen=True, slots=True)
class _Look:
    """What is known of a pair: its rank (1 for what is not factored), 0 if it is not changed."""

    rank: int
    certain: bool


class Maker:
    """Makes the steps of an adapter, pair by pair.

    Args:
        entry: The model in the recipe.
        place: Seed and number of the stage.
        known: What a look at the weights found, by key; None before that.

    Attributes:
        steps: Of the factors.
        fits: What must be looked at.
        norms: Of the changes of tensors that are dropped, as far as a look has found them.
    """

    def __init__(
        self,
        stage: Stage,
        entry: Entry,
        pairs: Pairs,
        place: tuple[int, int],
        known: Mapping[str, Fitted] | None,
    ) -> None:
        self._stage, self._entry, self._pairs = stage, entry, pairs
        self._seed, self._number = place
        self._found = known or {}
        self._is_fitted = known is not None
        self._labels = (pairs.base.label, pairs.tuned.label)
        self._evaluator = Evaluator()
        self.filters = Filters()
        self._stacks = find_stacks(pairs.base.tensors)
        self._others: list[tuple[Pair, _Look]] = []
        self._choices: dict[str, str] = {}
        self.steps: list[Step] = []
        self.fits: list[Step] = []
        self.ranks: list[ModuleRank] = []
        self.modules: list[OutModule] = []
        self.norms: dict[str, float] = {}

    def look(self, findings: Findings) -> None:
        """Take in all pairs: their factors, or what is known of them.

        Args:
            findings: Where parameters that are missing or wrong go.
        """
        ranks: list[tuple[Pair, LoraExtract, int]] = []
        levels = (self._entry.parameters, self._stage.parameters)
        for pair in self._pairs.pairs:
            self.filters.see(levels, [pair.name])
            if pair.known == "equal" and not (pair.kind and is_expert(pair.module)):
                continue
            try:
                method = self._method(pair)
            except MergeKitError as error:
                findings.problem(error)
                continue
            if pair.kind is None:
                self._choices[pair.name] = method.rest
                self._others.append((pair, self._of_other(pair, method)))
            elif pair.known != "different":  # of another shape: that is a problem already
                rank = self._rank(pair, method, method.rank_bound((), pair.matrix))
                ranks.append((pair, method, rank))
        of_experts = max((rank for pair, _, rank in ranks if is_expert(pair.module)), default=0)
        for pair, method, rank in ranks:
            self._add(pair, method, of_experts if is_expert(pair.module) else rank)

    def _add(self, pair: Pair, method: LoraExtract, rank: int) -> None:
        """Add the factors of a matrix that is changed."""
        if rank and pair.kind is not None:
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
                Part(self._entry, self._pairs.tuned, pair.name, is_base=False),
                Part(base, self._pairs.base, pair.name, is_base=True),
            ),
            levels=(self._entry.parameters, stage.parameters),
            t=depth(pair.name, self._stacks),
            method=stage.merge_method,
            mark=stage.mark,
        )
        method, _, _ = self._evaluator.method(item)
        assert isinstance(method, LoraExtract)  # the stage was told by that
        return method

    def _rank(self, pair: Pair, method: LoraExtract, bound: int) -> int:
        """Return the rank of a matrix, the largest that it can have before it is looked at."""
        if pair.known == "equal":
            return 0
        if not self._is_fitted:
            look = (
                self._factors(pair, method, bound)
                if method.energy
                else compared(pair, self._labels, self._number)
            )
            self.fits.append(look)
            return bound
        if method.energy:
            return self._found[_a(pair)].rank
        return bound if self._found[pair.module].rank else 0

    def _of_other(self, pair: Pair, method: LoraExtract) -> _Look:
        """Return what is known of a tensor that is not factored."""
        if pair.known == "different":
            return _Look(1, certain=True)
        place = self._labels, self._number
        drops = method.rest == "drop" and is_float(_held(pair).spec.dtype)
        looks = measured(pair, *place) if drops else (compared(pair, *place),)
        if not self._is_fitted:
            self.fits += looks
            return _Look(1, certain=False)
        found = [self._found[look.outputs[0].key] for look in looks]
        if drops:
            self.norms[pair.name] = hypot(*(one.norm for one in found))
        return _Look(max(one.rank for one in found), certain=True)

    def rest(self, findings: Findings) -> Rest:
        """Return what becomes of what is not factored; what is certainly wrong is a problem."""
        factored = frozenset(one.module for one in self.modules)
        models = (self._pairs.base, self._pairs.tuned)
        certain = [pair for pair, look in self._others if look.rank and look.certain]
        for error in rest_of(self._pairs.pairs, certain, self._choices, factored, models).errors:
            findings.problem(error)
        changed = [pair for pair, look in self._others if look.rank]
        return rest_of(self._pairs.pairs, changed, self._choices, factored, models)

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


def _held(pair: Pair) -> Held:
    assert pair.tuned is not None  # what the model lacks is not looked at
    return pair.tuned


def _a(pair: Pair) -> str:
    return f"{_PREFIX}{pair.module}.lora_A.weight"


def _b(pair: Pair) -> str:
    return f"{_PREFIX}{pair.module}.lora_B.weight"


def _laid(source: Source, pair: Pair) -> Source:
    """Return a weight with its outputs first."""
    return Transposed(source) if pair.turned else source
