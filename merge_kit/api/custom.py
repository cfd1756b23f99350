"""Methods of the running script."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import MISSING, dataclass, field, fields, make_dataclass
from inspect import Parameter as Argument
from inspect import isclass, signature
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar, get_origin, get_type_hints

from merge_kit.errors import PlanError, UsageError
from merge_kit.methods import registry
from merge_kit.methods.base import MergeMethod, PerModel, Scans, Slab, per_model

if TYPE_CHECKING:
    from torch import Tensor

D = TypeVar("D", bound=Callable[..., Any])
_FORM = "write def f(tensors, base, *, strength: float = 1.0)"


@dataclass(frozen=True, kw_only=True)
class FunctionMethod(MergeMethod):
    """A method that a plain function computes.

    Attributes:
        function: Takes (models, elements), the base's (elements,) if it has a second argument,
            and the parameters by name; returns (elements,).
    """

    function: ClassVar[Callable[..., Tensor]]

    def merge(self, slab: Slab, scans: Scans) -> Tensor:
        """Return what the function makes of the slab."""
        del scans
        told = {entry.name: getattr(self, entry.name) for entry in fields(self)}
        arguments = (slab.tensors, slab.base) if self.takes_base else (slab.tensors,)
        expected, kind = tuple(slab.tensors.shape[1:]), slab.tensors.dtype
        merged = self.function(*arguments, **told)
        if tuple(merged.shape) != expected or merged.dtype != kind:
            raise PlanError(
                f"returned {list(merged.shape)} of {merged.dtype}, expected {list(expected)} of "
                f"{kind}",
                where=self.method_name,
                hint="the function is elementwise: return one value for each column of its input",
            )
        return merged


def method(name: str) -> Callable[[D], D]:
    """Return a decorator that makes a method known to this script under a name.

    It takes a dataclass that derives from MergeMethod, as in docs/add_a_method.md, or a plain
    function `f(tensors, base, *, parameter: float = 1.0)` on a run of elements: `tensors` is
    (models, elements), `base` (elements,), and the result (elements,), each element computed from
    its own column alone. Without the argument `base`, a base is a model like the others; with the
    default None it is optional. Keyword-only arguments are the parameters, of one value for all
    models, or of one a model with the annotation `PerModel[float]`; those without a default are
    required.

    Raises:
        UsageError: If the name is taken by the package, or the class or function has no such form.
    """

    def enter(found: D) -> D:
        if not name.isidentifier():
            raise UsageError(f"{name!r} is no name of a method", hint="write letters, digits and _")
        _refuse_taken(name)
        kind = _checked(found) if isclass(found) else _wrapped(name, found)
        registry.register(name)(kind)
        registry.every_parameter.cache_clear()
        return found

    return enter


def _refuse_taken(name: str) -> None:
    """Refuse the package's own names; a script may run again and replace its method."""
    if name in registry.names() and registry.find(name).__module__.startswith("merge_kit."):
        raise UsageError(f"{name} is a method of merge_kit", hint="choose another name")


def _checked(found: type) -> type[MergeMethod]:
    if not issubclass(found, MergeMethod) or "__dataclass_fields__" not in vars(found):
        problem = f"{found.__name__} is no dataclass that derives from MergeMethod"
        hint = "put @dataclass(frozen=True, kw_only=True) below @method"
        raise UsageError(problem, hint=hint)
    try:
        registry.parameters(found)
    except (NameError, TypeError) as exc:
        problem = f"cannot read the fields of {found.__name__}: {exc}"
        raise UsageError(problem, hint="its types must be known where its module begins") from exc
    return found


def _wrapped(name: str, function: Callable[..., Tensor]) -> type[MergeMethod]:
    """Return a method that calls a function."""
    arguments = list(signature(function).parameters.values())
    positional = [a for a in arguments if a.kind in _POSITIONAL]
    named = [a for a in arguments if a.kind is Argument.KEYWORD_ONLY]
    if len(positional) + len(named) < len(arguments) or len(positional) not in (1, 2):
        problem = f"{name} takes {signature(function)}, expected tensors, perhaps base, and names"
        raise UsageError(problem, hint=_FORM)
    try:
        hints = get_type_hints(function)
    except NameError as exc:
        raise UsageError(f"{name}: unknown type in an annotation: {exc}", hint=_FORM) from exc
    takes_base = len(positional) == 2
    members = {
        "__doc__": function.__doc__ or f"{name}, a function of a script.",
        "function": staticmethod(function),
        "takes_base": takes_base,
        "needs_base": takes_base and positional[1].default is Argument.empty,
    }
    rows = [_field(name, argument, hints) for argument in named]
    made: type[MergeMethod] = make_dataclass(
        name, rows, bases=(FunctionMethod,), namespace=members, frozen=True, kw_only=True
    )
    made.__module__ = function.__module__
    return made


_POSITIONAL = (Argument.POSITIONAL_ONLY, Argument.POSITIONAL_OR_KEYWORD)
_KINDS = (float, int, bool, str)


def _field(name: str, argument: Argument, hints: dict[str, Any]) -> tuple[str, Any, Any]:
    """Return a keyword-only argument as a field of a dataclass."""
    default = MISSING if argument.default is Argument.empty else argument.default
    kind = hints.get(argument.name, type(default))
    inner = [kind.__args__[0]] if get_origin(kind) is PerModel else [kind]
    inner = [k for one in inner for k in getattr(one, "__args__", (one,)) if k is not type(None)]
    if len(inner) != 1 or inner[0] not in _KINDS:
        problem = f"{argument.name} of {name} has the type {kind}"
        hint = "annotate it as float, int, bool or str, or as PerModel[float]"
        raise UsageError(problem, hint=hint)
    if get_origin(kind) is PerModel:
        value = field() if default is MISSING else per_model(default)
    else:
        value = field() if default is MISSING else field(default=default)
    return argument.name, kind, value
