"""Checkpoints whose numbers mean nothing without their scales."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from typing import Any

from merge_kit.core.dtypes import DTYPES

_KEYS = ("quantization_config", "compression_config")
_PACKED = ("I32", "U8", "I8", "U32")


def quantisation_problem(config: Mapping[str, Any], dtypes: Collection[str]) -> str | None:
    """Return a sentence that says how a checkpoint is quantised, None if it is not.

    Args:
        config: Its config.json, {} if it has none.
        dtypes: The dtypes of its tensors, as headers name them ("BF16").
    """
    scaled = sorted(name for name in dtypes if DTYPES[name].kind == "scaled")
    packed = [name for name in _PACKED if name in dtypes]
    held = next(_quantisations(config), None)
    if held is not None:
        stored = " and ".join(scaled or packed)
        weights = f"stores {stored} weights" if stored else "may store its weights rounded to it"
        return f"the model is quantised with {_method(held)} and {weights}"
    if scaled:
        return f"the model stores {' and '.join(scaled)} tensors, numbers that need their scales"
    return None


def _quantisations(config: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    for key, value in config.items():
        if isinstance(value, dict):
            if key in _KEYS:
                yield value
            else:
                yield from _quantisations(value)


def _method(held: Mapping[str, Any]) -> str:
    """Return the method's name and its bits where the config says them."""
    method = held.get("quant_method")
    bits = held.get("bits")
    if not isinstance(method, str):
        method = "bitsandbytes" if "load_in_4bit" in held or "load_in_8bit" in held else ""
        method = method or "a method that config.json does not name"
    if held.get("load_in_4bit") is True:
        bits = 4
    elif held.get("load_in_8bit") is True:
        bits = 8
    return f"{method} ({bits} bits)" if isinstance(bits, int) else method
