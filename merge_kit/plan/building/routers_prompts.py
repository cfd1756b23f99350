"""Prompts of a router, checked: everyone has some, and they tell the experts apart."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence

from merge_kit.errors import PlanError
from merge_kit.plan.building.built import Site
from merge_kit.plan.building.routers_tasks import MOST_BYTES, MOST_PROMPTS, PromptSet
from merge_kit.recipe.values import Mark, Prompts

Sets = tuple[tuple[PromptSet, ...], PromptSet | None]
"""Those of the experts, and that of the shared expert."""


def checked_prompts(
    site: Site, router: str, prompts: Sequence[Prompts | None], shared: Prompts | None
) -> Sets:
    """Return the prompts of each expert and of the shared one; what is wrong goes to the findings.

    Args:
        prompts: One an expert.
        shared: Those of the shared expert, which needs none.
    """
    named = zip(prompts, _names(site, prompts), strict=True)
    sets = tuple(_named(one, name) for one, name in named)
    own = _named(shared, "the shared expert") if shared is not None and shared.positive else None
    found = [
        *_missing(site, router, sets),
        *_alike(site, sets),
        *_unusable(site, sets if own is None else (*sets, own)),
    ]
    for problem in found:
        site.findings.problem(problem)
    if not found:
        _note_repeated(site, sets)
    return sets, own


def _named(prompts: Prompts | None, expert: str) -> PromptSet:
    if prompts is None:
        return PromptSet(expert, ())
    return PromptSet(expert, prompts.positive, prompts.negative)


def _names(site: Site, prompts: Sequence[Prompts | None]) -> list[str]:
    """Return what messages call the experts: several models take turns."""
    models = site.stage.models
    if not models:
        return [f"expert {i}" for i in range(len(prompts))]
    return [f"expert {i} ({models[i % len(models)].model.text})" for i in range(len(prompts))]


def _missing(site: Site, router: str, sets: Sequence[PromptSet]) -> Iterator[PlanError]:
    lacking = [one.expert for one in sets if not one.positive]
    if lacking:
        yield PlanError(
            f"router {router} needs prompts, and there are none for {_listed(lacking)}",
            where=str(_mark(site)),
            hint="give each model of the list positive_prompts: [...], or take router: random",
        )


def _alike(site: Site, sets: Sequence[PromptSet]) -> Iterator[PlanError]:
    if len(sets) > 1 and sets[0].positive and len({(s.positive, s.negative) for s in sets}) == 1:
        yield PlanError(
            "all experts have the same prompts, and a router of them could not tell them apart",
            where=str(_mark(site)),
            hint="give each expert prompts of what it is for, or take router: random",
        )


def _unusable(site: Site, sets: Sequence[PromptSet]) -> Iterator[PlanError]:
    where = str(_mark(site))
    count = sum(len(one.texts) for one in sets)
    if count > MOST_PROMPTS:
        problem = f"there are {count:,} prompts, expected at most {MOST_PROMPTS:,}"
        yield PlanError(problem, where=where, hint="a few dozen an expert are plenty")
    for one in sets:
        longest = max((len(text.encode(errors="replace")) for text in one.texts), default=0)
        if longest > MOST_BYTES:
            problem = f"a prompt of {one.expert} has {longest:,} bytes, expected at most"
            hint = "what a router is to learn fits in a few sentences"
            yield PlanError(f"{problem} {MOST_BYTES:,}", where=where, hint=hint)
        if one.positive and Counter(one.positive) == Counter(one.negative):
            problem = f"positive and negative prompts of {one.expert} are the same"
            yield PlanError(problem, where=where, hint="their difference is what a router goes by")


def _note_repeated(site: Site, sets: Sequence[PromptSet]) -> None:
    """Say which experts a router of these prompts cannot tell apart."""
    counts = Counter((one.positive, one.negative) for one in sets)
    for (positive, negative), count in counts.items():
        if count > 1:
            same = [s.expert for s in sets if (s.positive, s.negative) == (positive, negative)]
            site.findings.note(f"{_listed(same)} have the same prompts, and so the same router row")


def _mark(site: Site) -> Mark:
    return site.stage.mark


def _listed(names: Sequence[str]) -> str:
    shown = list(names[:8]) + ([f"{len(names) - 8} more"] if len(names) > 8 else [])
    return shown[0] if len(shown) == 1 else f"{', '.join(shown[:-1])} and {shown[-1]}"
