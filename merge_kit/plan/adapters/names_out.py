"""What the tensors of an adapter that is made are called."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, fields

from merge_kit.errors import MismatchError
from merge_kit.io.adapter_values import Style, Update
from merge_kit.plan.adapters.groups import Member, ModuleGroup

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


def module_names(module: ModuleGroup, *, canonical: bool) -> TensorNames:
    """Return what the tensors of a module are called.

    Args:
        canonical: Whether names are those that peft writes today, rather than those that the first
            adapter with this module has in its file.
    """
    update = module.first
    if canonical and module.kind != "experts":
        return _of_peft(module)
    b = update.b.spec.name
    stem = b.removesuffix(".weight")
    names = TensorNames(
        a=update.a.spec.name,
        b=b,
        bias=_name(update, "bias") or f"{stem}.bias",
        magnitude=_name(update, "magnitude") or "",
        alpha=_name(update, "alpha_tensor") or _ALPHA.sub(".alpha", update.a.spec.name),
    )
    old, new = update.module, module.name
    if module.kind == "experts":  # the name of the parameter is no part of that of the tensor
        old, new = old.rpartition(".")[0], new.rpartition(".")[0]
    changed = [getattr(names, f.name) for f in fields(names)]
    if old != new:
        changed = [name.replace(old, new, 1) for name in changed]
    return TensorNames(*(with_prefix(name) if canonical else name for name in changed))


def _of_peft(module: ModuleGroup) -> TensorNames:
    stem = f"{PREFIX}{module.name}"
    a, b = f"{stem}.lora_A.weight", f"{stem}.lora_B.weight"
    if module.kind == "embedding":
        a, b = f"{stem}.lora_embedding_A", f"{stem}.lora_embedding_B"
    magnitude = f"{stem}.lora_magnitude_vector"
    return TensorNames(a, b, f"{stem}.lora_B.bias", magnitude, f"{stem}.alpha")


def with_prefix(name: str) -> str:
    """Return a name with the prefix of peft, which some files lack and peft looks for."""
    return name if name.startswith(PREFIX) else f"{PREFIX}{name}"


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
