"""Whole merges by every method against float64 oracles of its equation, on hostile inputs.

One merge a method, dtype and number of models; every tensor of the models is hostile in its own
way: sparse, tied, zero, of one element, of none. The measure is law 4's.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch

from merge_kit.methods.registry import find
from tests.oracles.case import recipe
from tests.oracles.inputs import made
from tests.oracles.matrix_cases import EVIDENCE, SPECTRAL
from tests.oracles.plain_cases import PLAIN
from tests.oracles.pruning_cases import PRUNING
from tests.toys import merge
from tests.variants import MODEL_METHODS

UNIT = 2.0**-22
"""Law 4's measure."""
LEAST = {torch.float32: 2.0**-146, torch.bfloat16: 2.0**-130, torch.float64: 2.0**-1071}
ROUNDING = {torch.float32: 0.0, torch.bfloat16: 2.0**-8, torch.float64: 0.0}
"""Half a unit of the last place of what is rounded once."""

CASES = {**PLAIN, **PRUNING, **EVIDENCE, **SPECTRAL}
RUNS = [(name, number) for name, case in CASES.items() for number in case.counts]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """Return the models of a dtype and number, written once."""
    known = {}

    def find_or_make(number, dtype):
        if (number, dtype) not in known:
            known[number, dtype] = made(tmp_path_factory.mktemp("models"), number, dtype)
        return known[number, dtype]

    return find_or_make


def faults(case, inputs, dtype) -> dict[str, str]:
    """Return what is wrong with a merge, by tensor."""
    text = recipe(case, len(inputs.models), dtype=str(dtype).removeprefix("torch."))
    merged, found = merge(text, inputs.folder), {}
    unit = case.wide_unit if dtype == torch.float64 else UNIT
    unit *= find(case.method).error_factor
    for name, wanted in case.oracle(inputs).items():
        if merged[name].dtype != dtype or merged[name].shape != inputs.base[name].shape:
            found[name] = f"is {merged[name].dtype} of {tuple(merged[name].shape)}"
            continue
        error = np.abs(merged[name].double().numpy() - wanted.value)
        allowed = unit * wanted.mass + ROUNDING[dtype] * np.abs(wanted.value)
        wrong = wanted.sure & ~(error <= allowed + LEAST[dtype])
        if np.any(wrong):
            at = np.unravel_index(np.argmax(np.where(wrong, error, -1)), error.shape)
            got, want = merged[name].double().numpy()[at], wanted.value[at]
            share = error[at] / (unit * wanted.mass[at] + LEAST[dtype])
            found[name] = f"{int(wrong.sum())} wrong, {got} for {want} at {at}, {share:.3g} x"
        if wanted.sure.size > 50 and wanted.sure.mean() < 0.9:
            found[name] = f"the oracle is sure of {wanted.sure.mean():.0%} only"
    return found


@pytest.mark.parametrize("dtype", ROUNDING, ids=str)
@pytest.mark.parametrize(("name", "number"), RUNS)
def test_a_merge_is_what_the_equation_says(inputs, name, number, dtype):
    assert faults(CASES[name], inputs(number, dtype), dtype) == {}


@pytest.mark.parametrize("method", MODEL_METHODS)
def test_every_method_has_an_oracle(method):
    assert any(case.method == method for case in CASES.values())
