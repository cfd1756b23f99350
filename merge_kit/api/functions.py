"""Makes functions of registered methods: `method(models, *, base=None, seed=0, weight=...)`."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from inspect import Parameter as Argument
from inspect import Signature, cleandoc
from typing import TYPE_CHECKING, Any

from merge_kit.api.binding import bind
from merge_kit.api.lazy_merge import LazyMerge
from merge_kit.methods import registry
from merge_kit.methods.base import MergeMethod
from merge_kit.methods.registry import Parameter

if TYPE_CHECKING:
    from collections.abc import Callable

    from merge_kit.api.expressions import Operand

_FORM = """

Args:
    models: Paths, mappings of tensors, modules, or loaded models.
    base: The base model, likewise; if it is also among the models, it is one of them as in recipes.
    seed: Of everything random.

A parameter that each model may set is one value for all, or a list with one value a model. Any
other parameter may be a list too: it then spans the layers, as in recipes.

Returns a merge that is carried out by `.state_dict()` or `.save(folder)`.
"""


def annotation(parameter: Parameter) -> str:
    """Return the type of a parameter's argument."""
    kind, none = parameter.kind.__name__, " | None" if parameter.optional else ""
    many = f" | Sequence[{kind}{none}]" if parameter.per_model or kind != "str" else ""
    return f"{kind}{many}{none}"


def signature(method: type[MergeMethod]) -> Signature:
    """Return the signature of a method's function."""
    arguments = [
        Argument("models", Argument.POSITIONAL_OR_KEYWORD, annotation="Sequence[Operand]"),
        Argument("base", Argument.KEYWORD_ONLY, default=None, annotation="Operand | None"),
        Argument("seed", Argument.KEYWORD_ONLY, default=0, annotation="int"),
    ]
    for entry in registry.parameters(method):
        default = Argument.empty if entry.required else entry.default
        note = annotation(entry)
        arguments.append(
            Argument(entry.field, Argument.KEYWORD_ONLY, default=default, annotation=note)
        )
    return Signature(arguments, return_annotation="LazyMerge")


def method_function(name: str) -> Callable[..., LazyMerge]:
    """Return the function of a method.

    Raises:
        PlanError: If there is no such method.
    """
    kind: Any = registry.find(name)  # a class may be hashed, which mypy does not see
    return _function(name, kind)


@cache
def _function(name: str, method: type[MergeMethod]) -> Callable[..., LazyMerge]:
    def function(
        models: Sequence[Operand],
        *,
        base: Operand | None = None,
        seed: int = 0,
        **parameters: Any,
    ) -> LazyMerge:
        return LazyMerge(bind(name, models, base, seed, parameters))

    function.__name__ = function.__qualname__ = name
    function.__doc__ = cleandoc(method.__doc__ or "") + _FORM
    function.__signature__ = signature(method)  # type: ignore[attr-defined]
    return function
