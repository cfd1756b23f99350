"""The tensors of a model at other sizes."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from merge_kit.architecture.axes import KINDS, Placed, place
from merge_kit.architecture.config import class_of
from merge_kit.architecture.ties import WITH_HEAD, embedding_for, is_tied
from merge_kit.core.dtypes import is_float
from merge_kit.errors import MergeKitError, MismatchError, PlanError
from merge_kit.plan.building.built import Site
from merge_kit.plan.building.pieces import copied, made_of, part_of
from merge_kit.plan.building.width_sources import Resizer
from merge_kit.plan.items import Part as ItemPart
from merge_kit.plan.models import Model
from merge_kit.plan.steps import Made
from merge_kit.recipe.values import ModelRef

_SHOWN = 5
_HEAD = "lm_head.weight"
_TIED = (
    "the tied head becomes a matrix of its own, since the weights of the final norm are part of it"
)


@dataclass
class Maker:
    """Makes the tensors of the result.

    Attributes:
        left_out: Why a tensor of the model is dropped.
    """

    site: Site
    ref: ModelRef
    model: Model
    resizer: Resizer
    left_out: dict[tuple[Model, str], str] = field(default_factory=dict)

    def tensors(self) -> list[Made]:
        """Return all tensors; what is wrong with them goes to the findings."""
        placed = self._placed()
        self._check_use(placed)
        self.site.findings.raise_any()
        unties = self._unties()
        made: list[Made] = []
        for name, one in placed.items():
            if unties and name == _HEAD:
                self.left_out[below(self.model), name] = "a tied head is its embedding"
                continue
            made.append(self._tensor(name, one))
        return [*made, self._head(placed)] if unties else made

    def _placed(self) -> dict[str, Placed]:
        placed, errors = {}, list[MergeKitError]()
        widths, model = self.resizer.widths, self.model
        for name, held in model.tensors.items():
            try:
                placed[name] = place(name, held.spec, widths.family, widths.old, model.tensors)
                self._check(name, placed[name])
            except MergeKitError as error:
                errors.append(error)
        for one in errors[:_SHOWN]:
            self.site.findings.problem(one)
        if len(errors) > _SHOWN:
            problem = f"{len(errors) - _SHOWN} more tensors do not fit either"
            hint = "is its config.json that of the weights?"
            self.site.findings.problem(MismatchError(problem, where=model.label, hint=hint))
        return placed

    def _check(self, name: str, placed: Placed) -> None:
        dtype = self.model.tensors[name].spec.dtype
        if self.resizer.changes(placed) and not is_float(dtype):
            problem = f"is {dtype}, and its size changes: expected floats"
            hint = "convert the model to bfloat16 first"
            raise MismatchError(problem, where=name, hint=hint)
        if self._folds(placed) and placed.after not in self.model.tensors:
            problem = f"follows the norm {placed.after}, which {self.model.label} has not"
            raise MismatchError(problem, where=name, hint="is the model complete?")

    def _check_use(self, placed: dict[str, Placed]) -> None:
        """Report sizes that no tensor has, and a final norm that nothing follows."""
        widths, kind = self.resizer.widths, KINDS[1]
        if kind in widths.changed() and not any(one.has(kind) for one in placed.values()):
            problem = f"no tensor of {self.model.label} has an {kind}"
            hint = "experts may have a moe_intermediate_size of their own, which stays"
            where = str(self.site.stage.mark)
            self.site.findings.problem(PlanError(problem, where=where, hint=hint))
        if self.resizer.basis is None:
            return
        headed = any(one.role == "head" for one in placed.values())
        kind_of_model = class_of(self.model.config)
        if not headed and kind_of_model and not kind_of_model.endswith(WITH_HEAD):
            problem = (
                f"{kind_of_model} has no head that the weights of its final norm could go into"
            )
            hint = "project the whole model, with its head"
            self.site.findings.problem(PlanError(problem, where=self.model.label, hint=hint))

    def _folds(self, placed: Placed) -> bool:
        """Return whether weights of a norm become part of a tensor."""
        return self.resizer.basis is not None and placed.after != ""

    def _tensor(self, name: str, placed: Placed) -> Made:
        held = self.model.tensors[name]
        part = part_of(self.model, name, self.ref)
        if not self.resizer.changes(placed):
            return copied(self.site, name, part, component=held.component)
        norm = None
        parts: tuple[ItemPart, ...] = (part,)
        if self._folds(placed):
            norm = self.model.tensors[placed.after].source
            parts = (part, part_of(self.model, placed.after, self.ref))
        source = self.resizer.source(held.source, placed, norm)
        if self.resizer.basis is not None and placed.role == "norm":
            parts = ()  # it is part of what follows it
        return made_of(self.site, name, source, held.spec.dtype, parts, component=held.component)

    def _unties(self) -> bool:
        """Return whether the embedding is the head, and must become another matrix."""
        config = self.model.config or {}
        stated = config.get("tie_word_embeddings") is True or _HEAD not in self.model.tensors
        labels = any(name.startswith("score.") for name in self.model.tensors)
        return self.resizer.basis is not None and is_tied(config) is True and stated and not labels

    def _head(self, placed: dict[str, Placed]) -> Made:
        """Return the head of a tied model."""
        name = embedding_for(_HEAD, self.model.specs)
        assert name is not None  # of which the basis was made, or which was placed
        norm = next(n for n in ("model.norm.weight", "norm.weight") if n in placed)
        held = self.model.tensors[name]
        embedding = replace(part_of(self.model, name, self.ref), stands_for=_HEAD)
        parts: tuple[ItemPart, ...] = (embedding, part_of(self.model, norm, self.ref))
        one = replace(placed[name], after=norm, role="head")
        source = self.resizer.source(held.source, one, self.model.tensors[norm].source)
        component = held.component
        dtype = held.spec.dtype
        return made_of(self.site, _HEAD, source, dtype, parts, component=component, note=_TIED)


def below(model: Model) -> Model:
    """Return a model without the adapters that are applied to it."""
    return model if model.overlay is None else model.overlay.under
