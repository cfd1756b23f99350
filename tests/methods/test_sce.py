"""Selection by variance, weights by energy, signs by majority: by hand and against an oracle."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from merge_kit.core.tensors import BLOCK
from merge_kit.errors import ParameterError
from merge_kit.methods.sce import SCE
from merge_kit.methods.variance import spread
from tests.engine.handmade import run, step, stored


def sce(folder, base, models, *, compute=None, dtype="F32", options=None, **parameters):
    folder.mkdir(parents=True, exist_ok=True)
    sources = [stored(folder, f"m{i}", torch.as_tensor(m)) for i, m in enumerate(models)]
    ground = stored(folder, "base", torch.as_tensor(base))
    one = step(SCE(**parameters), sources, base=ground, compute=compute, dtype=dtype)
    return run([one], folder / "out", **(options or {}))["x"]


BASE = torch.tensor([10.0, 20.0, 30.0, 40.0])
FIRST = BASE + torch.tensor([3.0, 0.0, -1.0, 0.0])
SECOND = BASE + torch.tensor([1.0, 2.0, 3.0, -1.0])


def test_weights_are_energies_and_minorities_are_erased(tmp_path):
    """Energies 10 and 15, so weights .4 and .6; zeros and the -1 against the 3 have no vote."""
    result = sce(tmp_path, BASE, [FIRST, SECOND])
    wanted = [10 + 0.4 * 3 + 0.6 * 1, 20 + 2, 30 + 3, 40 - 1]
    torch.testing.assert_close(result, torch.tensor(wanted))


def test_half_of_the_elements_by_variance(tmp_path):
    """They differ by 2, 2, 4, 1: the third is selected, then the first of two equal ones.

    The selected deltas have the energies 9 + 1 and 1 + 9: equal weights.
    """
    result = sce(tmp_path, BASE, [FIRST, SECOND], select_topk=0.5)
    assert result.tolist() == [12, 20, 33, 40]


def test_elements_in_which_models_agree_are_not_counted(tmp_path):
    """Two of six differ; half of two is one. With 1.0 the four others come back."""
    models = [[1.0, 1.0, 1.0, 1.0, 1.0, 5.0], [1.0, 1.0, 1.0, 1.0, 2.0, 1.0]]
    assert sce(tmp_path / "a", [0.0] * 6, models, select_topk=0.5).tolist()[:5] == [0.0] * 5
    assert sce(tmp_path / "b", [0.0] * 6, models, select_topk=0.999).tolist()[:4] == [0.0] * 4
    assert sce(tmp_path / "c", [0.0] * 6, models).tolist()[:4] == [1.0] * 4


def test_a_share_that_comes_to_no_element_gives_the_base(tmp_path):
    assert sce(tmp_path, BASE, [FIRST, SECOND], select_topk=0.2).tolist() == BASE.tolist()


def test_three_models_by_their_variance(tmp_path):
    """Variances 2/3, 2/9 and 2.0 of (0, 1, 2), (0, 0, 1) and (0, 0, 2.999): one of three."""
    models = [[0.0, 0.0, 0.0], [1.0, 0.0, 0.0], [2.0, 1.0, 2.999]]
    result = sce(tmp_path, [0.0] * 3, models, select_topk=0.34)
    assert result.tolist() == pytest.approx([0.0, 0.0, 2.999])


@pytest.mark.parametrize("count", [3, 4, 7])
def test_equal_variances_of_many_models_are_equal(count):
    """The same values in another order, on the grid of 16-bit floats."""
    values = torch.randn(count, generator=torch.Generator().manual_seed(count)).bfloat16().float()
    orders = list(itertools.permutations(range(count)))[:: 1 if count == 3 else 37]
    rows = torch.stack([values[list(order)] for order in orders], dim=1)
    found = spread(rows)
    assert found.unique().numel() == 1
    wanted = count**2 * np.var(values.double().numpy())
    assert float(found[0]) == pytest.approx(wanted, rel=1e-12)


@pytest.mark.parametrize("count", [1, 2, 3, 6])
def test_models_that_agree_have_no_variance(count):
    row = torch.randn(99, generator=torch.Generator().manual_seed(1)) / 3
    assert not spread(row.repeat(count, 1)).any()


def test_small_task_vectors_keep_their_weights(tmp_path):
    """Deltas 1e-5 and 3e-5: weights .1 and .9, also where mean squares are 1e-9."""
    result = sce(tmp_path, [0.0] * 4, [[1e-5] * 4, [3e-5] * 4])
    assert result.tolist() == pytest.approx([0.1e-5 + 2.7e-5] * 4)


@pytest.mark.parametrize("small", [1e-4, 1e-12, 1e-19])
def test_what_only_a_light_model_changed_is_taken_whole(tmp_path, small):
    result = sce(tmp_path, [0.0, 0.0], [[1.0, 0.0], [0.0, small]])
    assert result.tolist() == pytest.approx([1.0, small], rel=1e-6)


@pytest.mark.parametrize("size", [1e-28, 1e-15, 1e30])
def test_a_light_model_keeps_its_digits_at_every_scale(tmp_path, size):
    """Its weight is 1e-10, and 1e-33 times that is no normal float."""
    result = sce(tmp_path, [0.0, 0.0], [[size, 0.0], [0.0, size * 1e-5]])
    assert result.tolist() == pytest.approx([size, size * 1e-5], rel=1e-6, abs=0.0)


@pytest.mark.parametrize("share", [1.0, 0.5])
def test_squares_that_overflow_leave_finite_weights(tmp_path, share):
    """All weigh the same; float64 squares of 1e200 are infinite."""
    models = torch.tensor([[1e200, 3e200], [3e200, -1e200], [1e200, 2e200]], dtype=torch.float64)
    base = torch.zeros(2, dtype=torch.float64)
    result = sce(tmp_path, base, models.unbind(), dtype="F64", select_topk=share)
    assert torch.isfinite(result).all()
    assert share < 1 or result.tolist() == pytest.approx([5e200 / 3, 2.5e200])


def test_a_sum_of_zero_counts_as_positive(tmp_path):
    assert sce(tmp_path, [1.0], [[3.0], [-1.0]]).tolist() == [3.0]


def test_one_model_is_the_result_whatever_is_selected(tmp_path):
    for share in (1.0, 0.3):
        assert sce(tmp_path / str(share), BASE, [SECOND], select_topk=share).equal(SECOND)


def test_nothing_selected_is_the_base(tmp_path):
    assert sce(tmp_path / "2", BASE, [FIRST, SECOND], select_topk=0.0).equal(BASE)
    assert sce(tmp_path / "1", BASE, [SECOND], select_topk=0.0).equal(BASE)


@pytest.mark.parametrize("share", [1.0, 0.5])
def test_the_base_alone_is_the_base(tmp_path, share):
    assert sce(tmp_path, BASE, [], select_topk=share).equal(BASE)


@pytest.mark.parametrize("share", [1.0, 0.5, 0.0])
@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize("shape", [(), (1,), (0,), (0, 3), (3, 0)])
def test_copies_of_the_base_of_every_shape_give_the_base(tmp_path, shape, count, share):
    base = torch.full(shape, 0.3)
    assert sce(tmp_path, base, [base] * count, select_topk=share).equal(base)


@pytest.mark.parametrize("share", [-0.1, 1.5, float("nan")])
def test_a_share_out_of_range_is_refused(share):
    with pytest.raises(ParameterError, match=r"select_topk is .*, expected a number in \[0, 1\]"):
        SCE(select_topk=share)


def oracle(deltas, base, share):
    """Return the result in float64, its measure, and where rounding does not decide the vote."""
    deltas = np.asarray(deltas, dtype=np.float64)
    keep = np.ones(base.size, dtype=bool)
    if share < 1 and len(deltas) > 1:
        exact = deltas.astype(np.longdouble)
        variance = len(exact) * np.sum(exact**2, axis=0) - np.sum(exact, axis=0) ** 2
        variance[np.all(deltas == deltas[0], axis=0)] = 0
        k = int(share * np.count_nonzero(variance))
        keep[:] = False
        keep[np.argsort(-variance, kind="stable")[:k]] = True
    kept = np.where(keep, deltas, 0.0)
    energy = np.sum(kept**2, axis=1)
    weight = energy / energy.sum()
    total = kept.sum(axis=0)
    agree = np.sign(kept) == np.where(total >= 0, 1.0, -1.0)
    mass = np.sum(weight[:, None] * agree, axis=0)
    mean = np.sum(weight[:, None] * agree * kept, axis=0) / np.where(mass > 0, mass, 1.0)
    clear = np.abs(total) >= 2.0**-21 * np.abs(kept).sum(axis=0)
    return base + mean, np.abs(base) + np.abs(kept).max(axis=0), clear


def numbers(kind, count, generator):
    size = BLOCK + 77
    first = torch.randn(size, generator=generator)
    if kind == "fine-tunes":
        return [first + 1e-3 * torch.randn(size, generator=generator) for _ in range(count)]
    if kind == "sparse":
        changed = [torch.rand(size, generator=generator) < 0.1 for _ in range(count)]
        return [first + 0.01 * c * torch.randn(size, generator=generator) for c in changed]
    if kind == "tied":
        return [torch.randint(-2, 3, (size,), generator=generator) * 2.0**-7 for _ in range(count)]
    scales = torch.exp2(torch.randint(-30, 30, (size,), generator=generator).float())
    return [torch.randn(size, generator=generator) * scales for _ in range(count)]


@pytest.mark.parametrize("share", [1.0, 0.3, 0.01])
@pytest.mark.parametrize("kind", ["fine-tunes", "sparse", "tied", "mixed sizes"])
def test_within_law_4_of_the_equation(tmp_path, kind, share):
    generator = torch.Generator().manual_seed(5)
    for count in (1, 2, 3, 8):
        base, *models = numbers(kind, count + 1, generator)
        wide = torch.float64 if count > 3 else torch.float32
        deltas = [(m.to(wide) - base.to(wide)).double().numpy() for m in models]
        wanted, mass, clear = oracle(deltas, base.double().numpy(), share)
        compute = "F64" if count > 3 else None
        folder = tmp_path / str(count)
        result = sce(folder, base, models, select_topk=share, compute=compute, dtype="F64")
        error = np.abs(result.numpy() - wanted)
        clear |= kind == "tied"  # sums on a grid are exact
        assert clear.mean() > 0.99
        assert np.all(error[clear] <= 2.0**-22 * SCE.error_factor * mass[clear])


@pytest.mark.parametrize("count", [2, 3, 8])
def test_slab_size_and_threads_change_no_bit_of_a_selection(tmp_path, count):
    generator = torch.Generator().manual_seed(count)
    base, *models = numbers("tied", count + 1, generator)
    base, *models = (torch.cat([m] * 4) for m in (base, *models))
    results = [
        sce(
            tmp_path / f"{blocks}-{workers}",
            base,
            models,
            select_topk=0.3,
            compute="F64" if count > 3 else None,
            options={"blocks": blocks, "workers": workers},
        )
        for blocks, workers in itertools.product((1, 3), (1, 2))
    ]
    assert all(torch.equal(results[0], other) for other in results[1:])
