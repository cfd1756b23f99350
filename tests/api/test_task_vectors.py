from __future__ import annotations

from math import sqrt

import pytest
import torch

import merge_kit as mk
from tests.api.conftest import SHAPES


def vector(x, y=0.0, base=1.0) -> mk.TaskVector:
    """Return a task vector of two tensors: (x, y) and (0)."""
    fine_tune = {"w": torch.tensor([base + x, base + y]), "b": torch.tensor([base])}
    return mk.TaskVector(fine_tune, {"w": torch.full((2,), base), "b": torch.tensor([base])})


def test_a_task_vector_is_model_minus_base():
    found = vector(3.0, 4.0).state_dict()
    assert found["w"].tolist() == [3.0, 4.0]
    assert found["b"].tolist() == [0.0]


def test_task_vectors_add_subtract_scale_and_negate():
    one, other = vector(3.0, 4.0), vector(1.0, base=10.0)  # each has a base of its own
    assert (one + other).state_dict()["w"].tolist() == [4.0, 4.0]
    assert (one - 2 * other).state_dict()["w"].tolist() == [1.0, 4.0]
    assert (-one / 2).state_dict()["w"].tolist() == [-1.5, -2.0]


def test_norm_and_cosine_worked_by_hand():
    assert vector(3.0, 4.0).norm() == 5.0
    assert (vector(3.0, 4.0) * -2).norm() == 10.0
    assert vector(3.0, 4.0).cosine(vector(1.0)) == pytest.approx(0.6, abs=1e-15)
    assert vector(3.0, 4.0).cosine(vector(-3.0, -4.0)) == -1.0
    assert vector(0.0, 2.0).cosine(vector(5.0)) == 0.0


def test_a_zero_vector_has_no_angle():
    assert vector(0.0).norm() == 0.0
    with pytest.raises(mk.UsageError, match="length 0 has no angle"):
        vector(0.0).cosine(vector(1.0))


def test_files_and_mappings_give_the_same_numbers(family):
    stored = mk.TaskVector(family.path("code"), family.path("base"))
    held = mk.TaskVector(family.code, family.base)
    other = mk.TaskVector(family.math, family.path("base"))
    assert stored.norm() == held.norm()
    assert stored.cosine(other) == held.cosine(mk.TaskVector(family.math, family.base))
    for name, tensor in stored.state_dict().items():
        assert tensor.dtype == torch.float32
        assert torch.equal(tensor, family.code[name].float() - family.base[name].float())
        assert torch.equal(tensor, held.state_dict()[name])


def test_lengths_are_those_of_float64_and_leave_integers_out(family):
    task = mk.TaskVector(family.path("code"), family.path("base"))
    assert set(task.state_dict()) == set(SHAPES)
    deltas = [family.code[n].double() - family.base[n].double() for n in SHAPES]
    wanted = sqrt(sum(float(delta.square().sum()) for delta in deltas))
    # float32 deltas of 2^-24 relative error each, and independent sums of 2^-53
    assert task.norm() == pytest.approx(wanted, rel=2.0**-24)


def test_float64_models_have_float64_differences():
    one, tiny = torch.tensor([1.0], dtype=torch.float64), 2.0**-40
    found = mk.TaskVector({"x": one + tiny}, {"x": one}).state_dict()["x"]
    assert found.dtype == torch.float64
    assert found.item() == tiny


def test_integers_that_differ_have_no_difference_and_do_no_harm():
    one = {"x": torch.ones(1), "i": torch.tensor([1])}
    other = {"x": torch.zeros(1), "i": torch.tensor([2])}
    assert list(mk.TaskVector(one, other).state_dict()) == ["x"]
