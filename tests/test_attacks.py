"""What a hostile caller tries: each attack ends in words, and NaN is where it must be."""

from __future__ import annotations

from math import inf, nan

import pytest
import torch
from safetensors.torch import load_file, save_file

import merge_kit as mk
from merge_kit.errors import MergeKitError, PlanError, UsageError

SPECTRAL = ("iso_c", "iso_cts", "tsv", "wudi")
TWO = [{"x": torch.ones(2, 3)}, {"x": torch.arange(6.0).view(2, 3)}]
TASK = mk.TaskVector({"x": torch.ones(3)}, {"x": torch.zeros(3)})


def merged(folder, method, base, model, **parameters):
    """Return the tensor of a merge of files in which NaN and infinity may pass."""
    for name, tensor in (("base", base), ("model", model)):
        save_file({"x": tensor}, folder / f"{name}.safetensors")
    recipe = {
        "merge_method": method,
        "base_model": str(folder / "base.safetensors"),
        "models": [{"model": str(folder / "model.safetensors")}],
        "parameters": parameters,
    }
    mk.merge(recipe, folder / "out", allow_nonfinite=True)
    return load_file(folder / "out" / "model.safetensors")["x"]


@pytest.mark.parametrize(("elements", "density"), [(4, 0.3), (400_000, 1e-5)])
def test_an_infinite_change_is_the_largest_of_all(tmp_path, elements, density):
    """A cut at infinity keeps what is infinite; it is not a cut that keeps nothing."""
    model = torch.linspace(1, 2, elements)
    count = int(elements * density)
    model[1 : 1 + count] = inf
    out = merged(tmp_path, "ties", torch.zeros(elements), model, weight=1, density=density)
    assert out.isinf().nonzero().flatten().tolist() == list(range(1, 1 + count))
    assert int(torch.count_nonzero(out)) == count


@pytest.mark.parametrize("method", SPECTRAL)
@pytest.mark.parametrize("bad", [nan, inf])
def test_a_matrix_that_is_not_finite_has_no_singular_vectors(tmp_path, method, bad):
    model = torch.arange(24.0).view(2, 3, 4)
    model[1, 0, 0] = bad
    out = merged(tmp_path, method, torch.zeros(2, 3, 4), model)
    assert out.isnan().all()


@pytest.mark.parametrize("method", SPECTRAL)
def test_differences_that_overflow_are_values_that_are_too_large(method):
    large = torch.full((3, 3), torch.finfo(torch.float32).max)
    with pytest.raises(MergeKitError, match="too large for F32"):
        mk.merge_tensors(method, [-large], base=large)


def test_differences_of_the_largest_floats_are_no_warning():
    large = torch.full((2, 3), torch.finfo(torch.float64).max, dtype=torch.float64)
    assert torch.equal(mk.merge_tensors("arcee_fusion", [-large], base=large).abs(), large)


@pytest.mark.parametrize("weight", [1e200, 1e308])
def test_weights_whose_square_overflows_are_an_error(weight):
    tensors = [model["x"] for model in TWO]
    with pytest.raises(MergeKitError, match="expected at most 1e\\+100"):
        mk.merge_tensors("multislerp", tensors, weights=weight, normalize_weights=False)


@pytest.mark.parametrize("method", ["karcher", "nuslerp", "linear", "multislerp", "rescale"])
def test_weights_whose_sum_overflows_are_refused(method):
    with pytest.raises(MergeKitError, match="sums to inf"):
        getattr(mk, method)(TWO, weight=1e308).state_dict()


@pytest.mark.parametrize("name", [None, ["ties"], 3])
def test_a_method_is_named_by_text(name):
    with pytest.raises(PlanError, match="expected its name"):
        mk.merge_tensors(name, [model["x"] for model in TWO])


def test_a_parameter_is_given_once():
    with pytest.raises(UsageError, match="lambda twice"):
        mk.ties(TWO[0], [TWO[1]], **{"lambda": 0.5, "lambda_": 2})


@pytest.mark.parametrize("score", [None, 0.5])
def test_a_soup_is_scored_by_a_function(score):
    with pytest.raises(UsageError, match="expected a function"):
        mk.greedy_soup(TWO, score)


def test_a_score_that_fits_no_float_is_refused():
    with pytest.raises(UsageError, match="expected a number"):
        mk.greedy_soup(TWO, lambda merge: 10**400)


@pytest.mark.parametrize("key", ["seed", "position"])
@pytest.mark.parametrize("value", [-1, "a", 1.5, True])
def test_random_pruning_takes_whole_numbers(key, value):
    with pytest.raises(UsageError, match=f"{key} is .*, expected a whole number"):
        TASK.prune(0.5, how="random", **{key: value})


@pytest.mark.parametrize("measure", ["compare", "cosine", "sign_conflict"])
def test_task_vectors_are_compared_with_task_vectors(measure):
    with pytest.raises(UsageError, match="expected a task vector"):
        getattr(TASK, measure)(None)


@pytest.mark.parametrize("threads", ["x", 1.5, True, 0])
def test_threads_are_a_whole_number(tmp_path, threads):
    save_file(TWO[0], tmp_path / "one.safetensors")
    recipe = {"merge_method": "linear", "models": [{"model": str(tmp_path / "one.safetensors")}]}
    recipe["parameters"] = {"weight": 1}
    with pytest.raises(PlanError, match="expected 1 to 1024"):
        mk.merge(recipe, tmp_path / "out", threads=threads)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("seed", ["x", 1.5, True, -1])
def test_a_seed_is_a_whole_number(tmp_path, seed):
    save_file(TWO[0], tmp_path / "one.safetensors")
    recipe = {"merge_method": "linear", "models": [{"model": str(tmp_path / "one.safetensors")}]}
    recipe["parameters"] = {"weight": 1}
    with pytest.raises(UsageError, match="expected a whole number"):
        mk.plan(recipe, seed=seed)
