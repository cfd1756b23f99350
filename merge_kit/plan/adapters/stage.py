"""The stage that makes adapters of adapters."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from merge_kit.errors import MergeKitError, ParameterError, RecipeError
from merge_kit.plan.adapters.bases import check_bases
from merge_kit.plan.adapters.compress import Compressor
from merge_kit.plan.adapters.files import (
    config_file,
    config_problems,
    same_config,
    tokenizer_files,
)
from merge_kit.plan.adapters.groups import Member, groups, members, problems
from merge_kit.plan.adapters.ledger import Ledger
from merge_kit.plan.adapters.made import AdapterPlan
from merge_kit.plan.adapters.modules import Modules
from merge_kit.plan.adapters.names_out import common_style
from merge_kit.plan.adapters.prefixes import with_one_prefix
from merge_kit.plan.adapters.results import Result, first_biased, refused_keys, result_of, unfit
from merge_kit.plan.adapters.saved import Whole
from merge_kit.plan.adapters.styles import METADATA, form_of, metadata_text, stem_of
from merge_kit.plan.adapters.terms import Combination, Terms, uses
from merge_kit.plan.findings import Findings
from merge_kit.plan.inputs import Inputs
from merge_kit.plan.models import Part
from merge_kit.plan.steps import seed_of
from merge_kit.plan.values import Fitted, SideFile
from merge_kit.recipe.values import Stage


def adapter_stage(
    stage: Stage,
    inputs: Inputs,
    findings: Findings,
    *,
    seed: int,
    number: int,
    fitted: Sequence[Fitted] | None,
) -> AdapterPlan:
    """Return what a stage does that combines adapters.

    Args:
        seed: Of the run.
        number: Of the stage.
        fitted: What a look at the weights found; None before that.

    Raises:
        MergeKitError: Whatever is wrong, all of it in one list.
    """
    listed, errors = members(stage, inputs)
    for error in (*refused_keys(stage), *errors):
        findings.problem(error)
    findings.raise_any()
    listed = with_one_prefix(listed, findings)
    every = groups(listed)
    for error in (*problems(every), *config_problems(listed)):
        findings.problem(error)
    check_bases(listed, findings)
    findings.raise_any()
    form = form_of(common_style(listed), listed)
    terms = Terms(stage, inputs, every)
    made = [result_of(use, listed, every, terms) for use in uses(stage)]
    for one in made:
        for error in unfit(one):
            findings.problem(error)
    findings.raise_any()
    labels = [inputs.find(entry.model).label for entry in stage.models]
    biased = frozenset(one.use.folder for one in made if first_biased(one) is not None)
    same = frozenset(one.use.folder for one in made if one.same_as is not None)
    modules = Modules(stage, number, Ledger(), biased, form, same)
    compressor = Compressor(modules, labels, seed_of(stage.name, seed), fitted)
    _add_modules(modules, compressor, made, findings)
    files, metadata = _files(modules, made, terms, findings)
    findings.raise_any()
    _left_out(modules, listed)
    for note in terms.filters.notes():
        findings.note(note)
    return AdapterPlan(
        steps=tuple(modules.steps),
        parts=tuple(Part(one.use.folder, stem_of(form), None) for one in made),
        files=tuple(files),
        fits=tuple(modules.fits),
        ranks=tuple(modules.ranks),
        fates=modules.ledger.fates(inputs.models),
        modules=tuple(one for own in modules.out.values() for one in own),
        notes=(*_notes(modules), *_capped(modules, made)),
        metadata=metadata,
    )


def _add_modules(
    modules: Modules, compressor: Compressor, made: Sequence[Result], findings: Findings
) -> None:
    """Add every module of every adapter that is made."""
    by_module: dict[str, list[Combination]] = {}
    for one in made:
        for combination in one.combinations:
            by_module.setdefault(combination.module.name, []).append(combination)
    for combinations in by_module.values():
        try:
            _module(modules, compressor, combinations)
        except ParameterError as error:
            where = f"{modules.stage.mark}: {combinations[0].module.name}"
            findings.problem(RecipeError(error.problem, where=where, hint=error.hint))
        except MergeKitError as error:
            findings.problem(error)
    _fill(modules, made)


def _files(
    modules: Modules, made: Sequence[Result], terms: Terms, findings: Findings
) -> tuple[list[SideFile], dict[str, Mapping[str, str]]]:
    """Add what adapters hold whole; return the files beside them, and what is said inside them."""
    files: list[SideFile] = []
    metadata: dict[str, Mapping[str, str]] = {}
    for one in made:
        whole = _whole(one, modules, terms, findings)
        if modules.form == "config":
            files.append(_config(one, modules, whole))
        elif modules.form == "metadata":
            metadata[one.use.folder] = {METADATA: _metadata(one, modules)}
        files += tokenizer_files(one.use.folder, one.members[0])
    return files, metadata


def _module(modules: Modules, compressor: Compressor, combinations: Sequence[Combination]) -> None:
    """Add one module of every adapter that is made and has it."""
    computed = []
    for one in combinations:
        if one.kept is not None:
            modules.keep(one)
        elif not one.counting:
            modules.nothing(one)
        elif _is_laid_out(one):
            modules.beside(one)
        else:
            computed.append(one)
    compressor.add(computed)


def _is_laid_out(one: Combination) -> bool:
    """Return whether factors are laid side by side: experts too, where that is what is asked."""
    method = one.method
    exact = method.method_name == "lora_linear" and getattr(method, "variant", "") == "exact"
    return method.works_on == "concatenation" or (exact and one.module.kind == "experts")


def _whole(made: Result, modules: Modules, terms: Terms, findings: Findings) -> Whole:
    """Add what an adapter holds whole."""
    folder, use = made.use.folder, made.use
    changed = frozenset(one.module for one in modules.out.get(folder, ()))
    method = made.combinations[0].method if made.combinations else terms.method("", use)
    whole = Whole(modules, folder, method, changed)
    whole.add(made.members, lambda member, tensor: terms.weight(member, tensor, use))
    for error in whole.errors:
        findings.problem(error)
    return whole


def _config(made: Result, modules: Modules, whole: Whole) -> SideFile:
    folder = made.use.folder
    if made.same_as is not None:
        return same_config(folder, made.same_as)
    return config_file(
        folder,
        made.members,
        modules.out.get(folder, []),
        tokens=whole.tokens,
        biases=whole.biases,
        left_out=bool(modules.unchanged),
    )


def _metadata(made: Result, modules: Modules) -> str:
    same = made.same_as
    if same is not None and same.adapter.config_text is not None:
        return same.adapter.config_text
    return metadata_text(made.members[0], modules.out.get(made.use.folder, []))


def _fill(modules: Modules, made: Sequence[Result]) -> None:
    """Give an adapter its modules, with zeros, where a look at the weights has left none."""
    for one in made:
        if one.use.folder not in modules.out:
            for combination in one.combinations:
                modules.nothing(combination)


def _left_out(modules: Modules, listed: Sequence[Member]) -> None:
    """Say why tensors are no part of any adapter that is made."""
    unchanged = {module for _, module in modules.unchanged}
    for member in listed:
        for update in member.adapter.updates:
            is_unchanged = member.renamed(update.module) in unchanged
            why = "not changed" if is_unchanged else "its weight is 0"
            modules.ledger.enter("dropped", member.model, update.stored, why)
        held = [one.stored for one in member.adapter.saved]
        held += [one.stored for one in member.adapter.rows]
        modules.ledger.enter("dropped", member.model, held, "its weight is 0")


def _notes(modules: Modules) -> tuple[str, ...]:
    experts = any(one.kind == "experts" for own in modules.out.values() for one in own)
    if experts and modules.stage.merge_method == "lora_linear":
        return ("experts are laid side by side, as by lora_concat: their ranks add up",)
    return ()


def _capped(modules: Modules, made: Sequence[Result]) -> tuple[str, ...]:
    """Say where a rank is asked for that changes of such ranks cannot have."""
    asked = {
        (one.use.folder, c.module.name): getattr(c.method, "rank", None)
        for one in made
        for c in one.combinations
    }
    less = [
        one
        for own in modules.out.values()
        for one in own
        if one.rank < (asked.get((one.folder, one.module)) or 0)
    ]
    if not less:
        return ()
    ranks = sorted({one.rank for one in less})
    shown = f"{ranks[0]}" if len(ranks) == 1 else f"{ranks[0]} to {ranks[-1]}"
    count = f"{len(less):,} module" + "s" * (len(less) != 1)
    return (f"the rank of {count} is {shown}, less than asked for: their changes have no more",)
