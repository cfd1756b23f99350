"""What stands for a model, opened as a model of a merge; adapters on top of models."""

from __future__ import annotations

from collections.abc import Mapping
from math import isfinite
from os import PathLike, fspath
from pathlib import Path
from typing import TYPE_CHECKING, Any

from merge_kit.api import delta_files
from merge_kit.api.held import HeldModel
from merge_kit.api.measured import Measured
from merge_kit.api.mergeable import Mergeable
from merge_kit.api.overlays import Applied, on_top
from merge_kit.api.places import is_there, place_of
from merge_kit.api.requests import Node, Result
from merge_kit.errors import RecipeError, UsageError
from merge_kit.recipe.references import split_reference
from merge_kit.recipe.values import Mark

if TYPE_CHECKING:
    from torch import Tensor
    from torch.nn import Module

    Operand = str | PathLike[str] | Mapping[str, Tensor] | Module | HeldModel | Mergeable
    """What stands for a model: a path, `base+adapter`, tensors by name, a module, a model that is
    loaded, or the result of a merge."""


def as_node(source: Operand | Node) -> Node:
    """Return what stands for a model as a model of a merge."""
    if isinstance(source, HeldModel | Result):
        return source
    if isinstance(source, Mergeable):
        return Result(source.request(), source)
    return HeldModel(content_of(source))


def content_of(source: Any) -> Any:
    """Return what a model is made of: a path, tensors by name, a module, or adapters on a model.

    Raises:
        UsageError: If it is something else of this library, or a reference that cannot be read.
    """
    if isinstance(source, HeldModel | Mergeable | Measured):
        hint = "use it as it is" if isinstance(source, Mergeable) else "add it to its base"
        raise UsageError(f"found a {type(source).__name__}, expected a model to load", hint=hint)
    if not isinstance(source, str | PathLike):
        return source
    delta_files.refuse(Path(source))
    text = fspath(source)
    if "+" not in text or is_there(place_of(text)):
        return source
    try:
        found = split_reference(text, None, Mark("", 0, 0))
    except RecipeError as error:
        raise UsageError(error.problem, hint=error.hint) from error
    if not found.adapters:
        return source
    base = found.path if found.revision is None else f"{found.path}@{found.revision}"
    return on_top(HeldModel(base), [applied(adapter) for adapter in found.adapters])


def applied(adapter: str | PathLike[str] | HeldModel, weight: float = 1.0) -> Applied:
    """Return an adapter with its weight.

    Raises:
        CheckpointError: If it is no adapter, or broken.
        UsageError: If the weight is no finite number.
    """
    if isinstance(weight, bool) or not isinstance(weight, int | float) or not isfinite(weight):
        raise UsageError(f"the weight is {weight!r}, expected a finite number")
    found: Any = adapter
    if isinstance(adapter, str | PathLike):
        found = HeldModel(adapter, adapter=True)
    if not isinstance(found, HeldModel):
        problem = f"found a value of type {type(found).__name__}, expected an adapter"
        raise UsageError(problem, hint="pass the path of an adapter's folder or file")
    if found.model.adapter is None:
        hint = "name a folder with adapter_config.json, or a file of LoRA factors"
        raise UsageError(f"{found} is no adapter", hint=hint)
    return Applied(found, float(weight))


def grounded(node: Node, base: Node | None, where: str) -> Node:
    """Return a model; an adapter alone becomes the base with this adapter on top.

    Raises:
        UsageError: If it is an adapter, and there is no base on disk or in memory.
    """
    if isinstance(node, Result) or node.model.adapter is None:
        return node
    if isinstance(base, HeldModel) and base.key != node.key:
        return HeldModel(on_top(base, [applied(node)]))
    problem = f"{node} is an adapter, expected a model"
    hint = "write 'BASE+ADAPTER', or mk.load(base).with_adapter(adapter)"
    raise UsageError(problem, where=where, hint=hint)
