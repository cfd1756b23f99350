"""Each method against float64 oracles written from its equation, by law 4's measure."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
import torch

from merge_kit.core.tensors import BLOCK
from merge_kit.methods.base import MergeMethod, PerModel
from merge_kit.methods.linear import Linear
from merge_kit.methods.passthrough import Passthrough
from merge_kit.methods.slerp import Slerp
from merge_kit.methods.task_arithmetic import TaskArithmetic
from tests.engine.handmade import run, step, stored

SIZE = 2 * BLOCK + 77


def linear(weights, models, base):
    total = sum(weights)
    terms = [w / total * x for w, x in zip(weights, models, strict=True)]
    return sum(terms), sum(np.abs(t) for t in terms)


def unnormalised(weights, models, base):
    terms = [w * x for w, x in zip(weights, models, strict=True)]
    return sum(terms), sum(np.abs(t) for t in terms)


def task_vectors(weights, models, base):
    terms = [0.7 * w * (x - base) for w, x in zip(weights, models, strict=True)]
    mass = np.abs(base) + sum(
        abs(0.7 * w) * (np.abs(x) + np.abs(base)) for w, x in zip(weights, models, strict=True)
    )
    return base + sum(terms), mass


def arc(weights, models, base):
    x, t = models[0], 0.37
    u, v = (
        y.astype(np.longdouble) / np.sqrt(np.sum(y.astype(np.longdouble) ** 2)) for y in (base, x)
    )
    between, opposite = np.sqrt(np.sum((u - v) ** 2)), np.sqrt(np.sum((u + v) ** 2))
    theta = 2 * np.arctan2(between, opposite)
    if np.sin(theta) <= 1e-6:
        a, b = 1 - t, t
    else:
        a, b = np.sin((1 - t) * theta) / np.sin(theta), np.sin(t * theta) / np.sin(theta)
    a, b = float(a), float(b)
    return a * base + b * x, abs(a) * np.abs(base) + abs(b) * np.abs(x)


def row_arcs(weights, models, base):
    rows = [
        arc(weights, [x], b)
        for x, b in zip(models[0].reshape(-1, 7), base.reshape(-1, 7), strict=True)
    ]
    return np.concatenate([r[0] for r in rows]), np.concatenate([r[1] for r in rows])


def scaled(weights, models, base):
    return 1.7 * models[0], np.abs(1.7 * models[0])


@dataclass(frozen=True)
class Case:
    make: object
    oracle: object
    counts: tuple[int, ...]
    shape: tuple[int, ...] = (SIZE,)
    base: bool = True


CASES = {
    "linear": Case(lambda w: Linear(weight=PerModel(w)), linear, (1, 2, 4, 8, 20), base=False),
    "linear sum": Case(
        lambda w: Linear(weight=PerModel(w), normalize=False), unnormalised, (2, 4, 8), base=False
    ),
    "task_arithmetic": Case(
        lambda w: TaskArithmetic(weight=PerModel(w), lambda_=0.7), task_vectors, (1, 2, 4, 8)
    ),
    "slerp": Case(lambda w: Slerp(t=0.37), arc, (1,)),
    "slerp rows": Case(lambda w: Slerp(t=0.37, flatten=False), row_arcs, (1,), (7 * 500, 7)),
    "passthrough": Case(lambda w: Passthrough(scale=PerModel((1.7,))), scaled, (1,), base=False),
}


def numbers(kind: str, count: int, shape, generator) -> list[torch.Tensor]:
    """Return models: independent, cancelling, fine-tunes of one base, or of very mixed sizes."""
    first = torch.randn(shape, generator=generator)
    if kind == "cancelling":
        return [first * (-1) ** i * (1 + i * 1e-6) for i in range(count)]
    if kind == "fine-tunes":
        return [first + 1e-3 * torch.randn(shape, generator=generator) for _ in range(count)]
    if kind == "mixed sizes":
        scales = torch.exp2(torch.randint(-30, 30, shape, generator=generator).float())
        return [torch.randn(shape, generator=generator) * scales for _ in range(count)]
    return [torch.randn(shape, generator=generator) for _ in range(count)]


def merged(case: Case, count: int, models, base, folder, dtype="F32"):
    generator = np.random.default_rng(count)
    weights = [float(np.float32(w)) for w in generator.uniform(-0.4, 1.4, count)]
    sources = [stored(folder, f"m{i}", m) for i, m in enumerate(models)]
    ground = stored(folder, "base", base) if case.base else None
    method: MergeMethod = case.make(weights)
    wide = "F64" if count + case.base > 4 else None
    one = step(method, sources, base=ground, dtype=dtype, compute=wide)
    result = run([one], folder / "out")["x"]
    exact = [m.double().numpy().ravel() for m in models]
    wanted, mass = case.oracle(weights, exact, base.double().numpy().ravel())
    return method, result, wanted, mass


@pytest.mark.parametrize("kind", ["independent", "cancelling", "fine-tunes", "mixed sizes"])
@pytest.mark.parametrize("name", CASES)
def test_before_rounding_within_law_4(tmp_path, name, kind):
    case, generator = CASES[name], torch.Generator().manual_seed(3)
    for count in case.counts:
        base, *models = numbers(kind, count + 1, case.shape, generator)
        folder = tmp_path / str(count)
        folder.mkdir()
        method, result, wanted, mass = merged(case, count, models, base, folder)
        error = np.abs(result.double().numpy().ravel() - wanted)
        assert np.all(error <= 2.0**-22 * method.error_factor * mass + 1e-45)


@pytest.mark.parametrize("name", CASES)
def test_after_rounding_equal_to_the_oracle_almost_everywhere(tmp_path, name):
    case, generator = CASES[name], torch.Generator().manual_seed(4)
    for count in case.counts:
        base, *models = [
            t.bfloat16() for t in numbers("fine-tunes", count + 1, case.shape, generator)
        ]
        folder = tmp_path / str(count)
        folder.mkdir()
        _, result, wanted, _ = merged(case, count, models, base, folder, "BF16")
        rounded = torch.from_numpy(wanted).bfloat16()
        equal = (result.flatten() == rounded).double().mean()
        assert equal >= 0.995


def test_fifty_models_equal_the_float64_mean_rounded_once(tmp_path):
    generator = torch.Generator().manual_seed(9)
    models = [torch.randn(9_999, generator=generator).bfloat16() for _ in range(50)]
    sources = [stored(tmp_path, f"m{i}", m) for i, m in enumerate(models)]
    method = Linear(weight=PerModel([1.0] * 50))
    result = run([step(method, sources, dtype="F32", compute="F64")], tmp_path / "out")["x"]
    exact = torch.stack([m.double() for m in models]).sum(0) / 50
    assert (result == exact.float()).double().mean() > 0.999
