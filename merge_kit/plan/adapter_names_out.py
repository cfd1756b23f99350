"""What the tensors of an adapter that is made are called."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, fields

from merge_kit.errors import MismatchError
from merge_kit.io.adapter_values import Style, Update
from merge_kit.plan.adapter_groups import Member, ModuleGroup

PREFIX = "base_model.model."
_ALPHA = re.compile(r"[._]lora[._](?:A|down)\.weight$")
"""What alpha stands in place of in the name of a."""


@dataclass(frozen=True, slots=True)
class TensorNames:
    """Names of the tensors of one module in the file."""

    a: str
    b: str
    bias: str
    magnitude: str
    alpha: str


def common_style(adapters: Sequence[Member]) -> Style:
    """Return the style of all adapters.

    Raises:
        MismatchError: If they have different ones, whose names do not say which modules are the
            same.
    """
    first = adapters[0]
    for other in adapters[1:]:
        if other.adapter.style != first.adapter.style:
            raise MismatchError(
                f"{first.model.label} names its tensors in the style of {first.adapter.style}, "
                f"{other.model.label} in that of {other.adapter.style}",
                hint="bring both to one style first: load one with peft or diffusers and save it",
            )
    return first.adapter.style


def module_names(module: ModuleGroup) -> TensorNames:
    """Return the names that the first adapter with this module gives its tensors."""
    update = module.first
    b = update.b.spec.name
    stem = b.removesuffix(".weight")
    names = TensorNames(
        a=update.a.spec.name,
        b=b,
        bias=_name(update, "bias") or f"{stem}.bias",
        magnitude=_name(update, "magnitude") or "",
        alpha=_name(update, "alpha_tensor") or _ALPHA.sub(".alpha", update.a.spec.name),
    )
    if module.name == update.module:
        return names
    old, new = update.module, module.name
    return TensorNames(*(getattr(names, f.name).replace(old, new, 1) for f in fields(names)))


def _name(update: Update, field: str) -> str | None:
    stored = getattr(update, field)
    return None if stored is None else str(stored.spec.name)


def base_layer_name(tensor: str, *, is_wrapped: bool) -> str:
    """Return what peft calls a tensor of the base that an adapter holds whole.

    Args:
        tensor: Its name in the base.
        is_wrapped: Whether the module that has it is changed by factors too.
    """
    module, _, last = tensor.rpartition(".")
    return f"{PREFIX}{module}.base_layer.{last}" if is_wrapped else f"{PREFIX}{tensor}"
