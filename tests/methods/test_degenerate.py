"""The cases in which a formula divides by nothing, worked by hand."""

from __future__ import annotations

from math import acos, atan, pi, sin, sqrt

import pytest
import torch

from merge_kit.errors import ParameterError
from merge_kit.methods.base import PerModel
from merge_kit.methods.linear import Linear
from merge_kit.methods.slerp import Slerp, coefficients
from merge_kit.methods.task_arithmetic import TaskArithmetic
from tests.engine.handmade import run, step, stored


def slerp(folder, base, other, **parameters):
    sources = [stored(folder, "other", torch.as_tensor(other))]
    ground = stored(folder, "base", torch.as_tensor(base))
    return run([step(Slerp(**parameters), sources, base=ground)], folder / "out")["x"]


@pytest.mark.parametrize("weights", [(1.0, -1.0), (1.0, -0.9999999)])
@pytest.mark.parametrize(
    "make",
    [
        lambda w: Linear(weight=w),
        lambda w: TaskArithmetic(weight=w, normalize=True),
    ],
    ids=["linear", "task_arithmetic"],
)
def test_weights_that_cancel_cannot_be_normalised(make, weights):
    with pytest.raises(ParameterError, match="normalising would divide by it"):
        make(PerModel(weights))


def test_weights_of_zero_cannot_be_averaged():
    with pytest.raises(ParameterError, match="normalising would divide by it"):
        Linear(weight=PerModel((0.0, 0.0)))


def test_no_task_at_all_leaves_the_base(tmp_path):
    base, other = stored(tmp_path, "a", torch.ones(3)), stored(tmp_path, "b", torch.zeros(3))
    method = TaskArithmetic(weight=PerModel((0.0,)), normalize=True)
    result = run([step(method, [other], base=base)], tmp_path / "out")["x"]
    assert result.tolist() == [1, 1, 1]


def test_weights_that_cancel_may_be_summed():
    assert Linear(weight=PerModel((1.0, -1.0)), normalize=False).weight == (1.0, -1.0)


def test_slerp_at_right_angles(tmp_path):
    result = slerp(tmp_path, [2.0, 0.0], [0.0, 4.0], t=0.5)
    half = sin(pi / 4)
    torch.testing.assert_close(result, torch.tensor([2 * half, 4 * half]))


def test_slerp_at_sixty_degrees(tmp_path):
    result = slerp(tmp_path, [1.0, 0.0], [0.5, sqrt(3) / 2], t=0.5)
    torch.testing.assert_close(result, torch.tensor([sqrt(3) / 2, 0.5]))


@pytest.mark.parametrize("t", [-0.5, 0.0, 0.3, 1.0, 1.5])
def test_slerp_of_a_zero_vector_is_linear(tmp_path, t):
    assert slerp(tmp_path, [0.0, 0.0], [4.0, 8.0], t=t).tolist() == pytest.approx([4 * t, 8 * t])


def test_slerp_of_parallel_vectors_is_linear(tmp_path):
    assert slerp(tmp_path, [1.0, 1.0], [3.0, 3.0], t=0.25).tolist() == [1.5, 1.5]


def test_slerp_of_opposite_vectors_passes_through_zero(tmp_path):
    assert slerp(tmp_path, [1.0, 2.0], [-1.0, -2.0], t=0.5).tolist() == [0.0, 0.0]


@pytest.mark.parametrize(("t", "wanted"), [(0.0, [3.0, 1.0]), (1.0, [-2.0, 5.0])])
def test_slerp_ends_at_its_models(tmp_path, t, wanted):
    assert slerp(tmp_path, [3.0, 1.0], [-2.0, 5.0], t=t).tolist() == wanted


def test_slerp_beyond_its_ends_goes_on_along_the_arc(tmp_path):
    result = slerp(tmp_path, [1.0, 0.0], [0.0, 1.0], t=2.0)
    torch.testing.assert_close(result, torch.tensor([-1.0, 0.0]), atol=1e-6, rtol=0)


def test_slerp_of_numbers_without_a_direction(tmp_path):
    assert slerp(tmp_path, 2.0, 4.0, t=0.5) == 3.0
    assert slerp(tmp_path, torch.zeros(0, 3), torch.zeros(0, 3), t=0.5).shape == (0, 3)


def test_slerp_by_rows_turns_each_row_alone(tmp_path):
    base = [[1.0, 0.0], [0.0, 0.0], [1.0, 1.0]]
    other = [[0.0, 1.0], [4.0, 4.0], [3.0, 3.0]]
    half = sin(pi / 4)
    wanted = [[half, half], [2.0, 2.0], [2.0, 2.0]]
    result = slerp(tmp_path, base, other, t=0.5, flatten=False)
    torch.testing.assert_close(result, torch.tensor(wanted))


def test_slerp_is_linear_only_below_a_millionth():
    a, b = coefficients(3e-6, 0.25)
    assert (a, b) == pytest.approx((0.75, 0.25), abs=1e-9)
    assert coefficients(pi - 9e-7, 0.5) == (0.5, 0.5)
    wide = coefficients(acos(0.9997), 0.5)  # where others switch to linear
    assert wide[0] == wide[1] == pytest.approx(1 / sqrt(2 * (1 + 0.9997)), rel=1e-9)
    assert wide[0] > 0.5


@pytest.mark.parametrize("flatten", [True, False])
def test_slerp_close_to_opposite_keeps_its_accuracy(tmp_path, flatten):
    small = 2.0**-16
    base, other = [1.0, 0.0], [-1.0, small]
    theta = pi - atan(small)
    a = sin(0.7 * theta) / sin(theta)
    b = sin(0.3 * theta) / sin(theta)
    result = slerp(tmp_path, base, other, t=0.3, flatten=flatten)
    rounding = 2.0**-21 * (abs(a) + abs(b))  # law 4's measure; the first element cancels
    assert result.tolist() == pytest.approx([a - b, b * small], rel=1e-6, abs=rounding)
    assert result[1] == pytest.approx(b * small, rel=1e-6)


def test_three_models_by_a_sequence_of_arcs(tmp_path):
    a, b, c = torch.eye(3)
    first = slerp(tmp_path, a, b, t=1 / 2)
    (tmp_path / "2").mkdir()
    second = slerp(tmp_path / "2", first, c, t=1 / 3)
    assert float(second.norm()) == pytest.approx(1.0)
    assert second[0] == pytest.approx(float(second[1]))
