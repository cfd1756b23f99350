"""Trimming where hundreds of elements tie: the number kept is exact, the first are kept."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from merge_kit.core.tensors import BLOCK
from tests.oracles.pruned import largest, without_outliers
from tests.toys import merge, write

TIED, ABOVE = 510, 13_000
DENSITY = (ABOVE + 200) / 65_536
"""Of the tied elements 200 are kept."""


def with_ties(seed: int, size=65_536, tied=TIED, above=ABOVE) -> torch.Tensor:
    """Return bfloat16 numbers of which many have the magnitude 1, and so many are larger."""
    generator = torch.Generator().manual_seed(seed)
    low = torch.rand(size - tied - above, generator=generator) * 0.96
    high = 1.0625 + torch.rand(above, generator=generator)
    values = torch.cat([low, torch.ones(tied), high])
    signs = torch.randint(0, 2, (size,), generator=generator) * 2 - 1
    return (values * signs)[torch.randperm(size, generator=generator)].bfloat16()


def merged(folder, tensors, method, **parameters):
    """Return what trimming leaves of one task vector, and the vector."""
    write(folder / "base", {n: torch.zeros_like(t) for n, t in tensors.items()}, None)
    write(folder / "m", tensors, None)
    text = {
        "merge_method": method,
        "base_model": "base",
        "models": [{"model": "m", "parameters": {"weight": 1}}],
        "parameters": parameters,
        "dtype": "float32",
    }
    return merge(json.dumps(text), folder)


@pytest.mark.parametrize("method", ["ties", "magnitude", "breadcrumbs", "breadcrumbs_ties"])
def test_of_510_equal_magnitudes_at_the_threshold_the_first_200_are_kept(tmp_path, method):
    values = with_ties(1).reshape(256, 256)
    gamma = {"gamma": 0} if method.startswith("bread") else {}
    result = merged(tmp_path, {"x": values}, method, density=DENSITY, **gamma)["x"]
    kept = (result != 0).flatten()
    assert int(kept.sum()) == int(DENSITY * 65_536)
    tied = (values.abs() == 1).flatten()
    assert torch.equal(kept[tied], torch.arange(TIED) < 200)
    assert torch.equal(result[result != 0], values.float()[result != 0])


@pytest.mark.parametrize("method", ["breadcrumbs", "breadcrumbs_ties"])
def test_of_equal_magnitudes_the_first_are_the_outliers(tmp_path, method):
    """Both cuts fall among the 510: the first 200 are removed, the next 150 kept."""
    values = with_ties(2)
    gamma, density = (ABOVE + 200.5) / 65_536, 150.5 / 65_536
    result = merged(tmp_path, {"x": values}, method, density=density, gamma=gamma)["x"]
    kept, tied = result != 0, values.abs() == 1
    places = torch.arange(TIED)
    assert int(kept.sum()) == 150
    assert torch.equal(kept[tied], (places >= 200) & (places < 350))
    wanted = without_outliers(values.double().numpy(), density, gamma)
    assert np.array_equal(kept.numpy(), wanted)


@pytest.mark.parametrize("method", ["ties", "magnitude"])
@pytest.mark.parametrize("names", [("a", "b", "c"), ("z", "m", "d")])
def test_over_a_whole_model_the_first_tensors_of_the_output_are_kept(tmp_path, method, names):
    tensors = {
        names[0]: with_ties(3),
        names[1]: with_ties(4, BLOCK + 999, 700, 20_000).reshape(1, -1),
        names[2]: torch.tensor([1.0, -1.0, 0.5, 3.0]).bfloat16(),
    }
    ordered = sorted(tensors)
    arrays = [tensors[name].double().numpy() for name in ordered]
    count = sum(a.size for a in arrays)
    above = sum(int((np.abs(a) > 1).sum()) for a in arrays)
    for more in (1, 509, 511, 700, 1_100):
        place = tmp_path / str(more)
        density = (above + more + 0.5) / count
        result = merged(place, tensors, method, density=density, scope="model")
        for name, wanted in zip(ordered, largest(arrays, density), strict=True):
            assert np.array_equal(result[name].numpy() != 0, wanted), (name, more)


@pytest.mark.parametrize("method", ["ties", "magnitude"])
@pytest.mark.parametrize("scope", ["tensor", "model"])
def test_where_all_are_equal_the_first_are_kept(tmp_path, method, scope):
    values = torch.full((3, 70_000), -0.25)
    result = merged(tmp_path, {"x": values}, method, density=0.3, scope=scope)["x"]
    kept = (result != 0).flatten()
    assert torch.equal(kept, torch.arange(210_000) < int(0.3 * 210_000))


@pytest.mark.parametrize("method", ["ties", "magnitude"])
@pytest.mark.parametrize("density", [1e-6, 1e-4, 0.5, 1 - 1e-6, 1.0])
def test_the_number_kept_is_exact(tmp_path, method, density):
    values = torch.randn(70_001, generator=torch.Generator().manual_seed(0))
    result = merged(tmp_path, {"x": values}, method, density=density)["x"]
    assert int((result != 0).sum()) == max(1, int(density * 70_001))
