"""Means of shared changes, single changes whole or strengthened: by hand and against oracles."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from merge_kit.core.tensors import BLOCK
from merge_kit.errors import ParameterError
from merge_kit.methods.ram import RAM
from merge_kit.methods.ramplus_tl import RAMPlusTL
from tests.engine.handmade import run, step, stored


def a_step(method, folder, base, models, name="x", compute=None, dtype="F32"):
    folder.mkdir(parents=True, exist_ok=True)
    sources = [stored(folder, f"{name}-m{i}", torch.as_tensor(m)) for i, m in enumerate(models)]
    ground = stored(folder, f"{name}-base", torch.as_tensor(base))
    return step(method, sources, base=ground, name=name, compute=compute, dtype=dtype)


def merged(method, folder, base, models, *, compute=None, dtype="F32", **options):
    one = a_step(method, folder, base, models, compute=compute, dtype=dtype)
    return run([one], folder / "out", **options)["x"]


BASE = [10.0, 20.0, 30.0, 40.0, 50.0]
FIRST = [12.0, 20.0, 33.0, 40.0, 54.0]
"""Changes +2, 0, +3, 0, +4."""
SECOND = [10.0, 24.0, 32.0, 40.0, 50.0]
"""Changes 0, +4, +2, 0, 0: the third is shared."""


def test_shared_changes_are_averaged_and_others_taken_whole(tmp_path):
    result = merged(RAM(), tmp_path, BASE, [FIRST, SECOND])
    assert result.tolist() == [12.0, 24.0, 32.5, 40.0, 54.0]


def test_three_models_are_averaged_over_those_that_changed_it(tmp_path):
    models = [[3.0, 0.0], [-6.0, 0.0], [0.0, 5.0]]
    assert merged(RAM(), tmp_path, [0.0, 0.0], models).tolist() == [-1.5, 5.0]


def test_single_changes_are_strengthened_by_what_is_shared(tmp_path):
    """The first shares 1 and has 2 alone, the second shares 1 and has 1: factors 1.25 and 1.5."""
    method = RAMPlusTL(r=0.5, alpha=2.0)
    result = merged(method, tmp_path, BASE, [FIRST, SECOND])
    assert result.tolist() == [12.5, 26.0, 32.5, 40.0, 55.0]


def test_alpha_caps_the_ratio(tmp_path):
    """Ratios .5 and 1 are cut to .25: both factors are 1.125."""
    method = RAMPlusTL(r=0.5, alpha=0.25)
    result = merged(method, tmp_path, BASE, [FIRST, SECOND])
    assert result.tolist() == [12.25, 24.5, 32.5, 40.0, 54.5]


def test_by_default_single_changes_gain_two_per_cent(tmp_path):
    result = merged(RAMPlusTL(), tmp_path, [0.0] * 5, [[2.0, 0, 3, 0, 4], [0, 4.0, 2, 0, 0]])
    assert result.tolist() == pytest.approx([2.04, 4.08, 2.5, 0.0, 4.08])


def test_counts_over_the_whole_model(tmp_path):
    """In `a` the first has one change alone; with `b` it shares 3 and has 1: factors 4 and 1.

    In `b` nothing is alone, so only `a` shows the difference: per tensor its ratio is 0.
    """
    a = ([0.0, 0.0], [[1.0, 0.0], [0.0, 0.0]])
    b = ([0.0] * 3, [[1.0] * 3, [3.0] * 3])
    for scope, wanted in (("tensor", 1.0), ("model", 4.0)):
        method, folder = RAMPlusTL(r=1.0, alpha=9.0, scope=scope), tmp_path / scope
        steps = [a_step(method, folder, *a, name="a"), a_step(method, folder, *b, name="b")]
        result = run(steps, folder / "out")
        assert result["a"].tolist() == [wanted, 0.0]
        assert result["b"].tolist() == [2.0] * 3


def test_all_changes_shared_divides_by_no_zero(tmp_path):
    method = RAMPlusTL(r=1.0, alpha=100.0)
    assert merged(method, tmp_path, [0.0, 0.0], [[1.0, 2.0], [3.0, 4.0]]).tolist() == [2.0, 3.0]


@pytest.mark.parametrize("make", [RAM, RAMPlusTL])
def test_changes_up_to_epsilon_are_none(tmp_path, make):
    """0.25 equals epsilon and is dropped; the other model's 0.5 is then not shared."""
    models = [[0.25, 0.25, -0.5], [0.5, 0.25, 0.25]]
    result = merged(make(epsilon=0.25), tmp_path / "a", [0.0] * 3, models)
    assert result.tolist() == [0.5, 0.0, -0.5]
    small = [[1e-5, 0.9e-5, 1.1e-5], [0.0, 0.0, 0.0]]
    result = merged(make(), tmp_path / "b", [0.0] * 3, small)
    assert result.tolist() == pytest.approx([0.0, 0.0, 1.1e-5])


@pytest.mark.parametrize("make", [RAM, RAMPlusTL])
def test_epsilon_of_zero_takes_every_change(tmp_path, make):
    assert merged(make(epsilon=0.0), tmp_path, [0.0, 0.0], [[1e-38, 0.0]]).tolist() == (
        pytest.approx([1e-38, 0.0], rel=1e-6)
    )


@pytest.mark.parametrize("make", [RAM, RAMPlusTL])
@pytest.mark.parametrize("count", [0, 1, 3])
@pytest.mark.parametrize("shape", [(), (1,), (0,), (0, 3), (3, 0)])
def test_copies_of_the_base_of_every_shape_give_the_base(tmp_path, shape, count, make):
    base = torch.full(shape, 0.3)
    assert merged(make(), tmp_path, base, [base] * count).equal(base)


@pytest.mark.parametrize("make", [RAM, RAMPlusTL])
@pytest.mark.parametrize("epsilon", [-1e-9, float("nan"), float("inf")])
def test_an_epsilon_out_of_range_is_refused(make, epsilon):
    with pytest.raises(ParameterError, match=r"epsilon is .*, expected a number of at least 0"):
        make(epsilon=epsilon)


@pytest.mark.parametrize("values", [{"r": float("nan")}, {"alpha": -0.1}, {"alpha": float("inf")}])
def test_factors_out_of_range_are_refused(values):
    with pytest.raises(ParameterError, match="expected a"):
        RAMPlusTL(**values)


def oracle(deltas, base, r, alpha):
    deltas = np.asarray(deltas)
    changed = np.abs(deltas) > 1e-5
    count = changed.sum(axis=0)
    shared = (changed & (count > 1)).sum(axis=1)
    unique = (changed & (count == 1)).sum(axis=1)
    factors = 1 + r * np.clip(shared / np.maximum(unique, 1), 0, alpha)
    alone = np.where(count == 1, factors[:, None], 1.0)
    terms = alone * deltas * changed / np.maximum(count, 1)
    return base + terms.sum(axis=0), np.abs(base) + np.abs(deltas).max(axis=0)


@pytest.mark.parametrize(("r", "alpha"), [(None, 0.0), (0.1, 0.2), (0.7, 5.0)])
@pytest.mark.parametrize("share", [0.05, 0.5, 1.0])
def test_within_law_4_of_the_equation(tmp_path, share, r, alpha):
    generator = torch.Generator().manual_seed(6)
    for count in (1, 2, 3, 8):
        base = torch.randn(BLOCK + 77, generator=generator)
        changed = [torch.rand(base.shape, generator=generator) < share for _ in range(count)]
        models = [base + 0.01 * c * torch.randn(base.shape, generator=generator) for c in changed]
        wide = torch.float64 if count > 3 else torch.float32
        deltas = [(m.to(wide) - base.to(wide)).double().numpy() for m in models]
        wanted, mass = oracle(deltas, base.double().numpy(), r or 0.0, alpha)
        method = RAM() if r is None else RAMPlusTL(r=r, alpha=alpha)
        compute = "F64" if count > 3 else None
        result = merged(method, tmp_path / str(count), base, models, compute=compute, dtype="F64")
        error = np.abs(result.numpy() - wanted)
        assert np.all(error <= 2.0**-22 * method.error_factor * mass)


def test_slab_size_and_threads_change_no_bit_of_model_scope(tmp_path):
    generator = torch.Generator().manual_seed(2)
    base, *models = (torch.randn(4 * BLOCK + 5, generator=generator) for _ in range(4))
    models = [base + m * (m > 1) for m in models]
    results = [
        merged(
            RAMPlusTL(r=1.0, scope="model"),
            tmp_path / f"{b}-{w}",
            base,
            models,
            blocks=b,
            workers=w,
        )
        for b, w in itertools.product((1, 3), (1, 2))
    ]
    assert all(torch.equal(results[0], other) for other in results[1:])
