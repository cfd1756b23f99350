"""Modules of adapters whose factors are computed: of factors, or of changes that are formed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from merge_kit.core.dtypes import promoted
from merge_kit.core.tensors import TensorSpec
from merge_kit.errors import CheckpointError, MismatchError
from merge_kit.methods.base import MergeMethod
from merge_kit.plan.adapters.factors import factor_pair, formed, scaled, upright
from merge_kit.plan.adapters.groups import Change
from merge_kit.plan.adapters.modules import Modules
from merge_kit.plan.adapters.terms import Combination, Term
from merge_kit.plan.models import full_name
from merge_kit.plan.sources import Generated, Merged, Source, of_file
from merge_kit.plan.steps import FLOAT64_MODELS
from merge_kit.plan.values import Fitted, Step, Target


@dataclass(frozen=True, slots=True)
class Ranked:
    """One adapter that a step makes, and the rank of its module."""

    one: Combination
    rank: int


class Compressor:
    """Makes the steps of modules whose method computes factors.

    Args:
        modules: Where the steps go.
        models: Labels of the adapters, entry by entry.
        seed: Of the stage.
        fitted: What a look at the weights found; None before that.
    """

    def __init__(
        self,
        modules: Modules,
        models: Sequence[str],
        seed: int,
        fitted: Sequence[Fitted] | None,
    ) -> None:
        self._modules, self._models, self._seed = modules, models, seed
        self._fitted = None if fitted is None else {one.key: one for one in fitted}

    def add(self, combinations: Sequence[Combination]) -> None:
        """Add a module for every adapter that is made in which it is computed.

        Raises:
            MismatchError: If the method cannot take such modules.
        """
        if not combinations:
            return
        first = combinations[0]
        if first.module.kind == "experts":
            raise MismatchError(
                f"{first.method.method_name} cannot combine experts that are stored together",
                where=first.module.name,
                hint="lora_concat can; or leave these adapters' experts out",
            )
        if first.method.works_on == "elements":
            for one in combinations:
                self._formed(one)
        else:
            self._factored(combinations)

    def _ranked(self, combinations: Sequence[Combination]) -> list[Ranked]:
        """Return the adapters with their ranks; those in which nothing changes are left out."""
        found = []
        for one in combinations:
            ranks = [term.change.update.rank for term in one.counting]
            rank = max(1, one.method.rank_bound(ranks, one.module.shape))
            if one.method.is_fitted() and self._fitted is not None:
                rank = self._rank_found(one)
            if rank:
                found.append(Ranked(one, rank))
            else:
                self._modules.unchanged.append((one.use.folder, one.module.name))
        return found

    def _rank_found(self, one: Combination) -> int:
        key = full_name(one.use.folder, self._modules.names(one).a)
        found = (self._fitted or {}).get(key)
        if found is None:
            problem = f"{key} was not there when the weights were looked at"
            raise CheckpointError(problem, hint="leave the adapters alone while they are read")
        return found.rank

    def _factored(self, combinations: Sequence[Combination]) -> None:
        made = self._ranked(combinations)
        if not made:
            return
        count = len(combinations[0].terms)
        used = [i for i in range(count) if any(r.one.terms[i].scale for r in made)]
        changes = [combinations[0].terms[i].change for i in used]
        aux: list[tuple[str, Source]] = []
        for i, change in enumerate(changes):
            a, b = factor_pair(change.update, splits=combinations[0].method.splits_scales())
            aux += [(f"a{i}", a), (f"b{i}", b)]
        method = made[0].one.method
        if not method.additive:
            method = method.of_entries([combinations[0].terms[i].entry for i in used])
        step = Step(
            action="merge",
            outputs=self._targets(made, changes),
            inputs=(),
            models=tuple(change.member.model.label for change in changes),
            method=method,
            weights=tuple(r.one.terms[i].coefficient for r in made for i in used),
            aux=tuple(aux),
            compute="F64",
            group=self._modules.number,
            seed=self._seed,
            shape=combinations[0].module.shape,
        )
        self._enter(step, made)

    def _formed(self, one: Combination) -> None:
        """Add a module whose changes are merged element by element, as those of full models."""
        made = self._ranked([one])
        if not made:
            return
        update, inner = one.module.first, one.method.elementwise()
        by_entry = {term.entry: term.change for term in one.terms}
        sources = [
            formed(by_entry[i].update)
            if i in by_entry
            else Generated("zeros", formed(update).shape)
            for i in range(len(self._models))
        ]
        merged = self._merged(one.module.weight, inner, sources)
        step = Step(
            action="merge",
            outputs=self._targets(made, [term.change for term in one.terms]),
            inputs=(upright(merged, update),),
            models=(" + ".join(self._models),),
            method=one.method,
            weights=(1.0,),
            compute="F64",
            group=self._modules.number,
            seed=self._seed,
            shape=one.module.shape,
        )
        self._enter(step, made)

    def _merged(self, name: str, inner: MergeMethod, sources: Sequence[Source]) -> Merged:
        """Return changes merged as if they were models minus a base, which is zeros."""
        shape = sources[0].shape
        wide = len(sources) + 1 > FLOAT64_MODELS
        step = Step(
            action="merge",
            outputs=(Target(name, TensorSpec(name, "F32", shape), -1, 0),),
            inputs=tuple(sources),
            models=tuple(self._models),
            method=inner,
            base=Generated("zeros", shape) if inner.needs_base or inner.takes_base else None,
            weights=tuple(getattr(inner, "weight", ()) or (1.0,) * len(sources)),
            compute="F64" if wide else "F32",
            group=self._modules.number,
            seed=self._seed,
            deltas=(True,) * len(sources),
        )
        return Merged(step, "F32", shape)

    def _targets(self, made: Sequence[Ranked], changes: Sequence[Change]) -> tuple[Target, ...]:
        first = made[0].one.module.first
        names = self._modules.names(made[0].one)
        dtypes = [spec.spec.dtype for c in changes for spec in (c.update.a, c.update.b)]
        dtype = self._modules.dtype or promoted(dtypes)
        a, b = first.a.spec.shape, first.b.spec.shape
        found = []
        for one in made:
            for name, shape in (
                (names.a, (one.rank, *a[1:])),
                (names.b, (b[0], one.rank, *b[2:])),
            ):
                key = full_name(one.one.use.folder, name)
                found.append(Target(key, TensorSpec(name, dtype, shape), -1, 0))
        return tuple(found)

    def _enter(self, step: Step, made: Sequence[Ranked]) -> None:
        modules, fitted = self._modules, made[0].one.method.is_fitted()
        modules.add(step)
        if fitted and self._fitted is None:
            modules.fits.append(step)
        for one in made:
            for term in one.one.counting:
                modules.ledger.update(term.change.member.model, term.change.update, copied=False)
            modules.note(one.one, one.rank, 1.0, fitted=fitted)
        for one in made:
            self._bias(one.one)
            modules.alpha(one.one, one.rank, 1.0, None)

    def _bias(self, one: Combination) -> None:
        names = self._modules.names(one)
        if one.use.folder not in self._modules.biased or one.method.works_on != "elements":
            self._modules.bias(one, names, one.counting, 1.0)
            return
        by_entry = {term.entry: term for term in one.terms}
        zeros = Generated("zeros", (one.module.shape[0],))
        sources = [
            _bias_of(by_entry[i]) or zeros if i in by_entry else zeros
            for i in range(len(self._models))
        ]
        merged = self._merged(f"{one.module.name}.bias", one.method.elementwise(), sources)
        label, dtype = " + ".join(self._models), one.module.first.b.spec.dtype
        step = self._modules.passed(one.use.folder, names.bias, merged, label, dtype=dtype)
        self._modules.add(step)


def _bias_of(term: Term) -> Source | None:
    update = term.change.update
    return None if update.bias is None else scaled(of_file(update.bias), update.scale)
