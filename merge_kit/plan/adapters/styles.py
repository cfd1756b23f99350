"""In what form an adapter that is made says its scales: as its inputs do."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

from merge_kit.io.adapter_values import Style
from merge_kit.plan.adapters.config import adapter_config_text
from merge_kit.plan.adapters.groups import Member
from merge_kit.plan.adapters.made import OutModule

Form = Literal["config", "metadata", "alphas", "none"]
"""adapter_config.json; the same in the file's own metadata, for each component of a pipeline; a
tensor a module; or not at all: every scale is then 1."""

METADATA = "lora_adapter_metadata"
"""Key of a file's metadata under which diffusers keeps the config."""

_STEMS = {"config": "adapter_model"}
_SINGLE_FILE = "pytorch_lora_weights"
_COMPONENTS = ("unet", "transformer", "transformer_2", "prior", "controlnet", "vae")
_TEXT_ENCODER = "text_encoder"


def form_of(style: Style, members: Sequence[Member]) -> Form:
    """Return the form of adapters that all have this style."""
    if style == "peft":
        return "config"
    updates = [update for member in members for update in member.adapter.updates]
    if style == "kohya" or any(update.alpha_tensor is not None for update in updates):
        return "alphas"
    return "metadata" if style == "diffusers" else "none"


def stem_of(form: Form) -> str:
    """Return the stem of the file of an adapter."""
    return _STEMS.get(form, _SINGLE_FILE)


def metadata_text(first: Member, modules: Sequence[OutModule]) -> str:
    """Return what diffusers reads in place of adapter_config.json.

    Args:
        first: The adapter whose metadata is patched, if it has any.
        modules: With their components in front.
    """
    config = first.adapter.config
    if "r" in config:
        return adapter_config_text(first.adapter.config_text, modules)
    packed: dict[str, Any] = {}
    for component in dict.fromkeys(_component(module.module) for module in modules):
        lead = f"{component}." if component else ""
        own = [
            replace(module, module=module.module.removeprefix(lead))
            for module in modules
            if _component(module.module) == component
        ]
        text = adapter_config_text(_template(config, lead), own)
        packed |= {f"{lead}{key}": value for key, value in json.loads(text).items()}
    return json.dumps(packed, indent=2, sort_keys=True)


def _template(config: Mapping[str, Any], lead: str) -> str | None:
    own = {k.removeprefix(lead): v for k, v in config.items() if lead and k.startswith(lead)}
    return json.dumps(own) if own else None


def _component(module: str) -> str:
    first = module.partition(".")[0]
    return first if first in _COMPONENTS or first.startswith(_TEXT_ENCODER) else ""
