"""Which parameter a pair of factors changes, where peft was told parameters, not modules.

peft wraps the module that holds a parameter, and once more for the next parameter of it: factors
of the first lie under `base_layer`, and their names do not say the parameter's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from merge_kit.errors import CheckpointError
from merge_kit.io.adapter_settings import Settings, ends_with
from merge_kit.io.adapter_updates import Found, linear_update
from merge_kit.io.adapter_values import Update
from merge_kit.io.index import few
from merge_kit.io.strict_json import shown

_INNER = ".base_layer"
_ORDERS = (
    ("gate_up_proj", "gate_up_proj_bias", "down_proj", "down_proj_bias"),
    ("gate_proj", "up_proj", "down_proj"),
    ("w1", "v1", "w2"),
    ("w1", "w2", "w3"),
    ("weight", "bias"),
)
"""Parameters in the order in which models define them, which is that of wrapping."""


def parameters(modules: Mapping[str, Found], settings: Settings) -> dict[str, str]:
    """Return the parameter that each module's factors change, of those that change one.

    Args:
        modules: By their paths as the file writes them, `base_layer` included.

    Raises:
        CheckpointError: If it cannot be told.
    """
    levels: dict[str, list[str]] = {}
    for module in modules:
        levels.setdefault(_bare(module), []).append(module)
    found: dict[str, str] = {}
    for bare, wrapped in levels.items():
        wrapped.sort(key=len, reverse=True)  # the innermost first
        nested = wrapped != [bare]
        if not nested and _is_layer(bare, modules[bare], settings):
            continue
        leaves = _leaves(bare, settings.target_parameters, len(wrapped))
        if not nested and not leaves:
            continue
        ordered = _in_order(leaves, len(wrapped))
        if ordered is None:
            raise _unclear(wrapped, leaves, settings)
        found |= {one: f"{bare}.{leaf}" for one, leaf in zip(wrapped, ordered, strict=True)}
    return found


def _bare(module: str) -> str:
    while module.endswith(_INNER):
        module = module.removesuffix(_INNER)
    return module


def _is_layer(module: str, found: Found, settings: Settings) -> bool:
    """Return whether a module is a target itself, not for one of its parameters."""
    if not settings.target_parameters or settings.targets(module):
        return True
    rows = found["a"].spec.shape[:1]
    return settings.all_linear and rows == (settings.rank_of(module),)


def _leaves(bare: str, targets: Sequence[str], count: int) -> list[str]:
    """Return the parameters of a module that are targets.

    A target without a path is one in any module that has it; one with a path says more.
    """
    split = [target.rpartition(".") for target in targets]
    exact = dict.fromkeys(leaf for parent, _, leaf in split if parent and ends_with(bare, parent))
    loose = dict.fromkeys(leaf for parent, _, leaf in split if not parent)
    return list(exact if len(exact) == count else loose | exact)


def _in_order(leaves: Sequence[str], count: int) -> Sequence[str] | None:
    """Return parameters as they were wrapped, or None if that cannot be told."""
    if len(leaves) != count:
        return None
    if count == 1:
        return leaves
    order = next((order for order in _ORDERS if set(leaves) <= set(order)), None)
    return None if order is None else sorted(leaves, key=order.index)


def _unclear(wrapped: Sequence[str], leaves: Sequence[str], settings: Settings) -> CheckpointError:
    named = f"target_parameters names {few(leaves)}" if leaves else "target_parameters names none"
    problem = f"cannot tell which parameter is changed by {few(wrapped)}: {named} of that module"
    hint = "merge it into its base with peft, and name the merged model"
    return CheckpointError(problem, where=settings.where, hint=hint)


def parameter_update(parameter: str, found: Found, settings: Settings) -> Update:
    """Return the change of a parameter: of a layer's weight, or of all experts at once.

    Args:
        parameter: Its path.

    Raises:
        CheckpointError: If shapes do not fit one another or the config.
    """
    a, b = found["a"].spec.shape, found["b"].spec.shape
    rank = settings.rank_of(parameter)
    where = f"{found['a'].span.path}, tensor {shown(found['a'].spec.name)}"
    if set(found) != {"a", "b"}:
        more = few(str(part) for part in found if part not in {"a", "b"})
        problem = f"a change of a parameter has a {more} too, expected two factors"
        raise CheckpointError(problem, where=where, hint="peft writes no such adapter")
    if len(a) != 2 or len(b) != 2 or a[0] != b[1] or 0 in (*a, *b) or a[0] % rank:
        problem = f"shapes {list(a)} and {list(b)} of the factors are not those of whole experts"
        problem += f" of rank {rank}, which {settings.where} names"
        hint = "config and weights are of two adapters, or the file is damaged: fetch both again"
        raise CheckpointError(problem, where=where, hint=hint)
    experts = a[0] // rank
    layer, _, leaf = parameter.rpartition(".")
    if experts == 1 and leaf == "weight":
        return linear_update(layer, found, "linear", settings, parameter)
    alpha = settings.alpha_of(parameter)
    return Update(
        module=parameter,
        kind="experts",
        a=found["a"],
        b=found["b"],
        rank=rank,
        alpha=alpha,
        scale=settings.scale(alpha, rank),
        experts=experts,
    )


def is_nested(module: str) -> bool:
    """Return whether a path leads through a layer that peft has wrapped."""
    return f"{_INNER}." in f"{module}."


def unwrapped(parts: Mapping[str, Found]) -> list[str]:
    """Return the modules under a wrapped layer that is no wrapped parameter."""
    return [module for module in parts if is_nested(_bare(module))]
