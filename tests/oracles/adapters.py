"""What adapters change, in float64, read from their files alone: no peft, no merge_kit."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

PREFIX = "base_model.model."
Changes = dict[str, Tensor]
"""What is added to each tensor of the base, by its name, in float64 and in its layout."""


@dataclass(frozen=True)
class Files:
    """The two files of a peft adapter."""

    config: Mapping[str, Any]
    tensors: Mapping[str, Tensor]


def read(folder: Path) -> Files:
    """Return the config of an adapter and its tensors in float64."""
    config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    tensors = load_file(folder / "adapter_model.safetensors")
    return Files(config, {name: tensor.double() for name, tensor in tensors.items()})


def _first_match(patterns: Mapping[str, float], module: str, default: float) -> float:
    for pattern, value in patterns.items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            return value
    return default


def scale(config: Mapping[str, Any], module: str) -> float:
    """Return alpha / r, or alpha / sqrt(r), of a module."""
    rank = _first_match(config["rank_pattern"], module, config["r"])
    alpha = _first_match(config["alpha_pattern"], module, config["lora_alpha"])
    return alpha / (math.sqrt(rank) if config["use_rslora"] else rank)


def changes(folder: Path) -> Changes:
    """Return what a LoRA adapter without lengths (DoRA) and without experts adds to its base."""
    files, found = read(folder), {}
    for name, a in files.tensors.items():
        if ".lora_A." in name:
            path = name.removesuffix(".lora_A.weight")
            found |= _of_module(files, path, a, files.tensors[f"{path}.lora_B.weight"])
        elif name.endswith(".lora_embedding_A"):
            path = name.removesuffix(".lora_embedding_A")
            b = files.tensors[f"{path}.lora_embedding_B"]
            module = path.removeprefix(PREFIX)
            found[f"{module}.weight"] = scale(files.config, module) * (b @ a).T
    return found


def _of_module(files: Files, path: str, a: Tensor, b: Tensor) -> Changes:
    module = path.removeprefix(PREFIX)
    factor = scale(files.config, module)
    matrix = b.flatten(1) @ a.flatten(1)  # (out, in * kernel)
    change = matrix.reshape(b.shape[0], *a.shape[1:])
    if files.config["fan_in_fan_out"]:
        change = change.T
    found = {f"{module}.weight": factor * change}
    if f"{path}.lora_B.bias" in files.tensors:
        found[f"{module}.bias"] = factor * files.tensors[f"{path}.lora_B.bias"]
    return found


def summed(parts: Sequence[Changes], weights: Sequence[float]) -> Changes:
    """Return the weighted sum of changes; a tensor that some lack is not changed by those."""
    total: Changes = {}
    for part, weight in zip(parts, weights, strict=True):
        for name, change in part.items():
            total[name] = total.get(name, torch.zeros_like(change)) + weight * change
    return total


def masses(parts: Sequence[Changes], weights: Sequence[float]) -> Changes:
    """Return the sum of the magnitudes of the terms: what rounding is measured by."""
    return summed([{k: v.abs() for k, v in p.items()} for p in parts], [abs(w) for w in weights])


def matrix(change: Tensor) -> Tensor:
    """Return a change as a matrix: a kernel is one row an output."""
    return change.flatten(1) if change.ndim > 1 else change[:, None]


def rank_for_energy(change: Tensor, energy: float) -> int:
    """Return the smallest rank whose squared singular values are this share of all."""
    squares = torch.linalg.svdvals(matrix(change)).square()
    shares = squares.cumsum(0) / squares.sum()
    return int((shares < energy).sum()) + 1


def tail(change: Tensor, rank: int) -> float:
    """Return the root of the sum of the squared singular values beyond a rank."""
    return float(torch.linalg.svdvals(matrix(change))[rank:].square().sum().sqrt())


def truncated(change: Tensor, rank: int) -> Tensor:
    """Return the nearest matrix of a rank."""
    u, s, v = torch.linalg.svd(matrix(change), full_matrices=False)
    return ((u[:, :rank] * s[:rank]) @ v[:rank]).reshape(change.shape)


def trimmed(change: Tensor, density: float) -> Tensor:
    """Return the int(density n) largest elements, at least 1, and zeros."""
    if density == 0:
        return torch.zeros_like(change)
    keep = max(1, int(density * change.numel()))
    order = change.flatten().abs().argsort(descending=True, stable=True)
    mask = torch.zeros(change.numel(), dtype=torch.bool)
    mask[order[:keep]] = True
    return change * mask.reshape(change.shape)


def ties(
    parts: Sequence[Tensor],
    weights: Sequence[float],
    densities: Sequence[float],
    *,
    normalize: bool = True,
) -> Tensor:
    """Return TIES of changes: trim, elect by weighted mass, merge what agrees."""
    terms = [w * trimmed(p, d) for p, w, d in zip(parts, weights, densities, strict=True)]
    sign = torch.where(sum(terms) < 0, -1.0, 1.0)
    agree = [(torch.sign(term) == sign).double() for term in terms]
    total = sum(term * a for term, a in zip(terms, agree, strict=True))
    if not normalize:
        return total
    mass = sum(abs(w) * a for w, a in zip(weights, agree, strict=True))
    return total / torch.where(mass == 0, 1.0, mass)


def knots(
    parts: Sequence[Tensor], weights: Sequence[float], densities: Sequence[float], **more: bool
) -> Tensor:
    """Return TIES in the space that all changes share (KnOTS): out = U ties(S V_1, S V_2, ...).

    A change of zeros would only be rounding there, which votes: it must not be among them.

    Args:
        parts: (outputs, inputs) or kernels.
    """
    matrices = [matrix(part) for part in parts]
    assert all(bool(one.any()) for one in matrices)
    u, s, v = torch.linalg.svd(torch.cat(matrices, dim=1), full_matrices=False)
    kept = s > s[0] * 1e-12
    aligned = (s[:, None] * v)[kept].split([m.shape[1] for m in matrices], dim=1)
    merged = u[:, kept] @ ties(aligned, weights, densities, **more)
    return merged.reshape(parts[0].shape)
