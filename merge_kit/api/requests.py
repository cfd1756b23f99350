"""What is to be merged, and how: models at hand, and the results of other merges."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from merge_kit.api.held import HeldModel
from merge_kit.core.dtypes import RECIPE_DTYPES
from merge_kit.core.names import nearest
from merge_kit.errors import UsageError
from merge_kit.plan.models import Model
from merge_kit.plan.steps import Made

Parameters = Mapping[str, Any]
Rewrite = Callable[[Sequence[Made], str | None], list[Made]]
"""Changes the steps that the planner has made of a request, whose dtype it is told."""


@dataclass(frozen=True, eq=False, slots=True)
class Result:
    """What another merge yields, as a model.

    Attributes:
        key: The object that stands for the merge: the same one is merged once.
    """

    request: Request
    key: object

    def __str__(self) -> str:
        return f"the result of {self.request.method}"


Reference = str | Mapping[str, Any]
"""How a recipe names a model."""

Node = HeldModel | Result
"""What is merged."""


@dataclass(frozen=True, eq=False, slots=True)
class Request:
    """What is to be merged, and how.

    Attributes:
        own: Parameters of each model, in the order of `models`; empty if none has any.
        parameters: Parameters of the merge.
        seed: None for what the requests around it, or inside it, say; 0 if none does.
        on_conflict: What to do with integer and bool tensors that differ.
        rewrite: What no recipe says: how its steps are changed.
        evidence: Statistics in memory, by the text that stands for their path.
    """

    method: str
    models: tuple[Node, ...]
    base: Node | None = None
    own: tuple[Parameters, ...] = ()
    parameters: Parameters = field(default_factory=dict)
    seed: int | None = None
    dtype: str | None = None
    on_conflict: str = "error"
    rewrite: Rewrite | None = None
    evidence: Mapping[str, HeldModel] = field(default_factory=dict)

    def nodes(self) -> list[Node]:
        """Return what is merged, each once, a base that is not among the models last."""
        base = () if self.base is None else (self.base,)
        return list({node.key: node for node in (*self.models, *base)}.values())

    def inputs(self) -> list[HeldModel]:
        """Return the models at hand, each once, those of inner merges last."""
        own = [node for node in self.nodes() if isinstance(node, HeldModel)]
        inner = [m for n in self.nodes() if isinstance(n, Result) for m in n.request.inputs()]
        return list({model.key: model for model in (*own, *inner)}.values())

    def stages(self) -> dict[object, Request]:
        """Return the merges inside by key, each once, after those that it needs."""
        found: dict[object, Request] = {}
        for node in self.nodes():
            if isinstance(node, Result):
                found |= {k: r for k, r in node.request.stages().items() if k not in found}
                found.setdefault(node.key, node.request)
        return found

    def statistics(self) -> dict[str, Model]:
        """Return all statistics in memory, by the text that stands for their path."""
        requests = (self, *self.stages().values())
        return {text: held.model for r in requests for text, held in r.evidence.items()}

    @property
    def is_recipe(self) -> bool:
        """Whether a recipe says all of it."""
        inner = all(request.rewrite is None for request in self.stages().values())
        return inner and self.rewrite is None

    def whole_seed(self) -> int:
        """Return the one seed of this and all merges inside.

        Raises:
            UsageError: If they name different ones.
        """
        named = [request.seed for request in (self, *self.stages().values())]
        seeds = sorted({seed for seed in named if seed is not None})
        if len(seeds) > 1:
            problem = f"found the seeds {seeds[0]} and {seeds[1]} in one merge, expected one"
            raise UsageError(problem, hint="pass the seed to the outermost function only")
        return seeds[0] if seeds else 0

    def documents(self, names: Mapping[object, Reference]) -> list[dict[str, Any]]:
        """Return the recipe: a mapping for each merge inside, and last the one for the whole.

        Args:
            names: How the recipe calls each model and each merge inside, by its key.
        """
        inner = [
            {"name": names[key], **request.document(names)}
            for key, request in self.stages().items()
        ]
        return [*inner, {**self.document(names), "seed": self.whole_seed()}]

    def document(self, names: Mapping[object, Reference]) -> dict[str, Any]:
        """Return this merge alone as a mapping."""
        own = self.own or ({},) * len(self.models)
        recipe: dict[str, Any] = {
            "merge_method": self.method,
            "models": [
                {"model": names[model.key], "parameters": dict(parameters)}
                for model, parameters in zip(self.models, own, strict=True)
            ],
            "parameters": dict(self.parameters),
            "on_conflict": self.on_conflict,
        }
        if self.base is not None:
            recipe["base_model"] = names[self.base.key]
        if self.dtype is not None:
            recipe["dtype"] = self.dtype
        return recipe

    def names(self, models: Mapping[object, Reference]) -> dict[object, Reference]:
        """Return names of models and of the merges inside, as `documents` takes them."""
        stages = {key: f"merge-{i}" for i, key in enumerate(self.stages(), start=1)}
        named: dict[object, Reference] = {**models, **stages}
        return named


def with_dtype(request: Request, dtype: object) -> Request:
    """Return the request with an output dtype: "bfloat16", torch.bfloat16, or None for none."""
    if dtype is None:
        return request
    name = str(dtype).removeprefix("torch.")
    if name not in RECIPE_DTYPES:
        raise UsageError(f"found the dtype {name!r}", hint=nearest(name, RECIPE_DTYPES))
    return replace(request, dtype=name)


def refuse_twins(nodes: Sequence[Node], where: str) -> None:
    """Refuse a model that is listed twice."""
    if len({node.key for node in nodes}) < len(nodes):
        problem = "the same model stands twice among the models"
        raise UsageError(problem, where=where, hint="pass it once, with the sum of the weights")


def paths(request: Request) -> dict[object, Reference] | None:
    """Return how a recipe names every model, by its key, or None if one is not on disk."""
    references = ((model.key, model.reference) for model in request.inputs())
    found: dict[object, Reference] = {key: one for key, one in references if one is not None}
    on_disk = len(found) == len(request.inputs()) and not request.statistics()
    return found if on_disk else None


def roots(request: Request) -> Iterator[Any]:
    """Yield what must not be replaced: the paths of the models."""
    return (root for model in request.inputs() for root in model.roots)
