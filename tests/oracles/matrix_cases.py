"""Models weighed by statistics, and merges of whole matrices: parameters and oracles."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from safetensors.torch import load_file

from tests.oracles import matrices
from tests.oracles.case import SIGNED, Case, signed
from tests.oracles.inputs import WEIGHTS, Inputs, Oracle, each
from tests.oracles.values import Array, Wanted, added, certain, summed


def weighed(kind: str) -> Callable[[int], dict[str, object]]:
    return lambda i: {"weight": WEIGHTS[i], "statistics": f"{kind}{i}.safetensors"}


def statistics(inputs: Inputs, kind: str) -> list[dict[str, Array]]:
    """Return the statistics of each model in float64."""
    files = [inputs.folder / f"{kind}{i}.safetensors" for i in range(len(inputs.models))]
    return [{n: t.double().numpy() for n, t in load_file(f).items()} for f in files]


def fisher(*, by_size: bool, floor: float, favor: bool = False) -> Oracle:
    """Return the average by evidence, over its root mean square over the model if `by_size`."""

    def of_all(inputs: Inputs) -> dict[str, Wanted]:
        evidence = statistics(inputs, "f")
        every = [np.concatenate([f[n].ravel() for n in inputs.names]) for f in evidence]
        sizes = [float(np.sqrt(np.mean(e * e))) if by_size else 1.0 for e in every]
        found = {}
        for name in inputs.names:
            raised = [
                np.maximum(f[name] / size, floor if i == 0 or not favor else 0.0)
                for i, (f, size) in enumerate(zip(evidence, sizes, strict=True))
            ]
            found[name] = certain(*matrices.fisher(inputs.exact(name)[1], raised, inputs.weights))
        return found

    return of_all


def regmean(off: float, ridge: float) -> Oracle:
    """Return the regression mean where there are Gram matrices, else the weighted mean."""

    def of_all(inputs: Inputs) -> dict[str, Wanted]:
        grams, found = statistics(inputs, "g"), {}
        for name in inputs.names:
            _, models = inputs.exact(name)
            total = sum(inputs.weights)
            found[name] = summed(models, [w / total for w in inputs.weights])
            if name in grams[0]:
                of_these = [g[name] for g in grams]
                value = matrices.regmean(models, of_these, inputs.weights, off, ridge)
                found[name] = certain(value, mass_of_rows(models))
        return found

    return of_all


def mass_of_rows(models: Sequence[Array]) -> Array:
    """Return what rounding is measured by where whole rows are mixed: their largest element."""
    largest = sum(np.abs(m).max(axis=1, keepdims=True) for m in models)
    return np.broadcast_to(largest, models[0].shape)


def spectral(
    merge: Callable[[list[Array]], Array],
    factor: float,
    weights: Sequence[float],
    other: float | None = None,
) -> Oracle:
    """Return base + factor * what a method makes of w d, matrix by matrix."""

    def of_one(inputs: Inputs, name: str, base: Array, models: list[Array]) -> Wanted:
        used = weights[: len(models)]
        of_rest = factor / len(models) if other is None else other
        if base.ndim < 2:
            return added(base, models, [of_rest * w for w in used])
        terms = [w * (m - base) for w, m in zip(used, models, strict=True)]
        if base.size == 0:
            return added(base, models, used)
        matrix = base.shape if name == "experts" else (1, base.shape[0], -1)
        stacks = [t.reshape(matrix) for t in terms]
        merged = [merge([s[i] for s in stacks]) for i in range(len(stacks[0]))]
        value = base + factor * np.array(merged).reshape(base.shape)
        largest = sum(
            abs(factor * w) * (np.abs(m).max() + np.abs(base).max())
            for w, m in zip(used, models, strict=True)
        )
        return certain(value, np.abs(base) + largest)

    return each(of_one)


FAR = 2.0**-36
"""The measure of float64 where decompositions amplify rounding."""

SPECTRAL: dict[str, Case] = {
    "tsv": Case("tsv", spectral(matrices.tsv, 1.0, SIGNED), of_each=signed, wide_unit=FAR),
    "tsv-other": Case(
        "tsv",
        spectral(matrices.tsv, 0.6, WEIGHTS, 0.25),
        {"lambda": 0.6, "other_weight": 0.25},
        wide_unit=FAR,
    ),
    "iso_c": Case(
        "iso_c", spectral(matrices.iso_c, 1.5, SIGNED), {"lambda": 1.5}, signed, wide_unit=FAR
    ),
    "iso_c-rank": Case(
        "iso_c",
        spectral(lambda d: matrices.iso_c(d, of_rank=True), 1.0, WEIGHTS),
        {"mean_over": "rank"},
        wide_unit=FAR,
    ),
    "iso_cts": Case(
        "iso_cts",
        spectral(lambda d: matrices.iso_cts(d, 0.8), 1.5, WEIGHTS),
        {"lambda": 1.5},
        wide_unit=FAR,
    ),
    "iso_cts-half": Case(
        "iso_cts",
        spectral(lambda d: matrices.iso_cts(d, 0.5), 1.0, SIGNED),
        {"common": 0.5},
        signed,
        wide_unit=FAR,
    ),
    "wudi": Case("wudi", spectral(matrices.wudi, 1.0, SIGNED), of_each=signed, wide_unit=FAR),
    "wudi-other": Case(
        "wudi",
        spectral(matrices.wudi, 0.4, WEIGHTS, 1.0),
        {"lambda": 0.4, "other_weight": 1.0},
        wide_unit=FAR,
    ),
}

EVIDENCE: dict[str, Case] = {
    "fisher": Case("fisher", fisher(by_size=True, floor=1e-6), {}, weighed("f"), base=False),
    "fisher-raw": Case(
        "fisher",
        fisher(by_size=False, floor=0.01),
        {"normalize_fisher": False, "floor": 0.01},
        weighed("f"),
    ),
    "fisher-first": Case(
        "fisher",
        fisher(by_size=True, floor=1e-3, favor=True),
        {"favor_first": True, "floor": 1e-3},
        weighed("f"),
        base=False,
    ),
    "regmean": Case("regmean", regmean(0.9, 1e-3), {}, weighed("g"), base=False),
    "regmean-diagonal": Case(
        "regmean", regmean(0.0, 1e-2), {"scale_off_diagonal": 0, "ridge": 0.01}, weighed("g")
    ),
}
