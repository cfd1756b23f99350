"""Methods by name: those of the package, of installed plugins, and of the running script."""

from __future__ import annotations

import importlib
import pkgutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import MISSING, dataclass, fields
from functools import cache
from importlib.metadata import entry_points
from typing import Any, TypeVar

from merge_kit.core.names import nearest
from merge_kit.errors import ParameterError, PlanError
from merge_kit.methods.base import MergeMethod, PerModel

_METHODS: dict[str, type[MergeMethod]] = {}
_PARAMETERS: dict[type[MergeMethod], tuple[Parameter, ...]] = {}
M = TypeVar("M", bound=MergeMethod)
GROUP = "merge_kit.methods"


def register(name: str) -> Callable[[type[M]], type[M]]:
    """Return a decorator that makes a method known under this name."""

    def enter(method: type[M]) -> type[M]:
        _METHODS[name] = method
        method.method_name = name
        return method

    return enter


@cache
def _load_all() -> None:
    import merge_kit.methods as package  # noqa: PLC0415  (a package cannot import itself on top)

    for module in pkgutil.iter_modules(package.__path__):
        importlib.import_module(f"{package.__name__}.{module.name}")
    for point in entry_points(group=GROUP):
        found = point.load()
        if isinstance(found, type) and issubclass(found, MergeMethod):
            _METHODS[point.name] = found
            found.method_name = point.name


def names() -> tuple[str, ...]:
    """Return the names of all methods, sorted."""
    _load_all()
    return tuple(sorted(_METHODS))


def find(name: str) -> type[MergeMethod]:
    """Return the method of this name.

    Raises:
        PlanError: If there is none; the hint names the nearest.
    """
    _load_all()
    if not isinstance(name, str):
        raise PlanError(f"found a merge method of type {type(name).__name__}, expected its name")
    if name not in _METHODS:
        raise PlanError(f"unknown merge method {name!r}", hint=nearest(name, _METHODS))
    return _METHODS[name]


@dataclass(frozen=True, slots=True)
class Parameter:
    """One parameter of a method as recipes see it.

    Attributes:
        name: The recipe's key.
        field: The dataclass field, different where Python reserves the key.
        kind: float, int, bool or str.
        per_model: Whether each model may set its own.
        required: Whether there is no default.
        default: The default; None where it is required, or where None means "not given".
        optional: Whether None (not given) is a value of its own.
        choices: The texts that it may be; empty for any.
    """

    name: str
    field: str
    kind: type
    per_model: bool
    required: bool
    default: Any
    optional: bool
    choices: tuple[str, ...] = ()

    @property
    def shown_kind(self) -> str:
        """The type, or the texts that it may be."""
        known = " or ".join(self.choices) or self.kind.__name__
        return "list of int, or a word" if known == "Listed" else known

    def problem(self, value: object) -> ParameterError | None:
        """Return what is wrong with a value that is none of the choices."""
        if not self.choices or value is None or value in self.choices:
            return None
        hint = nearest(str(value), self.choices)
        problem = f"is {value!r}, expected {' or '.join(self.choices)}"
        return ParameterError(self.name, problem, hint=hint)


def _hint(method: type[MergeMethod], name: str) -> Any:
    """Return a field's annotation as a type, in the names of the module that declares it."""
    owner = next(c for c in method.__mro__ if name in c.__dict__.get("__annotations__", {}))
    note = owner.__dict__["__annotations__"][name]
    return eval(note, vars(sys.modules[owner.__module__])) if isinstance(note, str) else note  # noqa: S307  (source code of the package, not input)


def parameters(method: type[MergeMethod]) -> tuple[Parameter, ...]:
    """Return what a method can be told, in the order of its fields."""
    if method not in _PARAMETERS:
        _PARAMETERS[method] = tuple(_parameters(method))
    return _PARAMETERS[method]


def _parameters(method: type[MergeMethod]) -> Iterator[Parameter]:
    for entry in fields(method):
        hint, default = _hint(method, entry.name), entry.default
        per_model = getattr(hint, "__origin__", None) is PerModel
        if per_model:
            hint, default = hint.__args__[0], entry.metadata.get("default", MISSING)
        kinds = [k for k in getattr(hint, "__args__", (hint,)) if k is not type(None)]
        kind = kinds[0] if isinstance(kinds[0], type) else str
        choices = tuple(c for k in kinds for c in getattr(k, "__args__", (k,)) if kind is str)
        optional = type(None) in getattr(hint, "__args__", ())
        required = default is MISSING
        name = entry.name.rstrip("_")
        shown = None if required else default
        texts = tuple(c for c in choices if isinstance(c, str))
        yield Parameter(name, entry.name, kind, per_model, required, shown, optional, texts)


@cache
def every_parameter() -> frozenset[str]:
    """Return the parameter names that at least one method knows."""
    return frozenset(p.name for name in names() for p in parameters(find(name)))
