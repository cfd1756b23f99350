"""Small adapters for tests: written by peft, or tensor by tensor."""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

LINEAR = {"l.q_proj.lora_A.weight": (2, 8), "l.q_proj.lora_B.weight": (6, 2)}
"""One pair of factors of rank 2."""

CONFIG = {"peft_type": "LORA", "r": 2, "lora_alpha": 8, "target_modules": ["q_proj"]}


def write_file(path: Path, tensors: Mapping[str, Any], metadata: dict[str, str] | None = None):
    """Write tensors, given as arrays or as shapes of zeros in float32."""
    arrays = {
        name: np.zeros(value, np.float32) if isinstance(value, tuple) else np.asarray(value)
        for name, value in tensors.items()
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(arrays, path, metadata)
    return path


def write_folder(
    folder: Path, tensors: Mapping[str, Any], prefix: str = "base_model.model.", **config: Any
) -> Path:
    """Write a folder as peft does, with CONFIG and what is said beside it."""
    named = {f"{prefix}{name}": value for name, value in tensors.items()}
    write_file(folder / "adapter_model.safetensors", named)
    (folder / "adapter_config.json").write_text(json.dumps(CONFIG | config))
    return folder


def made_by_peft(model: Any, folder: Path, **config: Any) -> Any:
    """Save an adapter of a model with peft and return peft's model."""
    from peft import LoraConfig, get_peft_model  # noqa: PLC0415 - slow, and not always needed

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # advice on embeddings and configs
        made = get_peft_model(model, LoraConfig(**config))
        made.save_pretrained(folder)
    return made
