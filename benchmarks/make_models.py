#!/usr/bin/env python3
"""Write three models of one shape with random bf16 weights: `base`, and fine-tunes `a` and `b`.

    python benchmarks/make_models.py FOLDER [--size 1.2B] [--shard-mb 500] [--only base]

Weights of the base are drawn from N(0, 0.02), those of a fine-tune lie N(0, 0.002) off the base's,
so that angles, signs and differences are like those of trained models. Models that are there
already are kept.
"""

from __future__ import annotations

import argparse
import shutil
from collections.abc import Iterator
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
from llama import MODELS, Llama, shards, write_side_files
from numpy.typing import NDArray

CHUNK = 1 << 22  # elements drawn at once
NAMES = ("base", "a", "b")


def bf16(values: NDArray[Any]) -> NDArray[Any]:
    """Return the bits of float32 values in bf16, rounded to the nearest, ties to even."""
    bits = values.view(np.uint32)
    return ((bits + (0x7FFF + ((bits >> 16) & 1))) >> 16).astype(np.uint16)


def weights(name: str, elements: int, tensor: int) -> Iterator[NDArray[Any]]:
    """Yield the bf16 bits of one tensor of a model, chunk by chunk."""
    for chunk, start in enumerate(range(0, elements, CHUNK)):
        count = min(CHUNK, elements - start)
        values = _normal(count, 0.02, (0, tensor, chunk))
        if name != "base":
            values += _normal(count, 0.002, (NAMES.index(name), tensor, chunk))
        yield bf16(values)


def _normal(count: int, scale: float, seed: tuple[int, ...]) -> NDArray[Any]:
    generator = np.random.Generator(np.random.SFC64(np.random.SeedSequence(seed)))
    return generator.standard_normal(count, dtype=np.float32) * np.float32(scale)


def make(folder: Path, name: str, model: Llama, shard_bytes: int) -> None:
    """Write one model into folder/name, whole or not at all."""
    target, partial = folder / name, folder / f"{name}.partial"
    if target.exists():
        return
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    files = shards(model, shard_bytes)
    tensor = 0
    for shard in files:
        with (partial / shard.name).open("wb") as file:
            file.write(shard.header())
            for _, shape in shard.tensors:
                for bits in weights(name, prod(shape), tensor):
                    file.write(bits.data)
                tensor += 1
    write_side_files(partial, model, files)
    partial.rename(target)


def main() -> None:
    """Make the models that the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--size", choices=MODELS, default="1.2B")
    parser.add_argument("--shard-mb", type=int, default=500)
    parser.add_argument("--only", choices=NAMES, action="append", help="repeatable")
    options = parser.parse_args()
    for name in options.only or NAMES:
        make(options.folder, name, MODELS[options.size], options.shard_mb * 10**6)


if __name__ == "__main__":
    main()
