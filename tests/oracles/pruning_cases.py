"""Task vectors that are pruned and voted on: parameters and oracles."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache

import numpy as np

from tests.oracles import pruned
from tests.oracles.case import SIGNED, Case
from tests.oracles.inputs import WEIGHTS, Inputs, Oracle
from tests.oracles.pruned import Vote
from tests.oracles.values import DOUBT, Array, Mask, Wanted, added
from tests.toys import merge

DENSITIES = (0.3, 0.55, 0.1, 0.9, 0.25, 0.7, 0.5, 0.4)
Masks = dict[str, list[Array]]
"""By tensor, one a model: 0 where an element is pruned, else what it is multiplied by."""


def dense(weights: Sequence[float], **more: object) -> Callable[[int], dict[str, object]]:
    """Return the parameters of each model: its weight, its density, and others."""
    return lambda i: {"weight": weights[i], "density": DENSITIES[i], **more}


def pruning(
    scales: Callable[[Inputs], Masks],
    weights: Sequence[float],
    factor: float,
    vote: Vote,
    *,
    exact: bool = True,
) -> Oracle:
    """Return the oracle of what is pruned, voted on and added; `exact` if scales are 0 and 1."""

    def of_all(inputs: Inputs) -> dict[str, Wanted]:
        found, by_name = {}, scales(inputs)
        used = weights[: len(inputs.models)]
        for name in inputs.names:
            base, models = inputs.exact(name)
            cast = replace(vote, doubt=inputs.doubt(name) if exact else vote.doubt)
            found[name] = pruned.combined(base, models, by_name[name], used, factor, cast)
        return found

    return of_all


def deltas(inputs: Inputs, name: str) -> list[Array]:
    base, models = inputs.exact(name)
    return [m - base for m in models]


def trimmed(inputs: Inputs) -> Masks:
    """Trim each tensor by itself."""
    return {
        name: [
            pruned.largest([d], density)[0].astype(float)
            for d, density in zip(deltas(inputs, name), DENSITIES, strict=False)
        ]
        for name in inputs.names
    }


def trimmed_whole(inputs: Inputs) -> Masks:
    """Trim the whole model."""
    every = {name: deltas(inputs, name) for name in inputs.names}
    masks: Masks = {name: [] for name in inputs.names}
    for i in range(len(inputs.models)):
        of_model = pruned.largest([every[n][i] for n in inputs.names], DENSITIES[i])
        for name, mask in zip(inputs.names, of_model, strict=True):
            masks[name].append(mask.astype(float))
    return masks


def matched(scales: Callable[[Inputs], Masks]) -> Callable[[Inputs], Masks]:
    """Give each pruned task vector its L1 norm back."""

    def of_all(inputs: Inputs) -> Masks:
        return {
            name: [
                pruned.matched(d, mask) * mask
                for d, mask in zip(deltas(inputs, name), masks, strict=True)
            ]
            for name, masks in scales(inputs).items()
        }

    return of_all


def crumbs(
    gamma: float, rule: Callable[..., Mask] = pruned.without_outliers
) -> Callable[[Inputs], Masks]:
    """Drop the largest, keep the next largest."""

    def of_all(inputs: Inputs) -> Masks:
        return {
            name: [
                rule(d, density, gamma).astype(float)
                for d, density in zip(deltas(inputs, name), DENSITIES, strict=False)
            ]
            for name in inputs.names
        }

    return of_all


# The authors' TIES: an unweighted vote, whose zeros go to the sign of the whole model.


def paper_ties(
    weights: Sequence[float], scales: Callable[[Inputs], Masks], *, exact: bool = True
) -> Oracle:
    """Vote by sign(w) t over what was trimmed, and take the mean over the number that agree."""

    def of_all(inputs: Inputs) -> dict[str, Wanted]:
        used, masks = weights[: len(inputs.models)], scales(inputs)
        turned = {
            name: [
                np.sign(w) * m * d
                for w, m, d in zip(used, masks[name], deltas(inputs, name), strict=True)
            ]
            for name in inputs.names
        }
        heard = pruned.votes_of_model(list(turned.values()))
        found = {}
        for name in inputs.names:
            sign, sure = pruned.elected(
                turned[name], Vote(doubt=inputs.doubt(name) if exact else DOUBT)
            )
            sign = np.where(sign == 0, 1 if heard > 0 else -1, sign)
            agree = [np.sign(t) == sign for t in turned[name]]
            number = np.maximum(sum(a.astype(float) for a in agree), 1)
            factors = [w * m * a / number for w, m, a in zip(used, masks[name], agree, strict=True)]
            found[name] = added(*inputs.exact(name), factors, sure)
        return found

    return of_all


def largest_agreeing(weights: Sequence[float]) -> Oracle:
    """Trim each tensor, vote by mass, and take the largest w t of those that agree."""

    def of_all(inputs: Inputs) -> dict[str, Wanted]:
        used, masks, found = weights[: len(inputs.models)], trimmed(inputs), {}
        for name in inputs.names:
            pairs = zip(used, masks[name], deltas(inputs, name), strict=True)
            terms = [w * m * d for w, m, d in pairs]
            sign, sure = pruned.elected(terms, Vote(doubt=inputs.doubt(name)))
            sign = np.where(sign == 0, 1, sign)
            sizes = np.array([np.where(np.sign(t) == sign, np.abs(t), 0) for t in terms])
            first = np.argmax(sizes, axis=0)
            factors = [
                w * np.where((first == i) & (sizes[i] > 0), m, 0)
                for i, (w, m) in enumerate(zip(used, masks[name], strict=True))
            ]
            found[name] = added(*inputs.exact(name), factors, sure)
        return found

    return of_all


# Random pruning: which elements were kept is read off a merge of one model at a time.


@cache
def kept(inputs: Inputs, method: str, options: str) -> Masks:
    """Return which elements a method kept of each model: what differs from the base."""
    masks: Masks = {name: [] for name in inputs.names}
    for i in range(len(inputs.models)):
        models = [
            {"model": f"m{j}", "parameters": {"weight": float(i == j), "density": DENSITIES[j]}}
            for j in range(len(inputs.models))
        ]
        text = {"merge_method": method, "base_model": "base", "models": models}
        text |= {"parameters": json.loads(options), "dtype": "float64"}
        merged = merge(json.dumps(text), inputs.folder)
        for name in inputs.names:
            masks[name].append((merged[name].numpy() != inputs.exact(name)[0]).astype(float))
    return masks


def dared(inputs: Inputs) -> Masks:
    """Divide what DARE kept by the probability of keeping it."""
    chances = [float(pruned.drawn(d)) for d in DENSITIES]
    return {
        name: [m / p for m, p in zip(masks, chances, strict=False)]
        for name, masks in kept(inputs, "dare_linear", "{}").items()
    }


def dared_bare(inputs: Inputs) -> Masks:
    """Do not rescale what DARE kept."""
    return kept(inputs, "dare_linear", "{}")


def dared_and_trimmed(density: float) -> Callable[[Inputs], Masks]:
    """Trim the whole model after DARE, as the authors do."""

    def of_all(inputs: Inputs) -> Masks:
        scales = dared(inputs)
        for i in range(len(inputs.models)):
            left = [scales[n][i] * deltas(inputs, n)[i] for n in inputs.names]
            for name, mask in zip(inputs.names, pruned.largest(left, density), strict=True):
                scales[name][i] = scales[name][i] * mask
        return scales

    return of_all


def pruned_by_rank(epsilon: float, variant: str) -> Callable[[Inputs], Masks]:
    """Divide what DELLA kept by the probability that its rank had."""
    options = json.dumps({"epsilon": epsilon, "variant": variant})

    def of_all(inputs: Inputs) -> Masks:
        masks = kept(inputs, "della_linear", options)
        return {
            name: [
                mask / chances(d, density)
                for mask, d, density in zip(
                    masks[name], deltas(inputs, name), DENSITIES, strict=False
                )
            ]
            for name in inputs.names
        }

    def chances(delta: Array, density: float) -> Array:
        paper = variant == "paper"
        return pruned.drawn(pruned.keep_probabilities(delta, density, epsilon, paper=paper))

    return of_all


MEAN, SUM = Vote(divide="weights"), Vote(divide="none")
PLAIN_SUM, PLAIN_MEAN = Vote(by="", divide="none"), Vote(by="", divide="weights")
DELLA = {"epsilon": 0.08}

PRUNING: dict[str, Case] = {
    "ties": Case("ties", pruning(trimmed, WEIGHTS, 1, MEAN), of_each=dense(WEIGHTS)),
    "ties-signed": Case(
        "ties", pruning(trimmed, SIGNED, 0.7, MEAN), {"lambda": 0.7}, dense(SIGNED)
    ),
    "ties-sum": Case("ties", pruning(trimmed, SIGNED, 1, SUM), {"normalize": False}, dense(SIGNED)),
    "ties-rescale": Case(
        "ties",
        pruning(matched(trimmed), WEIGHTS, 1, MEAN, exact=False),
        {"rescale": True},
        dense(WEIGHTS),
    ),
    "ties-count": Case(
        "ties",
        pruning(trimmed, SIGNED, 1, replace(MEAN, by="count")),
        {"elect": "count"},
        dense(SIGNED),
    ),
    "ties-max": Case("ties", largest_agreeing(SIGNED), {"disjoint": "max"}, dense(SIGNED)),
    "ties-model": Case(
        "ties", pruning(trimmed_whole, WEIGHTS, 1, MEAN), {"scope": "model"}, dense(WEIGHTS)
    ),
    "ties-paper": Case(
        "ties", paper_ties(SIGNED, trimmed_whole), {"variant": "paper"}, dense(SIGNED)
    ),
    "magnitude": Case(
        "magnitude", pruning(trimmed, SIGNED, 0.7, PLAIN_SUM), {"lambda": 0.7}, dense(SIGNED)
    ),
    "magnitude-model": Case(
        "magnitude",
        pruning(trimmed_whole, WEIGHTS, 1, PLAIN_MEAN),
        {"scope": "model", "normalize": True},
        dense(WEIGHTS),
    ),
    "breadcrumbs": Case(
        "breadcrumbs",
        pruning(crumbs(0.01), SIGNED, 0.7, PLAIN_SUM),
        {"lambda": 0.7},
        dense(SIGNED),
    ),
    "breadcrumbs-mean": Case(
        "breadcrumbs",
        pruning(crumbs(0.2), WEIGHTS, 1, PLAIN_MEAN),
        {"normalize": True},
        dense(WEIGHTS, gamma=0.2),
    ),
    "breadcrumbs-rescale": Case(
        "breadcrumbs",
        pruning(matched(crumbs(0.1)), WEIGHTS, 1, PLAIN_SUM, exact=False),
        {"rescale": True, "gamma": 0.1},
        dense(WEIGHTS),
    ),
    "breadcrumbs_ties": Case(
        "breadcrumbs_ties", pruning(crumbs(0.01), SIGNED, 1, SUM), of_each=dense(SIGNED)
    ),
    "breadcrumbs_ties-mean": Case(
        "breadcrumbs_ties",
        pruning(crumbs(0.1), SIGNED, 0.5, MEAN),
        {"normalize": True, "gamma": 0.1, "lambda": 0.5},
        dense(SIGNED),
    ),
    "breadcrumbs-paper": Case(
        "breadcrumbs",
        pruning(crumbs(0.2, pruned.rows_without_outliers), SIGNED, 1, PLAIN_SUM),
        {"variant": "paper", "gamma": 0.2},
        dense(SIGNED),
    ),
    "breadcrumbs_ties-paper": Case(
        "breadcrumbs_ties",
        pruning(crumbs(0.1, pruned.rows_without_outliers), WEIGHTS, 1, SUM),
        {"variant": "paper", "gamma": 0.1},
        dense(WEIGHTS),
    ),
    "dare_linear": Case(
        "dare_linear",
        pruning(dared, SIGNED, 0.7, PLAIN_SUM),
        {"lambda": 0.7},
        dense(SIGNED),
    ),
    "dare_linear-mean": Case(
        "dare_linear",
        pruning(dared_bare, WEIGHTS, 1, PLAIN_MEAN),
        {"normalize": True, "rescale": False},
        dense(WEIGHTS),
    ),
    "dare_ties": Case(
        "dare_ties", pruning(dared, SIGNED, 1, SUM, exact=False), of_each=dense(SIGNED)
    ),
    "dare_ties-mean": Case(
        "dare_ties",
        pruning(dared_bare, WEIGHTS, 1, MEAN),
        {"normalize": True, "rescale": False},
        dense(WEIGHTS),
    ),
    "dare_ties-paper": Case(
        "dare_ties",
        paper_ties(WEIGHTS, dared_and_trimmed(0.15), exact=False),
        {"variant": "paper", "ties_density": 0.15},
        dense(WEIGHTS),
    ),
    "dare_ties-paper-few": Case(  # less is left than the trim would keep
        "dare_ties",
        paper_ties(WEIGHTS, dared_and_trimmed(0.95), exact=False),
        {"variant": "paper", "ties_density": 0.95},
        dense(WEIGHTS),
    ),
    "della_linear": Case(
        "della_linear",
        pruning(pruned_by_rank(0.08, "mergekit"), SIGNED, 1, PLAIN_SUM),
        DELLA,
        dense(SIGNED),
    ),
    "della_linear-paper": Case(
        "della_linear",
        pruning(pruned_by_rank(0.08, "paper"), WEIGHTS, 0.7, PLAIN_MEAN),
        {"normalize": True, "variant": "paper", "lambda": 0.7, **DELLA},
        dense(WEIGHTS),
    ),
    "della": Case(
        "della",
        pruning(pruned_by_rank(0.08, "mergekit"), SIGNED, 1, MEAN, exact=False),
        DELLA,
        dense(SIGNED),
    ),
    "della-paper": Case(
        "della",
        pruning(pruned_by_rank(0.08, "paper"), WEIGHTS, 1, SUM, exact=False),
        {"normalize": False, "variant": "paper", **DELLA},
        dense(WEIGHTS),
    ),
}
