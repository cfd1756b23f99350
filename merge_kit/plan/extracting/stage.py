"""The stage that makes an adapter of the difference between two models."""

from __future__ import annotations

from collections.abc import Sequence

from merge_kit.architecture.quantised import quantisation_problem
from merge_kit.errors import MismatchError, PlanError
from merge_kit.plan.adapters.made import AdapterPlan
from merge_kit.plan.extracting.files import fates, files, notes
from merge_kit.plan.extracting.pairs import Pairs
from merge_kit.plan.extracting.steps import Maker
from merge_kit.plan.findings import Findings
from merge_kit.plan.inputs import Inputs
from merge_kit.plan.models import Model, Part
from merge_kit.plan.steps import seed_of
from merge_kit.plan.values import Fitted
from merge_kit.recipe.values import Entry, Stage


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
    entry = _the_one(stage)
    assert stage.base_model is not None  # checked
    base, tuned = inputs.find(stage.base_model), inputs.find(entry.model)
    _check_models(stage, base, tuned, findings)
    findings.raise_any()
    pairs = Pairs(base, tuned)
    for error in pairs.errors:
        findings.problem(error)
    known = None if fitted is None else {one.key: one for one in fitted}
    maker = Maker(stage, entry, pairs, (seed_of(stage.name, seed), number), known)
    maker.look(findings)
    findings.raise_any()
    rest = maker.rest(findings)
    findings.raise_any()
    for note in maker.filters.notes():
        findings.note(note)
    if not maker.modules and not rest.whole:
        raise _nothing(stage, base, tuned, left_out=bool(rest.dropped))
    steps = (*maker.steps, *(maker.whole(name, held) for name, held in rest.whole.items()))
    factored = frozenset(one.module for one in maker.modules)
    return AdapterPlan(
        steps=steps,
        parts=(Part("", "adapter_model", None),),
        files=files(stage, inputs, pairs, maker.modules, rest),
        fits=tuple(maker.fits) if fitted is None else (),
        ranks=tuple(maker.ranks),
        fates=fates(inputs.models, pairs, factored, rest),
        modules=tuple(maker.modules),
        notes=notes(stage, pairs, rest, maker.norms),
    )


def _the_one(stage: Stage) -> Entry:
    """Return the model that an adapter is made of.

    Raises:
        PlanError: If there is no base, not one model, or another form than models.
    """
    entries = [entry for entry in stage.models if entry.model != stage.base_model]
    if stage.base_model is None:
        problem = f"{stage.merge_method} needs a base_model"
    elif odd := _odd_keys(stage):
        problem = f"{stage.merge_method} takes models, and no {odd}"
    elif len(stage.models) == 1 and not entries:
        problem = f"the model is its own base: {stage.base_model.text}"
    elif len(entries) != 1:
        problem = f"{stage.merge_method} takes 1 model beside the base, found {len(entries)}"
    else:
        return entries[0]
    hint = "name the base under base_model, and one model under models"
    raise PlanError(problem, where=str(stage.mark), hint=hint)


def _odd_keys(stage: Stage) -> str:
    """Return the first key that makes no sense here, "" if there is none."""
    keys = {
        "slices": stage.slices,
        "modules": stage.modules,
        "tensors": stage.tensors,
        "uses": stage.uses,
        "tokenizer_source": stage.tokenizer,
    }
    return next((key for key, value in keys.items() if value), "")


def _nothing(stage: Stage, base: Model, tuned: Model, *, left_out: bool) -> PlanError:
    problem, hint = "are equal in every tensor: there is no adapter", "name another model"
    if left_out:
        problem, hint = "differ only in what is left out", "rest: save stores what can be whole"
    return PlanError(f"{tuned.label} and {base.label} {problem}", where=str(stage.mark), hint=hint)


def _check_models(stage: Stage, base: Model, tuned: Model, findings: Findings) -> None:
    for model in (base, tuned):
        folders = sorted({held.component for held in model.tensors.values()})
        if "" not in folders:
            findings.problem(
                PlanError(
                    f"{model.label} has components: {', '.join(folders)}",
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
