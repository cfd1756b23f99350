"""Models of many tensors, each hostile in its own way, for whole merges against oracles."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from tests.oracles.values import DOUBT, Array, Wanted
from tests.toys import write

WEIGHTS = (0.5, 1.25, 0.75, 1.0, 0.25, 1.5, 2.0, 0.625)
"""Powers of two and sums of few: products with small multiples of one are exact."""

EXACT = ("tied", "low_rank", "zeros", "same", "bases", "scalar_zero", "one_zero")
"""Tensors whose sums are exact in float32, so that every vote and every tie is sure."""

Tensors = dict[str, Tensor]


@dataclass(frozen=True, eq=False)
class Inputs:
    """A base and its fine-tunes, as they lie in a folder.

    Attributes:
        folder: Holds `base` and `m0`, `m1`, ..., and statistics `f0`, `g0` and so on.
        base: Tensors of the base.
        models: Tensors of each model.
    """

    folder: Path
    base: Tensors
    models: tuple[Tensors, ...]

    @property
    def weights(self) -> tuple[float, ...]:
        return WEIGHTS[: len(self.models)]

    @cached_property
    def names(self) -> list[str]:
        """Return the names in the order of the output, which is sorted as files are."""
        return sorted(self.base)

    def exact(self, name: str) -> tuple[Array, list[Array]]:
        """Return the base and the models of one tensor in float64."""
        return self.base[name].double().numpy(), [m[name].double().numpy() for m in self.models]

    def doubt(self, name: str) -> float:
        """Return how close to nothing a vote may be before rounding decides it."""
        return 0.0 if name in EXACT else DOUBT


Oracle = Callable[[Inputs], dict[str, Wanted]]


def each(oracle: Callable[..., Wanted]) -> Oracle:
    """Return the oracle of a model from that of one tensor, of (inputs, name, base, models)."""

    def of_all(inputs: Inputs) -> dict[str, Wanted]:
        return {name: oracle(inputs, name, *inputs.exact(name)) for name in inputs.base}

    return of_all


def _fine_tunes(count: int, generator: torch.Generator) -> dict[str, tuple[Tensor, list[Tensor]]]:
    def normal(*shape: int, size: float = 1.0) -> Tensor:
        return size * torch.randn(shape, generator=generator, dtype=torch.float64)

    def tuned(*shape: int, size: float = 0.1) -> tuple[Tensor, list[Tensor]]:
        base = normal(*shape)
        return base, [base + normal(*shape, size=size) for _ in range(count)]

    def grid(*shape: int, most: int, unit: float) -> Tensor:
        steps = torch.randint(-most, most + 1, shape, generator=generator)
        return steps.double() * unit

    found = {"random": tuned(37, 53), "far": tuned(31, 47, size=1.0), "deep": tuned(3, 5, 7)}
    found |= {"experts": tuned(3, 6, 5), "kernel": tuned(4, 3, 2, 3)}
    found |= {"vector": tuned(97), "row": tuned(1, 41), "column": tuned(41, 1)}
    found |= {"one": tuned(1), "scalar": tuned(), "single": tuned(1, 1), "wide": tuned(5, 96)}
    base, models = tuned(48, 40)
    kept = [torch.rand((48, 40), generator=generator) < 0.1 for _ in models]
    sparse = [torch.where(k, m, base) for k, m in zip(kept, models, strict=True)]
    found["sparse"] = base, sparse
    base = grid(48, 64, most=32, unit=2.0**-6)
    found["tied"] = base, [base + grid(48, 64, most=3, unit=2.0**-7) for _ in range(count)]
    base = grid(36, 40, most=32, unit=2.0**-6)
    ranks = [grid(36, 3, most=1, unit=1.0) @ grid(3, 40, most=1, unit=2.0**-7) for _ in models]
    found["low_rank"] = base, [base + rank for rank in ranks]
    found["zeros"] = torch.zeros(8, 9), [torch.zeros(8, 9)] * count
    base, (model,) = grid(9, 10, most=32, unit=2.0**-6), [grid(9, 10, most=16, unit=2.0**-6)]
    found["same"] = base, [model] * count
    found["bases"] = base, [base] * count
    base, models = tuned(19, 23)
    found["one_is_base"] = base, [base, *models[1:]]
    found["scalar_zero"] = torch.zeros(()), [torch.zeros(())] * count
    found["one_zero"] = torch.zeros(1), [torch.zeros(1)] * count
    found["empty"] = torch.zeros(0, 3), [torch.zeros(0, 3)] * count
    return found


def made(folder: Path, count: int, dtype: torch.dtype, *, without: Sequence[str] = ()) -> Inputs:
    """Write a base and fine-tunes of it."""
    generator = torch.Generator().manual_seed(count)
    everything = _fine_tunes(count, generator)
    base = {n: b.to(dtype).clone() for n, (b, _) in everything.items() if n not in without}
    models = tuple(
        {n: m[i].to(dtype).clone() for n, (_, m) in everything.items() if n not in without}
        for i in range(count)
    )
    for name, tensors in [("base", base), *((f"m{i}", m) for i, m in enumerate(models))]:
        write(folder / name, tensors, None)
    for i in range(count):
        save_file(_evidence(base, generator), folder / f"f{i}.safetensors")
        save_file(_grams(base, generator), folder / f"g{i}.safetensors")
    return Inputs(folder, base, models)


def _evidence(base: Tensors, generator: torch.Generator) -> Tensors:
    """Return squared gradients: of very mixed sizes, some zero."""
    found = {}
    for name, tensor in base.items():
        sizes = torch.exp2(torch.randint(-12, 3, tensor.shape, generator=generator).float())
        some = torch.rand(tensor.shape, generator=generator) < 0.9
        found[name] = sizes * some * torch.rand(tensor.shape, generator=generator)
    return found


def _grams(base: Tensors, generator: torch.Generator) -> Tensors:
    """Return the Gram matrices of what the matrices see: many inputs, few, and one never."""
    found = {}
    for name, tensor in base.items():
        if tensor.ndim == 2 and tensor.numel() and name != "wide":  # as an embedding, it has none
            inputs = tensor.shape[1]
            seen = torch.randn(3 * inputs, inputs, generator=generator)
            seen[:, : inputs // 5] *= 0.01
            seen[:, -1] *= inputs == 1
            found[name] = seen.T @ seen / len(seen)
    return found
