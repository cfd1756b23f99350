"""Models for the command line, written byte by byte."""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from pathlib import Path

LAYER = {f"model.layers.{i}.mlp.up_proj.weight": (4, 2) for i in range(2)}
SHAPES = {"model.embed_tokens.weight": (3, 2), **LAYER, "model.norm.weight": (2,)}
CONFIG = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "num_hidden_layers": 2,
    "vocab_size": 3,
    "tie_word_embeddings": True,
}


def write_model(
    folder: Path,
    fill: float = 1.0,
    shapes: Mapping[str, tuple[int, ...]] = SHAPES,
    config: Mapping[str, object] = CONFIG,
) -> Path:
    """Write a model of float32 tensors that are all filled with one number, without a library."""
    header, content = {}, b""
    for name, shape in shapes.items():
        count = shape[0] * (shape[1] if len(shape) == 2 else 1)
        offsets = [len(content), len(content) + 4 * count]
        header[name] = {"dtype": "F32", "shape": list(shape), "data_offsets": offsets}
        content += struct.pack("<f", fill) * count
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    folder.mkdir(parents=True)
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + content)
    (folder / "config.json").write_text(json.dumps(config))
    return folder
