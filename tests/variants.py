"""Parameters that every method is held to its laws with, beside the neutral ones."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from merge_kit.methods.base import MergeMethod, PerModel
from merge_kit.methods.registry import find, names, parameters

MODEL_METHODS = tuple(name for name in names() if find(name).makes == "model")
STRUCTURE_METHODS = tuple(name for name in names() if find(name).makes == "structure")
"""They build models of another structure, and are held to it in tests/structures."""

ADAPTER_METHODS = tuple(name for name in names() if find(name).makes == "adapter")
"""They have laws of their own, in tests/methods/test_lora_*.py."""

MERGING_METHODS = (*MODEL_METHODS, *ADAPTER_METHODS)

NEUTRAL = {"weight": 1.0, "t": 0.3, "statistics": "statistics.safetensors"}
"""Values of required parameters: alone, a model with weight 1 is itself."""

SUMMED = ("copies",)
"""Without normalisation the weights of copies do not sum to 1."""


@dataclass(frozen=True)
class Variant:
    """A method with parameters.

    Attributes:
        more: Parameters that are not the neutral ones, by field.
        breaks: Laws that the method claims for neutral parameters and cannot hold with these.
    """

    name: str
    more: Mapping[str, object] = field(default_factory=dict)
    breaks: tuple[str, ...] = ()

    def __str__(self) -> str:
        return "-".join([self.name, *(f"{k}={v}" for k, v in self.more.items())])

    @property
    def kind(self) -> type[MergeMethod]:
        return find(self.name)

    @property
    def whole_model(self) -> bool:
        """Whether all tensors of a model are scanned together."""
        method = make(self, 2 if self.kind.max_inputs is None else self.kind.max_inputs)
        return any(scan.scope == "model" for scan in method.scans())

    def counts(self) -> list[int]:
        """Return numbers of models, from the fewest to 50."""
        most = self.kind.max_inputs or 50
        return [n for n in (1, 2, 8, 50) if max(1, self.kind.min_inputs) <= n <= most]


def make(variant: Variant, models: int, weights=None) -> MergeMethod:
    """Return a method for so many models, each with its weight if weights are given."""
    chosen = {}
    for parameter in parameters(variant.kind):
        if parameter.field in variant.more:
            value = variant.more[parameter.field]
        elif parameter.required:
            value = NEUTRAL[parameter.name]
        elif parameter.per_model and parameter.default is not None:
            value = parameter.default
        else:
            continue
        chosen[parameter.field] = PerModel([value] * models) if parameter.per_model else value
    if weights is not None and "weight" in chosen:
        chosen["weight"] = PerModel(weights)
    return variant.kind(**chosen)


def _variants() -> list[Variant]:
    some, half = {"density": 0.3}, {"density": 0.5, "epsilon": 0.1}
    pruned = ("single",)
    return [
        *(Variant(name) for name in MODEL_METHODS),
        Variant("breadcrumbs", {**some, "gamma": 0.1}, pruned),
        Variant("breadcrumbs", {**some, "rescale": True, "normalize": True}, pruned),
        Variant("breadcrumbs", {**some, "gamma": 0.1, "variant": "paper"}, pruned),
        Variant("breadcrumbs_ties", {**some, "gamma": 0.1, "normalize": True}, pruned),
        Variant("breadcrumbs_ties", {**some, "variant": "paper", "rescale": True}, pruned),
        Variant("dare_linear", some, pruned),
        Variant("dare_linear", {"density": 0.999, "normalize": True}, pruned),
        Variant("dare_ties", {**some, "normalize": True}, pruned),
        Variant("dare_ties", {**some, "variant": "paper"}, pruned),
        Variant("della", half, pruned),
        Variant("della", {**half, "variant": "paper", "normalize": False}, pruned),
        Variant("della_linear", half, pruned),
        Variant("della_linear", {**half, "variant": "paper", "rescale": False}, pruned),
        Variant("fisher", {"normalize_fisher": False}),
        Variant("fisher", {"favor_first": True, "floor": 0.5}, ("permute_models",)),
        Variant("iso_c", {"lambda_": 0.7}, pruned),
        Variant("iso_cts", {"lambda_": 0.7}, pruned),
        Variant("karcher", {"max_iter": 3, "tol": 0.0}),
        Variant("karcher", {"max_iter": 0}),
        Variant("linear", {"normalize": False}, SUMMED),
        Variant("magnitude", {**some, "normalize": True}, pruned),
        Variant("magnitude", {**some, "rescale": True}, pruned),
        Variant("magnitude", {**some, "scope": "model"}, pruned),
        Variant("model_stock", {"filter_wise": True}),
        Variant("multislerp", {"normalize_weights": False}, SUMMED),
        Variant("nearswap", {"t": 0.01}),
        Variant("nuslerp", {"nuslerp_flatten": False}),
        Variant("nuslerp", {"nuslerp_flatten": False, "nuslerp_row_wise": True}),
        Variant("passthrough", {"scale": 1.5}, ("single",)),
        Variant("ram", {"epsilon": 0.5}, ("copies",)),
        Variant("ramplus_tl", {"r": 0.5, "alpha": 2.0, "epsilon": 0.5}, ("copies",)),
        Variant("ramplus_tl", {"r": 0.5, "alpha": 2.0, "epsilon": 0.5, "scope": "model"}),
        Variant("regmean", {"scale_off_diagonal": 0.0}),
        Variant("regmean", {"ridge": 0.0}),
        Variant("rescale", {"by": "std", "to": "base"}, ("single",)),
        Variant("rescale", {"normalize": False}, ("copies", "copies_of_base")),
        Variant("sce", {"select_topk": 0.3}),
        Variant("slerp", {"flatten": False}),
        Variant("task_arithmetic", {"normalize": True}),
        Variant("ties", some, pruned),
        Variant("ties", {**some, "elect": "count", "rescale": True}, pruned),
        Variant("ties", {**some, "disjoint": "max"}, pruned),
        Variant("ties", {**some, "disjoint": "sum", "lambda_": 0.5}, pruned),
        Variant("ties", {**some, "scope": "model"}, pruned),
        Variant("ties", {**some, "variant": "paper"}, pruned),
        Variant("tsv", {"lambda_": 0.7}, pruned),
        Variant("wudi", {"lambda_": 0.7}, pruned),
        Variant("wudi", {"ridge": 1.0}, ("single", "copies_of_base", "permute_models")),
    ]


VARIANTS = [variant for variant in _variants() if variant.name in names()]
