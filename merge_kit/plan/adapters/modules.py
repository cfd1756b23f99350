"""Modules of adapters as steps: what is kept, laid side by side, or computed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from math import inf, nextafter
from typing import Literal

from merge_kit.core.dtypes import promoted
from merge_kit.core.tensors import StoredTensor, TensorSpec
from merge_kit.errors import PlanError
from merge_kit.methods.passthrough import Passthrough
from merge_kit.plan.adapters.factors import halved, is_exact, scaled, stacked_a, stacked_b
from merge_kit.plan.adapters.ledger import Ledger
from merge_kit.plan.adapters.made import OutModule
from merge_kit.plan.adapters.names_out import TensorNames, module_names
from merge_kit.plan.adapters.styles import Form
from merge_kit.plan.adapters.terms import Combination, Term
from merge_kit.plan.models import full_name
from merge_kit.plan.sources import Generated, Source, Stored, Sum, of_file
from merge_kit.plan.values import ModuleRank, Step, Target
from merge_kit.recipe.values import Stage

Compute = Literal["F32", "F64"]

FLOAT32_MAX, FLOAT64_MAX = 2.0**127 * (2 - 2.0**-23), nextafter(inf, 0)
"""Alphas are tensors of float32 in some files, and numbers of JSON in others."""


@dataclass
class Modules:
    """The modules of the adapters of a stage, as they are made.

    Attributes:
        dtype: What the stage names, None for that of the factors.
        form: How scales are said.
        same: Folders of adapters that are one of the inputs, tensor by tensor.
        biased: Folders of the adapters whose modules all have a bias of b.
        out: By folder, in the order of the steps.
        unchanged: Folders and modules that are left out because nothing changes.
    """

    stage: Stage
    number: int
    ledger: Ledger
    biased: frozenset[str]
    form: Form
    same: frozenset[str]
    steps: list[Step] = field(default_factory=list)
    out: dict[str, list[OutModule]] = field(default_factory=dict)
    ranks: list[ModuleRank] = field(default_factory=list)
    fits: list[Step] = field(default_factory=list)
    unchanged: list[tuple[str, str]] = field(default_factory=list)

    @property
    def dtype(self) -> str | None:
        return self.stage.out_dtype or self.stage.dtype

    def names(self, one: Combination) -> TensorNames:
        """Return what the tensors of a module are called."""
        canonical = self.form == "config" and one.use.folder not in self.same
        return module_names(one.module, canonical=canonical)

    def keep(self, one: Combination) -> None:
        """Add a module that one adapter has, as it is."""
        change, folder = one.kept, one.use.folder
        assert change is not None  # the caller has asked
        update, names = change.update, self.names(one)
        self.ledger.update(change.member.model, update, copied=self.dtype is None)
        self._factors(one, names, [Term(change, 1.0, change.member.index)], (1.0,))
        if update.magnitude is not None:
            label = change.member.model.label
            self.add(self.passed(folder, names.magnitude, of_file(update.magnitude), label))
        self.bias(one, names, [Term(change, 1.0, change.member.index)], update.scale)
        self.alpha(one, update.rank, update.scale, update.alpha_tensor)
        self.note(one, update.rank, update.scale, magnitude=update.magnitude is not None)

    def nothing(self, one: Combination) -> None:
        """Add a module that changes nothing: the first a, and zeros for b."""
        change, folder, names = one.module.changes[0], one.use.folder, self.names(one)
        update, label = change.update, change.member.model.label
        self.ledger.enter("copied", change.member.model, [update.a])
        self.add(self.passed(folder, names.a, of_file(update.a), label))
        zeros = Generated("zeros", update.b.spec.shape)
        self.add(self.passed(folder, names.b, zeros, label, dtype=update.b.spec.dtype))
        self.bias(one, names, [], update.scale)
        self.alpha(one, update.rank, update.scale, update.alpha_tensor)
        self.note(one, update.rank, update.scale)

    def beside(self, one: Combination) -> None:
        """Add a module with the factors of its changes side by side.

        The scale is that of the term that counts most, whose factors stay as they are.
        """
        names, terms = self.names(one), one.counting
        rank = sum(term.change.update.rank for term in terms)
        check_alpha(one, rank, FLOAT32_MAX if self.form == "alphas" else FLOAT64_MAX)
        scale = 1.0 if self.form == "none" else max(abs(term.scale) for term in terms)
        self._factors(one, names, terms, [term.scale / scale for term in terms])
        self.bias(one, names, terms, scale)
        for term in terms:
            alone = len(terms) == 1 and term.scale == scale and self.dtype is None
            self.ledger.update(term.change.member.model, term.change.update, copied=alone)
        self.alpha(one, rank, scale, None)
        self.note(one, rank, scale)

    def _factors(
        self, one: Combination, names: TensorNames, terms: Sequence[Term], ratios: Sequence[float]
    ) -> None:
        updates = [term.change.update for term in terms]
        label, folder = labels(terms), one.use.folder
        a = promoted([update.a.spec.dtype for update in updates])
        b = promoted([update.b.spec.dtype for update in updates])
        # a product in float32 is rounded once more, which shows only where the output is as fine
        fine = (self.dtype or b) in ("F32", "F64") and not all(is_exact(r) for r in ratios)
        compute: Compute = "F64" if fine else "F32"
        split = "F16" in (self.dtype or a, self.dtype or b)
        pairs = [halved(r) if split and abs(r) < 1 else (1.0, r) for r in ratios]
        above = stacked_a(updates, [one for one, _ in pairs])
        self.add(self.passed(folder, names.a, above, label, dtype=a))
        beside = stacked_b(updates, [other for _, other in pairs])
        self.add(self.passed(folder, names.b, beside, label, dtype=b, compute=compute))

    def bias(
        self, one: Combination, names: TensorNames, terms: Sequence[Term], scale: float
    ) -> None:
        """Add the bias of b, if the adapter has biases: the sum, over the scale of the result."""
        folder, b = one.use.folder, one.module.first.b.spec
        if folder not in self.biased:
            return
        sources = [
            (term.scale / scale if scale else 1.0, of_file(term.change.update.bias))
            for term in terms
            if term.change.update.bias is not None
        ]
        label = labels(terms) if sources else one.module.changes[0].member.model.label
        if not sources:
            zeros = Generated("zeros", (b.shape[0],))
            self.add(self.passed(folder, names.bias, zeros, label, dtype=b.dtype))
            return
        alone = len(sources) == 1
        whole: Source = scaled(sources[0][1], sources[0][0]) if alone else Sum(tuple(sources))
        dtype = promoted([source.dtype for _, source in sources])
        step = self.passed(folder, names.bias, whole, label, dtype=dtype, compute="F64")
        self.add(step)

    def alpha(self, one: Combination, rank: int, scale: float, kept: StoredTensor | None) -> None:
        """Add the tensor that says the scale, where there is one."""
        folder, name = one.use.folder, self.names(one).alpha
        label = one.module.changes[0].member.model.label
        if self.form != "alphas":
            return
        if kept is not None:
            self.add(self.passed(folder, name, of_file(kept), label, is_number=True))
            return
        source = Generated("constant", (), scale=scale * rank)
        self.add(self.passed(folder, name, source, label, is_number=True))

    def note(
        self,
        one: Combination,
        rank: int,
        scale: float,
        *,
        fitted: bool = False,
        magnitude: bool = False,
    ) -> None:
        """Say what a module has become."""
        folder, name = one.use.folder, one.module.name
        biased = folder in self.biased
        kind = one.module.kind
        made = OutModule(folder, name, kind, rank, scale, biased, magnitude=magnitude)
        self.out.setdefault(folder, []).append(made)
        a = full_name(folder, self.names(one).a)
        self.ranks.append(ModuleRank(full_name(folder, name), rank, fitted, a))

    def add(self, step: Step) -> None:
        """Add a step."""
        self.steps.append(step)

    def passed(
        self,
        folder: str,
        name: str,
        source: Source,
        label: str,
        *,
        dtype: str | None = None,
        compute: Compute = "F32",
        is_number: bool = False,
    ) -> Step:
        """Return a step that writes a source: the bytes of a file as they are, if it is one.

        Args:
            dtype: Of the output, unless the stage names one.
            is_number: Whether it is a setting, whose dtype the stage does not choose.
        """
        out = source.dtype if is_number else self.dtype or dtype or source.dtype
        target = Target(full_name(folder, name), TensorSpec(name, out, source.shape), -1, 0)
        step = Step("copy", (target,), (source,), (label,), group=self.number)
        if isinstance(source, Stored) and source.dtype == out:
            return step
        wide: Compute = "F64" if "F64" in (out, source.dtype) else compute
        return Step(
            "merge",
            (target,),
            (source,),
            (label,),
            method=Passthrough(),
            weights=(1.0,),
            compute=wide,
            group=self.number,
        )


def check_alpha(one: Combination, rank: int, largest: float) -> None:
    """Check that the alpha of factors side by side can be written.

    Raises:
        PlanError: If it is larger than the file can say.
    """
    term = max(one.counting, key=lambda term: abs(term.scale))
    if abs(term.scale) * rank > largest:
        label, update = term.change.member.model.label, term.change.update
        raise PlanError(
            f"{label} has the scale {update.scale:g} (alpha {update.alpha:g}) and counts "
            f"{term.coefficient:g} times: with rank {rank} that is an alpha above {largest:.4g}, "
            "the largest that can be written",
            where=one.module.name,
            hint="give it a smaller weight, or look at its alpha",
        )


def labels(terms: Sequence[Term]) -> str:
    """Return what messages call the adapters of some terms together."""
    return " + ".join(term.change.member.model.label for term in terms)
