"""merge_kit: merge model checkpoints on a CPU, in memory that does not grow with the model.

Importing it loads nothing else; what it offers is loaded when it is used.
"""

from __future__ import annotations

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from merge_kit.api import merge, plan
    from merge_kit.api.comparing_adapters import compare_adapters
    from merge_kit.api.custom import method
    from merge_kit.api.expressions import TaskVector
    from merge_kit.api.extracting import extract
    from merge_kit.api.loading import load
    from merge_kit.api.methods import (
        arcee_fusion,
        breadcrumbs,
        breadcrumbs_ties,
        crop,
        dare_linear,
        dare_ties,
        della,
        della_linear,
        depth_upscale,
        fisher,
        iso_c,
        iso_cts,
        karcher,
        linear,
        lora_concat,
        lora_dare,
        lora_extract,
        lora_knots,
        lora_linear,
        lora_svd,
        lora_ties,
        magnitude,
        match_experts,
        model_stock,
        moe_to_dense,
        multislerp,
        nearswap,
        nuslerp,
        pad,
        passthrough,
        project,
        ram,
        ramplus_tl,
        regmean,
        rescale,
        sce,
        slerp,
        sparse_upcycle,
        task_arithmetic,
        ties,
        tsv,
        wudi,
    )
    from merge_kit.api.soups import greedy_soup
    from merge_kit.api.tensors import merge_tensors
    from merge_kit.errors import (
        CheckpointError,
        HubError,
        InterruptedRun,
        LockedError,
        MergeKitError,
        MismatchError,
        NonFiniteError,
        OutputError,
        OutputExistsError,
        ParameterError,
        PlanError,
        Problems,
        RecipeError,
        SolveError,
        UsageError,
    )
    from merge_kit.publish.push import push

    __version__: str

__all__ = [
    "CheckpointError",
    "HubError",
    "InterruptedRun",
    "LockedError",
    "MergeKitError",
    "MismatchError",
    "NonFiniteError",
    "OutputError",
    "OutputExistsError",
    "ParameterError",
    "PlanError",
    "Problems",
    "RecipeError",
    "SolveError",
    "TaskVector",
    "UsageError",
    "__version__",
    "arcee_fusion",
    "breadcrumbs",
    "breadcrumbs_ties",
    "compare_adapters",
    "crop",
    "dare_linear",
    "dare_ties",
    "della",
    "della_linear",
    "depth_upscale",
    "extract",
    "fisher",
    "greedy_soup",
    "iso_c",
    "iso_cts",
    "karcher",
    "linear",
    "load",
    "lora_concat",
    "lora_dare",
    "lora_extract",
    "lora_knots",
    "lora_linear",
    "lora_svd",
    "lora_ties",
    "magnitude",
    "match_experts",
    "merge",
    "merge_tensors",
    "method",
    "model_stock",
    "moe_to_dense",
    "multislerp",
    "nearswap",
    "nuslerp",
    "pad",
    "passthrough",
    "plan",
    "project",
    "push",
    "ram",
    "ramplus_tl",
    "regmean",
    "rescale",
    "sce",
    "slerp",
    "sparse_upcycle",
    "task_arithmetic",
    "ties",
    "tsv",
    "wudi",
]

_HOMES = {
    "TaskVector": "api.expressions",
    "compare_adapters": "api.comparing_adapters",
    "extract": "api.extracting",
    "greedy_soup": "api.soups",
    "load": "api.loading",
    "merge": "api",
    "merge_tensors": "api.tensors",
    "method": "api.custom",
    "plan": "api",
    "push": "publish.push",
}


def _version() -> str:
    from importlib.metadata import PackageNotFoundError, version  # noqa: PLC0415  (rarely asked)

    try:
        return version(__name__)
    except PackageNotFoundError:
        return "unknown"


def __getattr__(name: str) -> Any:
    if name == "__version__":
        return _version()
    if name.startswith("_"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    own = "errors" if name[0].isupper() else "api.methods"
    return getattr(import_module(f"{__name__}.{_HOMES.get(name, own)}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


class _Plan(ModuleType):
    """The subpackage `plan`, which is also the function of this name."""

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        return import_module("merge_kit.api").plan(*arguments, **options)


class _Package(ModuleType):
    """This package; whoever imports from its subpackage `plan` must not hide the function."""

    def __setattr__(self, name: str, value: object) -> None:
        if name == "plan" and type(value) is ModuleType:
            value.__class__ = _Plan
        super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
