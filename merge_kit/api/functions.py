"""Makes functions of registered methods: `method(models, ...)` or `method(base, models, ...)`."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from inspect import Parameter as Argument
from inspect import Signature, cleandoc
from typing import TYPE_CHECKING, Any

from merge_kit.api.binding import bind, default_of, listed
from merge_kit.api.lazy_adapter import LazyAdapter
from merge_kit.api.lazy_merge import LazyMerge
from merge_kit.errors import UsageError
from merge_kit.methods import registry
from merge_kit.methods.base import MergeMethod
from merge_kit.methods.registry import Parameter
from merge_kit.methods.structures import Listed

if TYPE_CHECKING:
    from collections.abc import Callable

    from merge_kit.api.nodes import Operand

_FORM = """

Write `method(models, ...)`, or `method(base, models, ...)` where there is a base; `base=...` says
the same.

Args:
    first: The models, or the base if a list of models follows.
    models: Paths, mappings of tensors, modules, loaded models, or results of other merges.
    base: The base model, likewise; if it is also among the models, it is one of them as in recipes.
    seed: Of everything random; default 0, or that of a merge among the models.

A parameter that each model may set is one value for all, or a list with one value a model. Any
other parameter may be a list too: it then spans the layers, as in recipes. A weight that is not
given is 1.

Returns a merge that is carried out by `.state_dict()` or `.save(folder)`, or stands for a model.
"""


_STRUCTURE_FORM = """

Write `method(model, ...)` or `method(models, ...)`; `base=...` says the base, where there is one.

Args:
    first: The model, or the models: paths, mappings of tensors, modules, loaded models, or results
        of other merges.
    models: Where `first` is the base.
    base: The base model, likewise.
    seed: Of everything random; default 0, or that of a merge among the models.

What stands in config.json is known of models on disk only. A parameter that each model may set is
one value for all, or a list with one value a model.

Returns a model that is built by `.state_dict()` or `.save(folder)`, or stands for a model.
"""


_ADAPTER_FORM = """

Args:
    adapters: Paths of LoRA adapters, or adapters that are loaded; one may be there twice.
    seed: Of everything random; default 0.

A parameter that each adapter may set is one value for all, or a list with one value an adapter. A
weight that is not given is 1.

Returns an adapter that is made by `.save(folder)` or `.state_dict()`, and planned by `.plan()`.
"""


def annotation(parameter: Parameter, *, spans: bool = True) -> str:
    """Return the type of a parameter's argument.

    Args:
        spans: Whether a list of values may span the layers.
    """
    none = " | None" if parameter.optional else ""
    if parameter.kind is Listed:
        return f"int | str | Sequence[int]{none}"
    kind = parameter.kind.__name__
    several = parameter.per_model or (kind != "str" and (spans or kind == "float"))
    many = f" | Sequence[{kind}{none}]" if several else ""
    return f"{kind}{many}{none}"


def signature(method: type[MergeMethod]) -> Signature:
    """Return the signature of a method's function."""
    arguments = _of_adapters() if _takes_adapters(method) else _of_models()
    for entry in registry.parameters(method):
        default = default_of(entry)
        if default is None and entry.required:
            default = Argument.empty
        note = annotation(entry, spans=method.makes != "structure")
        arguments.append(
            Argument(entry.field, Argument.KEYWORD_ONLY, default=default, annotation=note)
        )
    made = "LazyAdapter" if method.makes == "adapter" else "LazyMerge"
    return Signature(arguments, return_annotation=made)


def _takes_adapters(method: type[MergeMethod]) -> bool:
    return method.makes == "adapter" and not method.needs_base


def _of_adapters() -> list[Argument]:
    first, seed = Argument.POSITIONAL_OR_KEYWORD, Argument.KEYWORD_ONLY
    return [
        Argument("adapters", first, annotation="Sequence[Operand]"),
        Argument("seed", seed, default=None, annotation="int | None"),
    ]


def _of_models() -> list[Argument]:
    first = "Operand | Sequence[Operand] | None"
    return [
        Argument("first", Argument.POSITIONAL_OR_KEYWORD, default=None, annotation=first),
        Argument(
            "models",
            Argument.POSITIONAL_OR_KEYWORD,
            default=None,
            annotation="Sequence[Operand] | None",
        ),
        Argument("base", Argument.KEYWORD_ONLY, default=None, annotation="Operand | None"),
        Argument("seed", Argument.KEYWORD_ONLY, default=None, annotation="int | None"),
    ]


def method_function(name: str) -> Callable[..., LazyMerge] | Callable[..., LazyAdapter]:
    """Return the function of a method.

    Raises:
        PlanError: If there is no such method.
    """
    kind: Any = registry.find(name)  # a class may be hashed, which mypy does not see
    return _function(name, kind)


@cache
def _function(
    name: str, method: type[MergeMethod]
) -> Callable[..., LazyMerge] | Callable[..., LazyAdapter]:
    makes = LazyAdapter if method.makes == "adapter" else LazyMerge

    def of_models(
        first: Operand | Sequence[Operand] | None = None,
        models: Sequence[Operand] | None = None,
        *,
        base: Operand | None = None,
        seed: int | None = None,
        **parameters: Any,
    ) -> LazyMerge | LazyAdapter:
        if models is None:
            models, first = _models(method, first, base), None
        if first is not None and base is not None:
            problem = "found the base twice, expected it once"
            raise UsageError(problem, where=name, hint=f"write {name}(base, [a, b], ...)")
        first = base if first is None else first
        return makes(bind(name, listed(name, models), _operand(name, first), seed, parameters))

    def of_adapters(
        adapters: Sequence[Operand], *, seed: int | None = None, **parameters: Any
    ) -> LazyAdapter:
        return LazyAdapter(bind(name, listed(name, adapters), None, seed, parameters))

    alone = _takes_adapters(method)
    function: Any = of_adapters if alone else of_models
    function.__name__ = function.__qualname__ = name
    form = _STRUCTURE_FORM if method.makes == "structure" else _FORM
    function.__doc__ = cleandoc(method.__doc__ or "") + (_ADAPTER_FORM if alone else form)
    function.__signature__ = signature(method)
    made: Callable[..., LazyMerge] | Callable[..., LazyAdapter] = function
    return made


def _models(method: type[MergeMethod], found: Any, base: Any) -> Sequence[Any]:
    """Return the models of a call; a method that builds a model may be given one, and no list.

    Or the base alone, which is then the model.
    """
    builds = method.makes == "structure"
    if builds and found is None and base is not None:
        return [base]
    one = builds and found is not None and not isinstance(found, list | tuple)
    return [found] if one else listed(method.method_name, found)


def _operand(name: str, base: Any) -> Operand | None:
    if isinstance(base, list | tuple):
        problem = "found a list in the place of the base, expected one model"
        raise UsageError(problem, where=name, hint=f"write {name}(base, [a, b], ...)")
    found: Operand | None = base
    return found
