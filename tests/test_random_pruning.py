"""DARE and DELLA in whole merges: what is kept, how often, and what that depends on."""

from __future__ import annotations

import json
from math import sqrt

import numpy as np
import pytest
import torch

from tests.oracles.pruned import drawn, keep_probabilities
from tests.toys import merge, write

METHODS = ("dare_linear", "dare_ties", "della_linear", "della")
ROWS, COLUMNS = 300, 200
SIGMAS = 5.0


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Write task vectors whose elements all differ from 0, under several names."""
    root = tmp_path_factory.mktemp("models")
    generator = torch.Generator().manual_seed(0)
    zeros = {"x": torch.zeros(ROWS, COLUMNS), "y": torch.zeros(ROWS, COLUMNS)}
    write(root / "base", zeros, None)
    for name in ("a", "b", "same"):
        values = torch.rand((ROWS, COLUMNS), generator=generator) + 0.5
        values = values if name != "same" else torch.ones(ROWS, COLUMNS)
        write(root / name, {"x": values, "y": values.clone()}, None)
    return root


def masks(folder, method, models=("a",), *, tensor="x", seed=0, density=0.3, **parameters):
    """Return which elements were kept of the last model, by giving the others no weight."""
    last = len(models) - 1
    text = {
        "merge_method": method,
        "base_model": "base",
        "models": [
            {"model": m, "parameters": {"weight": float(i == last)}} for i, m in enumerate(models)
        ],
        "parameters": {"density": density, **parameters},
        "seed": seed,
    }
    if method.startswith("della"):
        text["parameters"].setdefault("epsilon", 0.1)
    return (merge(json.dumps(text), folder)[tensor] != 0).numpy()


def within(kept, chances) -> bool:
    """Return whether a count is within five sigma of the sum of independent chances."""
    spread = sqrt(float(np.sum(chances * (1 - chances))))
    return abs(float(kept.sum()) - float(np.sum(chances))) <= SIGMAS * spread


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("density", [0.2, 0.5, 0.9])
def test_as_many_are_kept_as_the_density_says(folder, method, density):
    kept = masks(
        folder, method, density=density, **({"epsilon": 0.08} if "della" in method else {})
    )
    assert within(kept, np.full(kept.shape, density))
    for axis in (0, 1):
        size = kept.shape[axis]
        spread = sqrt(density * (1 - density) / size)
        means = kept.mean(axis=axis)
        assert np.all(np.abs(means - density) <= 6 * spread + ("della" in method) * 0.09)


@pytest.mark.parametrize("variant", ["mergekit", "paper"])
@pytest.mark.parametrize("method", ["della_linear", "della"])
def test_each_rank_is_kept_as_often_as_its_probability_says(folder, method, variant):
    kept = masks(folder, method, density=0.5, epsilon=0.4, variant=variant)
    delta = merge(json.dumps({"merge_method": "passthrough", "models": [{"model": "a"}]}), folder)
    values = delta["x"].double().numpy()
    chances = drawn(keep_probabilities(values, 0.5, 0.4, paper=variant == "paper"))
    order = np.argsort(np.abs(values), axis=1)
    for group in np.array_split(np.arange(COLUMNS), 10):  # ranks together, over all rows
        picked = np.take_along_axis(kept, order[:, group], axis=1)
        assert within(picked, np.take_along_axis(chances, order[:, group], axis=1))


@pytest.mark.parametrize("method", METHODS)
def test_elements_rows_models_tensors_and_seeds_are_independent(folder, method):
    """The correlation of two masks is normal with sigma 1 / sqrt(elements)."""
    first = masks(folder, method)
    others = {
        "next element": np.roll(first, 1),
        "next row": np.roll(first, 1, axis=0),
        "another model": masks(folder, method, ("b", "a")),
        "another tensor": masks(folder, method, tensor="y"),
        "another seed": masks(folder, method, seed=1),
        "far seed": masks(folder, method, seed=2**40),
    }
    if method.startswith("della"):  # magnitudes correlate where the same tensor is ranked again
        first = masks(folder, method, ("same",))
        others = {"next row": np.roll(first, 1, axis=0)}
        others["another seed"] = masks(folder, method, ("same",), seed=1)
        others["another tensor"] = masks(folder, method, ("same",), tensor="y")
        others["another model"] = masks(folder, method, ("a", "same"))
    centred = first - 0.3
    for what, other in others.items():
        share = float(np.mean(centred * (other - 0.3))) / (0.3 * 0.7)
        expected = rank_correlation(method)
        assert abs(share - expected) <= SIGMAS / sqrt(first.size) + 1e-3 * expected, what


def rank_correlation(method: str) -> float:
    """Return the correlation that equal ranks give: the variance of the window, 0 for DARE."""
    return 0.0 if method.startswith("dare") else (0.2**2 / 12) / (0.3 * 0.7)


@pytest.mark.parametrize("method", METHODS)
def test_a_mask_belongs_to_position_name_and_seed_alone(folder, method):
    """Not to the model's folder, to later models, or to what else is merged."""
    first = masks(folder, method, ("a",))
    assert np.array_equal(first, masks(folder, method, ("a",)))
    (folder / "copy").mkdir(exist_ok=True)
    (folder / "copy/model.safetensors").write_bytes((folder / "a/model.safetensors").read_bytes())
    assert np.array_equal(first, masks(folder, method, ("copy",)))
    second = masks(folder, method, ("b", "a"))
    assert np.array_equal(second, masks(folder, method, ("same", "a")))
    assert not np.array_equal(first, second)


@pytest.mark.parametrize("method", METHODS)
def test_the_mean_over_seeds_is_the_task_vector(folder, method):
    """40 seeds of 60,000 elements: unbiased, element by element and on the whole."""
    density = 0.4
    text = {
        "merge_method": method,
        "base_model": "base",
        "models": [{"model": "a", "parameters": {"weight": 1}}],
        "parameters": {"density": density, "normalize": False},
    }
    if method.startswith("della"):
        text["parameters"]["epsilon"] = 0.2
    wanted = merge(json.dumps({"merge_method": "passthrough", "models": [{"model": "a"}]}), folder)
    values, total, seeds = wanted["x"].double().numpy(), 0.0, 40
    for seed in range(seeds):
        total = total + merge(json.dumps({**text, "seed": seed}), folder)["x"].double().numpy()
    chances = np.full(values.shape, density)
    if method.startswith("della"):
        chances = drawn(keep_probabilities(values, density, 0.2, paper=False))
    spread = np.abs(values) * np.sqrt((1 - chances) / chances / seeds)
    off = (total / seeds - values) / spread
    assert abs(off.mean()) <= SIGMAS / sqrt(off.size)
    assert abs(off.var() - 1) <= SIGMAS * sqrt(2 / off.size) * 1.5
    assert np.abs(off).max() <= 6.5


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("density", [0.0, 1.0])
def test_nothing_and_everything(folder, method, density):
    assert masks(folder, method, density=density).mean() == density
