"""Linear layers that store their weights as (inputs, outputs): GPT-2 and its kin."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

TURNED = ("gpt2", "openai-gpt", "imagegpt", "decision_transformer", "clvp")
"""Values of `model_type`."""

_LEAVES = ("c_attn", "c_proj", "c_fc", "q_attn")


def is_turned(config: Mapping[str, Any] | None, module: str) -> bool:
    """Return whether a module stores its weight as (inputs, outputs), by config.json."""
    kind = str((config or {}).get("model_type", ""))
    return kind in TURNED and module.rpartition(".")[2] in _LEAVES
