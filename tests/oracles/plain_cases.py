"""Averages, spheres, and what looks at one element or row: parameters and oracles."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np

from tests.oracles import selective, spheres
from tests.oracles.case import SIGNED, Case, bare, signed
from tests.oracles.inputs import Inputs, Oracle, each
from tests.oracles.values import Array, Wanted, added, summed

# Averages and spheres.


def linear(inputs: Inputs, name: str, base: Array, models: list[Array]) -> Wanted:
    total = sum(inputs.weights)
    return summed(models, [w / total for w in inputs.weights])


def arithmetic(factor: float) -> Oracle:
    return each(
        lambda inputs, name, base, models: added(
            base, models, [factor * w for w in SIGNED[: len(models)]]
        )
    )


def nuslerp(axis: int | None, *, has_base: bool) -> Oracle:
    def of_one(inputs: Inputs, name: str, base: Array, models: list[Array]) -> Wanted:
        t = inputs.weights[1] / sum(inputs.weights)

        def between(left: Array, right: Array) -> Wanted:
            if axis is None:
                return spheres.arc(left, right, t)
            return spheres.by_vectors(lambda u, v: spheres.arc(u, v, t), [left, right], axis)

        if not has_base:
            return between(*models)
        found = spheres.on_deltas(between, base, models)
        return replace(found, mass=found.mass + 2 * np.abs(base))

    return each(of_one)


def slerp(t: float, axis: int | None) -> Oracle:
    def of_one(inputs: Inputs, name: str, base: Array, models: list[Array]) -> Wanted:
        if axis is None:
            return spheres.arc(base, models[0], t)
        return spheres.by_vectors(lambda u, v: spheres.arc(u, v, t), [base, models[0]], axis)

    return each(of_one)


def multislerp(*, has_base: bool, normalize: bool) -> Oracle:
    def of_one(inputs: Inputs, name: str, base: Array, models: list[Array]) -> Wanted:
        if len(models) == 1:
            return summed(models, [1.0])
        total = sum(inputs.weights) if normalize else 1.0
        weights = [w / total for w in inputs.weights]
        if not has_base:
            return spheres.multislerp(models, weights)
        found = spheres.on_deltas(lambda *d: spheres.multislerp(d, weights), base, models)
        return replace(found, mass=found.mass + sum(weights) * np.abs(base))

    return each(of_one)


def karcher(steps: int, tol: float) -> Oracle:
    return each(
        lambda inputs, name, base, models: (
            spheres.karcher(models, inputs.weights, steps, tol)
            if len(models) > 1
            else summed(models, [1.0])
        )
    )


def stock(*, by_row: bool) -> Oracle:
    def of_tensor(base: Array, *models: Array) -> Wanted:
        share = spheres.stock_share([m - base for m in models])
        return spheres.stocked(base, models, share)

    def of_one(inputs: Inputs, name: str, base: Array, models: list[Array]) -> Wanted:
        if by_row:
            return spheres.by_vectors(of_tensor, [base, *models], -1)
        return of_tensor(base, *models)

    return each(of_one)


def rescaled(by: str, to: str, *, normalize: bool = True) -> Oracle:
    def size(x: Array) -> float:
        if x.size == 0:
            return 0.0
        return float(np.std(x)) if by == "std" else spheres.length(x)

    def of_one(inputs: Inputs, name: str, base: Array, models: list[Array]) -> Wanted:
        sizes = [size(m) for m in models]
        reference = [s for s in sizes if s > 0] if to == "mean" else [size(base)]
        aim = float(np.mean(reference)) if reference else 0.0
        scales = [aim / s if min(s, aim) > 0 else 1.0 for s in sizes]
        total = sum(inputs.weights) if normalize else 1.0
        return summed(models, [w * s / total for w, s in zip(inputs.weights, scales, strict=True)])

    return each(of_one)


# Elements and rows.


def alone(oracle: Callable[..., Wanted], *options: float) -> Oracle:
    return each(lambda inputs, name, base, models: oracle(base, models[0], *options))


def sce(share: float) -> Oracle:
    return each(
        lambda inputs, name, base, models: selective.sce(base, models, share, inputs.doubt(name))
    )


def ram(epsilon: float) -> Oracle:
    return each(lambda inputs, name, base, models: selective.ram(base, models, epsilon))


def ramplus(r: float, alpha: float, epsilon: float, *, whole: bool) -> Oracle:
    def of_all(inputs: Inputs) -> dict[str, Wanted]:
        counts = {}
        for name in inputs.base:
            base, models = inputs.exact(name)
            counts[name] = selective.shared_and_alone(selective.changed(base, models, epsilon))
        sums = [np.sum([c[k] for c in counts.values()], axis=0).tolist() for k in (0, 1)]
        found = {}
        for name in inputs.base:
            together, by_one = sums if whole else counts[name]
            strengths = selective.strengths(together, by_one, r, alpha)
            found[name] = selective.ramplus(*inputs.exact(name), epsilon, strengths)
        return found

    return of_all


PLAIN: dict[str, Case] = {
    "linear": Case("linear", each(linear), base=False),
    "task_arithmetic": Case(
        "task_arithmetic", arithmetic(0.7), {"lambda": 0.7}, of_each=signed, counts=(1, 2, 3, 8)
    ),
    "slerp": Case("slerp", slerp(0.3, None), {"t": 0.3}, bare, counts=(1,)),
    "slerp-rows": Case("slerp", slerp(0.3, -1), {"t": 0.3, "flatten": False}, bare, counts=(1,)),
    "nuslerp": Case("nuslerp", nuslerp(None, has_base=False), base=False, counts=(2,)),
    "nuslerp-base": Case("nuslerp", nuslerp(None, has_base=True), counts=(2,)),
    "nuslerp-vectors": Case(
        "nuslerp",
        nuslerp(-1, has_base=False),
        {"nuslerp_flatten": False},
        base=False,
        counts=(2,),
    ),
    "nuslerp-columns": Case(
        "nuslerp",
        nuslerp(0, has_base=True),
        {"nuslerp_flatten": False, "nuslerp_row_wise": True},
        counts=(2,),
    ),
    "multislerp": Case("multislerp", multislerp(has_base=False, normalize=True), base=False),
    "multislerp-base": Case(
        "multislerp",
        multislerp(has_base=True, normalize=False),
        {"normalize_weights": False},
    ),
    "karcher": Case("karcher", karcher(10, 1e-5), base=False),
    "karcher-base": Case("karcher", karcher(1, 0.0), {"max_iter": 1, "tol": 0}),
    "karcher-exact": Case(  # dot products in float64 tell no step below 1e-7 from none
        "karcher", karcher(30, 0.0), {"max_iter": 30, "tol": 0}, base=False, wide_unit=2.0**-21
    ),
    "passthrough": Case(
        "passthrough",
        each(lambda inputs, name, base, models: summed(models, [1.7])),
        of_each=lambda i: {"scale": 1.7},
        base=False,
        counts=(1,),
    ),
    "karcher-none": Case("karcher", karcher(0, 1e-5), {"max_iter": 0}, base=False),
    "model_stock": Case("model_stock", stock(by_row=False), of_each=bare, counts=(2, 3, 8)),
    "model_stock-rows": Case(
        "model_stock", stock(by_row=True), {"filter_wise": True}, bare, counts=(2, 3, 8)
    ),
    "rescale": Case("rescale", rescaled("norm", "mean"), base=False),
    "rescale-std-base": Case(
        "rescale",
        rescaled("std", "base", normalize=False),
        {"by": "std", "to": "base", "normalize": False},
    ),
    "nearswap": Case("nearswap", alone(selective.nearswap, 0.05), {"t": 0.05}, bare, counts=(1,)),
    "nearswap-tiny": Case(
        "nearswap", alone(selective.nearswap, 1e-7), {"t": 1e-7}, bare, counts=(1,)
    ),
    "arcee_fusion": Case("arcee_fusion", alone(selective.arcee_fusion), of_each=bare, counts=(1,)),
    "sce": Case("sce", sce(1.0), of_each=bare),
    "sce-some": Case("sce", sce(0.3), {"select_topk": 0.3}, bare),
    "sce-none": Case("sce", sce(0.0), {"select_topk": 0}, bare, counts=(1, 3)),
    "ram": Case("ram", ram(1e-5), of_each=bare),
    "ram-coarse": Case("ram", ram(0.03), {"epsilon": 0.03}, bare),
    "ramplus_tl": Case("ramplus_tl", ramplus(0.1, 0.2, 1e-5, whole=False), of_each=bare),
    "ramplus_tl-strong": Case(
        "ramplus_tl",
        ramplus(0.5, 2.0, 0.05, whole=False),
        {"r": 0.5, "alpha": 2.0, "epsilon": 0.05},
        bare,
    ),
    "ramplus_tl-model": Case(
        "ramplus_tl",
        ramplus(0.3, 1.5, 0.05, whole=True),
        {"r": 0.3, "alpha": 1.5, "epsilon": 0.05, "scope": "model"},
        bare,
    ),
}
