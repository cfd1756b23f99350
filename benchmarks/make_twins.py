#!/usr/bin/env python3
"""Write models of real shapes that hold headers only: the weights are holes in sparse files.

    python benchmarks/make_twins.py FOLDER [--size Llama-3.1-405B] [--shard-mb 5000]
    python benchmarks/make_twins.py FOLDER --published

Two models, `one` and `other`, take a few megabytes on the disk and can be planned, not merged. With
--published they are those that the recipes of recipes/published name, and Llama-3.1-405B:

    cd FOLDER && mergekit plan .../recipes/published/goliath.yaml --layers
"""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path

from llama import MODELS, Llama, shards, write_side_files

NAMES = ("one", "other")
MISTRAL: dict[str, object] = {
    "architectures": ["MistralForCausalLM"],
    "model_type": "mistral",
    "max_position_embeddings": 32_768,
    "sliding_window": 4096,
}
PUBLISHED: dict[str, tuple[str, dict[str, object]]] = {
    "Xwin-LM-70B-V0.1": ("Llama-2-70B", {}),
    "Euryale-1.3-L2-70B": ("Llama-2-70B", {}),
    "Mistral-7B-v0.1": ("Mistral-7B", MISTRAL),
    "Llama-3.1-405B": ("Llama-3.1-405B", {"max_position_embeddings": 131_072}),
}
"""Public models by the names of their folders: their shapes, and what their configs say besides."""


def make(target: Path, model: Llama, shard_bytes: int) -> int:
    """Write the headers of one model, its files as long as the real ones; return their number."""
    target.mkdir(parents=True, exist_ok=True)
    files = shards(model, shard_bytes)
    for shard in files:
        header = shard.header()
        path = target / shard.name
        path.write_bytes(header)
        os.truncate(path, len(header) + shard.data_bytes)
    write_side_files(target, model, files)
    return len(files)


def publish(folder: Path, shard_bytes: int) -> None:
    """Write the headers of the public models that recipes name."""
    for name, (size, settings) in PUBLISHED.items():
        count = make(folder / name, MODELS[size], shard_bytes)
        config = MODELS[size].config() | settings
        (folder / name / "config.json").write_text(json.dumps(config, indent=2))
        print(f"{folder / name}: {MODELS[size].parameters:,} weights, {count} files")


def main() -> None:
    """Make the twins that the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--size", choices=MODELS, default="Llama-3.1-405B")
    parser.add_argument("--shard-mb", type=int, default=5000)
    parser.add_argument("--published", action="store_true", help="those that recipes name")
    options = parser.parse_args()
    if options.published:
        publish(options.folder, options.shard_mb * 10**6)
        return
    for name in NAMES:
        count = make(options.folder / name, MODELS[options.size], options.shard_mb * 10**6)
        print(
            f"{options.folder / name}: {MODELS[options.size].parameters:,} weights, {count} files"
        )


if __name__ == "__main__":
    main()
