"""The settings of each method that `quality.py` tries."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Setting = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Grid:
    """Values of each parameter; all combinations are tried.

    Attributes:
        only_two: Whether the method takes two models only.
        one_on_another: Whether it takes the first of them as its base.
        without_base: Whether it does without a base.
    """

    values: Mapping[str, Sequence[Any]]
    only_two: bool = False
    one_on_another: bool = False
    without_base: bool = False


LAMBDAS = (0.3, 0.5, 0.7, 0.9, 1.0, 1.2, 1.5)
DENSITIES = (0.1, 0.2, 0.5, 0.8)
RANDOM = (0.5, 0.8)
FLAT = (0.7, 1.0, 1.5, 2.0, 3.0, 4.0)
"""A flat spectrum makes task vectors shorter: they take larger factors."""

SHARES = (0.3, 0.5, 0.7)

GRID: Mapping[str, Grid] = {
    "linear": Grid({"weight": (1.0,)}, without_base=True),
    "rescale": Grid({"weight": (1.0,), "by": ("norm", "std")}),
    "slerp": Grid({"t": SHARES}, only_two=True, one_on_another=True),
    "nuslerp": Grid({"weight": (1.0,), "nuslerp_flatten": (True, False)}, only_two=True),
    "multislerp": Grid({"weight": (1.0,)}),
    "karcher": Grid({}, without_base=True),
    "model_stock": Grid({"filter_wise": (False, True)}),
    "task_arithmetic": Grid({"weight": (1.0,), "lambda_": LAMBDAS}),
    "magnitude": Grid({"weight": (1.0,), "density": DENSITIES, "lambda_": LAMBDAS}),
    "ties": Grid(
        {
            "weight": (1.0,),
            "density": (*DENSITIES, 1.0),
            "lambda_": (*LAMBDAS, 1.8, 2.2),
            "variant": ("mergekit", "paper"),
        }
    ),
    "dare_linear": Grid({"weight": (1.0,), "density": RANDOM, "lambda_": LAMBDAS}),
    "dare_ties": Grid(
        {
            "weight": (1.0,),
            "density": RANDOM,
            "lambda_": LAMBDAS,
            "variant": ("mergekit", "paper"),
        }
    ),
    "della_linear": Grid(
        {"weight": (1.0,), "density": RANDOM, "epsilon": (0.1,), "lambda_": LAMBDAS}
    ),
    "della": Grid({"weight": (1.0,), "density": RANDOM, "epsilon": (0.1,), "lambda_": LAMBDAS}),
    "breadcrumbs": Grid(
        {"weight": (1.0,), "density": (0.5, 0.9), "gamma": (0.01, 0.05), "lambda_": LAMBDAS}
    ),
    "breadcrumbs_ties": Grid(
        {"weight": (1.0,), "density": (0.5, 0.9), "gamma": (0.01, 0.05), "lambda_": LAMBDAS}
    ),
    "sce": Grid({"select_topk": (0.1, 0.5, 1.0)}),
    "ram": Grid({}),
    "ramplus_tl": Grid({"alpha": (0.2, 0.5)}),
    "arcee_fusion": Grid({}, only_two=True, one_on_another=True),
    "nearswap": Grid({"t": (0.001, 0.01, 0.1)}, only_two=True, one_on_another=True),
    "tsv": Grid({"lambda_": (*LAMBDAS, 1.8, 2.2)}),
    "iso_c": Grid({"lambda_": FLAT}),
    "iso_cts": Grid({"lambda_": FLAT}),
    "wudi": Grid({"lambda_": (0.5, 0.8, 1.0, 1.2), "ridge": (0.0, 0.1, 1.0, 3.0)}),
    "fisher": Grid({"weight": (1.0,), "statistics": ("fisher",)}, without_base=True),
    "regmean": Grid(
        {"weight": (1.0,), "scale_off_diagonal": (0.9, 1.0), "statistics": ("gram",)},
        without_base=True,
    ),
}
