"""How adapters are combined in these tests, and what is claimed of the outputs."""

from __future__ import annotations

import pytest
import torch

from merge_kit import merge
from tests.adapters.makers import KINDS, answers, changed, load_adapted, load_base
from tests.oracles import adapters as oracle

ROUNDING = 2.0**-22
ADDITIVE = ("lora_concat", "lora_linear", "lora_svd")
ALL = (*ADDITIVE, "lora_ties", "lora_dare", "lora_knots")
WEIGHTS = (0.75, -0.5, 1.5)


FAMILIES = {
    "llama": (
        {"r": 4, "lora_alpha": 6, "target_modules": ["q_proj", "down_proj"]},
        {"r": 2, "lora_alpha": 6, "target_modules": "all-linear"},
    ),
    "gpt2": (
        {"r": 4, "lora_alpha": 6, "target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True},
        {"r": 3, "lora_alpha": 2, "target_modules": ["c_attn"], "fan_in_fan_out": True},
    ),
    "net": (
        KINDS["net"].config,
        {"r": 2, "lora_alpha": 3, "target_modules": ["embed", "image", "wave"], "use_rslora": True},
    ),
    "llama_biased": (
        {"r": 4, "lora_alpha": 6, "target_modules": ["q_proj", "up_proj"], "lora_bias": True},
        {"r": 2, "lora_alpha": 3, "target_modules": ["q_proj"], "lora_bias": True},
    ),
}
"""Two adapters of each base that differ in rank, scale and targets."""


def combined(method, adapters, weights, out, *, dtype="float32", seed=0, **parameters):
    """Combine adapters and return what the run returned."""
    models = [
        {"model": str(adapter), "parameters": {"weight": weight}}
        for adapter, weight in zip(adapters, weights, strict=True)
    ]
    recipe = {"merge_method": method, "models": models, "parameters": parameters, "seed": seed}
    return merge({**recipe, **({"dtype": dtype} if dtype else {})}, out)


def assert_in_peft(kind, base, out, wanted):
    """Hold the answers of an output in peft to those of the base with these changes.

    The files mean to peft what they mean to the oracle, to rounding in float64; so what is wanted
    is compared tensor by tensor elsewhere, and here only the answers.
    """
    found = answers(load_adapted(kind, base, out))
    assert float((found - answers(changed(kind, base, oracle.changes(out)))).abs().max()) <= 1e-9
    exact = answers(changed(kind, base, wanted))
    assert float((exact - answers(load_base(kind, base))).abs().max()) > 0.01
    assert float((found - exact).abs().max()) <= 1e-4  # float32 factors; answers of size 10


def assert_sum(out, parts, weights, *, factor=8.0):
    """Hold an output to a weighted sum, to rounding in float32.

    The measure is 2^-22 of the sum of the magnitudes |w| |change|, times a factor; for results
    that are factored anew, of the largest of the whole matrix.
    """
    found, wanted = oracle.changes(out), oracle.summed(parts, weights)
    masses = oracle.masses(parts, weights)
    for name in {*found, *wanted}:
        have = found.get(name, torch.zeros(()))
        slack = factor * ROUNDING * float(masses.get(name, torch.zeros(1)).max())
        assert float((have - wanted.get(name, 0.0)).abs().max()) <= slack, name


def truncation(out, wanted, ranks):
    """Hold an output to the best of its ranks: what it misses is the tail, to rounding."""
    found = oracle.changes(out)
    for name, change in wanted.items():
        norm, tail = float(change.norm()), oracle.tail(change, ranks[name])
        missed = float((found[name] - change).norm())
        assert missed == pytest.approx(tail, rel=1e-4, abs=2.0**-20 * norm), name
        assert int(torch.linalg.matrix_rank(oracle.matrix(found[name]), rtol=1e-6)) <= ranks[name]


def reported(done, wanted, ranks):
    """Hold what a run says it has missed to what it missed."""
    facts = {module.rpartition("/")[2]: fact for module, fact in done.report.facts.items()}
    for name, change in wanted.items():
        fact = facts[name.removesuffix(".weight")]
        assert fact["norm"] == pytest.approx(float(change.norm()), rel=1e-5)
        floor = 2.0**-20 * float(change.norm())
        assert fact["residual"] == pytest.approx(
            oracle.tail(change, ranks[name]), rel=1e-3, abs=floor
        )


def changes_of(adapters):
    """Return every module that some adapter changes, with zeros where one does not."""
    parts = [oracle.changes(adapter) for adapter in adapters]
    blank = oracle.summed(parts, [0.0] * len(parts))
    return [{**blank, **part} for part in parts]
