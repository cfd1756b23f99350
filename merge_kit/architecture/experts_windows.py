"""Sliding windows in the config of a mixture of experts: every layer keeps its own."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from merge_kit.architecture.config import Config, read_config
from merge_kit.architecture.experts import Layout
from merge_kit.architecture.sections import is_int


def window_values(config: Config, layout: Layout, layers: int) -> dict[str, Any]:
    """Return the keys on sliding windows, so that every layer keeps its own."""
    kind = str(config["model_type"])
    if layout.model_type == "mixtral":
        return {"sliding_window": None} if kind == "llama" else {}
    window = config.get("sliding_window", 4096)
    if kind == "mistral":
        if window is None:
            return {}
        every = ["sliding_attention"] * layers
        return {"use_sliding_window": True, "max_window_layers": 0, "layer_types": every}
    kinds = attention_kinds(config, layers)
    if layout.model_type == "qwen3_moe":
        if "sliding_attention" not in kinds:
            return {"use_sliding_window": False} if config.get("use_sliding_window") else {}
        return {"max_window_layers": 0}
    if config.get("use_sliding_window") and not config.get("layer_types"):
        return {"layer_types": kinds}
    return {}


def attention_kinds(config: Config, layers: int) -> Sequence[str]:
    """Return the attention of each layer of a Qwen2 or Qwen3."""
    full = ["full_attention"] * layers
    if not config.get("use_sliding_window") or config.get("sliding_window", 4096) is None:
        return full
    listed = config.get("layer_types")
    if isinstance(listed, list):
        return [str(kind) for kind in listed]
    first = config.get("max_window_layers", 28)
    return ["sliding_attention" if i >= first else kind for i, kind in enumerate(full)]


def window_problem(config: Config, layers: int) -> str:
    """Return what is wrong with the keys that say which layers have a sliding window."""
    listed = config.get("layer_types")
    if isinstance(listed, list) and len(listed) != layers:
        return f"layer_types has {len(listed)} entries, expected one for each of {layers} layers"
    first = config.get("max_window_layers", 0)
    if config.get("use_sliding_window") and not is_int(first):
        return f"max_window_layers is {first!r}, expected a whole number"
    return ""


def version_notes(text: str, layers: int) -> Iterator[str]:
    """Yield what version 4 of transformers does not read of a sparse config, one sentence each."""
    config = read_config(text, "config.json")
    if config["model_type"] != "qwen2_moe":
        return
    if len(set(attention_kinds(config, layers))) > 1:
        yield (
            "layers differ in their sliding windows (layer_types), which version 5 of transformers "
            "reads for a qwen2_moe, and version 4 does not"
        )
    heads, width, own = (
        config.get(key) for key in ("num_attention_heads", "hidden_size", "head_dim")
    )
    if isinstance(heads, int) and isinstance(own, int) and heads * own != width:
        yield (
            f"head_dim is {own} for {heads} heads in a width of {width}, which version 5 of "
            "transformers reads for a qwen2_moe, and version 4 does not"
        )
