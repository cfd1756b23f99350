"""Sums of models and task vectors as requests; the differences of a sum, tensor by tensor."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from merge_kit.api.changes import Difference, Sum, differences
from merge_kit.api.grounding import exact, grounded
from merge_kit.api.in_stages import inner_results, ready
from merge_kit.api.lowering import lower
from merge_kit.api.requests import Node, Request
from merge_kit.api.summing import Branch, Summed, Tree, Trees
from merge_kit.core.dtypes import promoted
from merge_kit.plan.cost import worker_count
from merge_kit.plan.models import Held
from merge_kit.plan.sources import Merged
from merge_kit.plan.steps import Made
from merge_kit.plan.values import Step

if TYPE_CHECKING:
    from torch import Tensor

Models = tuple[tuple[float, Node], ...]


@dataclass(frozen=True, slots=True)
class _Into:
    """Puts a sum in the place of the planner's `linear`.

    Attributes:
        lead: Positions of the models whose dtypes decide that of the result; empty for
            differences.
    """

    method: Summed
    lead: tuple[int, ...]

    def __call__(self, made: Sequence[Made], dtype: str | None) -> list[Made]:
        """Return the steps with the sum; copies stay."""
        return [self._changed(one, dtype) if one.fate == "merged" else one for one in made]

    def _changed(self, made: Made, named: str | None) -> Made:
        step = made.step
        kinds = {source.dtype for source in step.inputs}
        dtype = named or self._dtype(made, kinds)
        wide = "F64" in kinds or dtype == "F64"
        (target,) = step.outputs
        step = replace(
            step,
            method=self.method,
            outputs=(replace(target, spec=replace(target.spec, dtype=dtype)),),
            compute="F64" if wide or _is_extreme(self.method) else step.compute,
        )
        # Like any other stage: what feeds another is in float32 unless a dtype is named.
        between = named or ("F64" if wide else "F32")
        held = Held(
            made.held.component,
            step.outputs[0].spec,
            Merged(step, between, step.outputs[0].spec.shape),
        )
        return replace(made, step=step, held=held)

    def _dtype(self, made: Made, kinds: set[str]) -> str:
        if not self.lead:
            return "F64" if "F64" in kinds else "F32"
        parts = [made.item.parts[i] for i in self.lead]
        return promoted([part.model.tensors[part.name].spec.dtype for part in parts])


def request(models: Models, terms: Sum) -> Request:
    """Return models plus task vectors, or task vectors alone, as a request."""
    (terms,) = grounded([terms], [node for _, node in models])
    loaded = any(one.base is None for one in differences(terms))
    terms = exact(terms)
    nodes = _nodes(models, terms)
    trees = Trees(nodes)
    method = Summed(
        models=tuple((weight, trees.position(node)) for weight, node in models),
        sums=(trees.tree(terms),),
    )
    lead = tuple(trees.position(node) for _, node in models)
    conflict = "error" if models and not loaded else "first"  # integers have no difference
    return _linear(nodes, conflict, _Into(method, lead))


def _nodes(models: Models, terms: Sum) -> list[Node]:
    """Return what a sum is made of, each once: models and bases first, they lend their files."""
    found = [node for _, node in models]
    leaves: list[Difference] = [*differences(terms)]
    found += [one.base for one in leaves if one.base is not None]
    found += [one.model for one in leaves]
    return list({node.key: node for node in found}.values())


def _linear(nodes: Sequence[Node], conflict: str, rewrite: _Into) -> Request:
    return Request(
        "linear",
        tuple(nodes),
        parameters={"weight": 1.0, "normalize": False},
        on_conflict=conflict,
        rewrite=rewrite,
    )


def difference(terms: Sum) -> dict[str, Tensor]:
    """Return a sum of differences by tensor, float32, or float64 where a model is float64.

    Integer and bool tensors are left out.
    """
    from merge_kit.engine.in_memory import merge_each  # noqa: PLC0415  (torch)

    lowered, workers = lower(request((), terms)), worker_count(None)
    kept, first = inner_results(lowered, workers, allow_nonfinite=False)
    steps = [ready(made.step, kept) for made in lowered.made if made.fate == "merged"]
    results: dict[str, Tensor] = {}

    def keep(index: int, tensor: Tensor) -> None:
        results[steps[index].outputs[0].key] = tensor

    merge_each(steps, lowered.files, keep, workers=workers, found=first)
    return {step.outputs[0].key: results[step.outputs[0].key] for step in steps}


def scanned(sums: Sequence[Sum], measures: Sequence[str]) -> list[tuple[Step, dict[str, object]]]:
    """Return the steps of several sums, and what the scans of each step find."""
    from merge_kit.engine.in_memory import scan_each  # noqa: PLC0415  (torch)

    sums = list(map(exact, grounded(sums)))
    nodes = list({n.key: n for terms in sums for n in _nodes((), terms)}.values())
    trees = Trees(nodes)
    method = Summed(sums=tuple(map(trees.tree, sums)), measured=tuple(measures))
    lowered, workers = lower(_linear(nodes, "first", _Into(method, ()))), worker_count(None)
    kept, first = inner_results(lowered, workers, allow_nonfinite=False)
    steps = [ready(made.step, kept) for made in lowered.made if made.fate == "merged"]
    found = scan_each(steps, lowered.files, workers=workers, found=first)
    return [(step, dict(results)) for step, results in zip(steps, found, strict=True)]


def _is_extreme(method: Summed) -> bool:
    """Return whether a weight may leave the range of float32."""
    weights = [weight for weight, _ in method.models]
    weights += [weight for tree in method.sums for weight in _weights(tree)]
    return any(weight and not 1e-15 <= abs(weight) <= 1e15 for weight in weights)


def _weights(tree: Tree) -> list[float]:
    found = [weight for weight, _ in tree]
    inner = [node for _, node in tree if isinstance(node, Branch)]
    return found + [weight for node in inner for weight in _weights(node.terms)]
