"""Vectors for the geometric methods: kinds of inputs, a run by the engine, law 4's measure."""

from __future__ import annotations

import numpy as np
import torch

from merge_kit.core.tensors import BLOCK
from tests.engine.handmade import run, step, stored

SIZE = BLOCK + 77
KINDS = ("independent", "fine-tunes", "sparse", "mixed sizes", "unequal")


def numbers(kind: str, count: int, shape=(SIZE,), seed: int = 5) -> list[torch.Tensor]:
    """Return a base and models."""
    generator = torch.Generator().manual_seed(seed)
    drawn = [torch.randn(shape, generator=generator) for _ in range(count + 1)]
    if kind == "fine-tunes":
        return [drawn[0], *(drawn[0] + 1e-3 * x for x in drawn[1:])]
    if kind == "sparse":
        return [x * (torch.rand(shape, generator=generator) < 0.05) for x in drawn]
    if kind == "mixed sizes":
        scales = torch.exp2(torch.randint(-30, 30, shape, generator=generator).float())
        return [x * scales for x in drawn]
    if kind == "unequal":
        return [x * 10.0 ** (3 * i) for i, x in enumerate(drawn)]
    return drawn


def merged(method, models, base, folder, **more) -> torch.Tensor:
    """Return what the engine makes of tensors, as a recipe would; base None for none."""
    folder.mkdir(parents=True, exist_ok=True)
    models = [torch.as_tensor(m) for m in models]
    sources = [stored(folder, f"m{i}", m) for i, m in enumerate(models)]
    ground = None if base is None else stored(folder, "base", torch.as_tensor(base))
    wide = any(m.dtype == torch.float64 for m in models)
    compute = "F64" if wide or len(models) + (base is not None) > 4 else "F32"
    dtype = "F64" if wide else "F32"
    one = step(method, sources, base=ground, dtype=dtype, compute=compute)
    return run([one], folder / "out", **more)["x"]


def exact(tensor: torch.Tensor) -> np.ndarray:
    """Return a tensor with more digits than anything under test, shape kept."""
    return tensor.double().numpy().astype(np.longdouble)


def length(vector: np.ndarray):
    """Return the Euclidean length."""
    return np.sqrt(np.sum(vector * vector))


def within_law_4(method, result: torch.Tensor, terms, *, slack=0.0) -> None:
    """Check a result against the sum of the oracle's terms, by law 4's measure."""
    wanted, mass = sum(terms), sum(np.abs(term) for term in terms)
    error = np.abs(exact(result) - wanted)
    assert np.all(error <= 2.0**-22 * method.error_factor * mass + slack + 1e-45)
