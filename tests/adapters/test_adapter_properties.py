"""The sum law for any adapters: ranks, scales, modules, dtypes and weights at random."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from merge_kit import merge
from tests.oracles import adapters as oracle

SHAPES = {"a.q_proj": (6, 5), "a.k_proj": (4, 5), "b.q_proj": (6, 5), "b.up_proj": (9, 6)}
"""(outputs, inputs) of each module."""

Spec = tuple[Mapping[str, int], int, float, bool, str]
"""Of one adapter: ranks by module, seed, alpha, rsLoRA, dtype."""

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float64": torch.float64}
spec: st.SearchStrategy[Spec] = st.tuples(
    st.dictionaries(st.sampled_from(sorted(SHAPES)), st.integers(1, 4), min_size=1),
    st.integers(0, 2**16),
    st.floats(0.25, 32, width=16),
    st.booleans(),
    st.sampled_from(sorted(DTYPES)),
)
weight = st.floats(-4, 4, width=16).filter(lambda w: w == 0 or abs(w) > 2.0**-6)
some = st.lists(st.tuples(spec, weight), min_size=1, max_size=4)


def write(folder: Path, made: Spec) -> Path:
    """Write an adapter whose modules may all have ranks of their own."""
    ranks, seed, alpha, rslora, dtype = made
    generator = torch.Generator().manual_seed(seed)
    held = {}
    for module, rank in ranks.items():
        rows, columns = SHAPES[module]
        path = f"{oracle.PREFIX}{module}"
        for name, shape in ((f"{path}.lora_A", (rank, columns)), (f"{path}.lora_B", (rows, rank))):
            values = torch.randn(shape, generator=generator, dtype=torch.float64)
            held[f"{name}.weight"] = values.to(DTYPES[dtype])
    folder.mkdir()
    save_file(held, folder / "adapter_model.safetensors")
    config = {
        "peft_type": "LORA",
        "base_model_name_or_path": "base",
        "r": 3,
        "lora_alpha": alpha,
        "use_rslora": rslora,
        "rank_pattern": {f"{m.replace('.', chr(92) + '.')}": r for m, r in ranks.items() if r != 3},
        "alpha_pattern": {},
        "fan_in_fan_out": False,
        "target_modules": sorted({module.rpartition(".")[2] for module in ranks}),
        "bias": "none",
    }
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def combined(folder: Path, specs: Sequence[tuple[Spec, float]], method: str, **parameters):
    """Return what a method makes of adapters, and the float64 changes of each."""
    adapters = [write(folder / f"m{i}", made) for i, (made, _) in enumerate(specs)]
    models = [
        {"model": str(adapter), "parameters": {"weight": w}}
        for adapter, (_, w) in zip(adapters, specs, strict=True)
    ]
    recipe = {"merge_method": method, "models": models, "dtype": "float32"}
    merge({**recipe, "parameters": parameters}, folder / "out", threads=1)
    return oracle.changes(folder / "out"), [oracle.changes(adapter) for adapter in adapters]


def assert_sum(found, parts, weights, factor):
    wanted, masses = oracle.summed(parts, weights), oracle.masses(parts, weights)
    for name in {*found, *wanted}:
        blank = torch.zeros_like(found.get(name, wanted.get(name)))
        slack = factor * 2.0**-22 * float(masses.get(name, blank).max())
        miss = found.get(name, blank) - wanted.get(name, blank)
        assert float(miss.abs().max()) <= slack, name


# products of factors of up to four columns, each rounded once: |b| @ |a| is up to ~10 |b @ a|
@pytest.mark.parametrize("method", ["lora_concat", "lora_linear"])
@given(specs=some)
@settings(max_examples=25)
def test_any_adapters_are_summed(method, specs):
    with tempfile.TemporaryDirectory() as folder:
        found, parts = combined(Path(folder), specs, method)
        assert_sum(found, parts, [w for _, w in specs], 64.0)


@given(specs=some, rank=st.integers(1, 9))
@settings(max_examples=25)
def test_what_a_rank_leaves_out_is_the_tail(specs, rank):
    with tempfile.TemporaryDirectory() as folder:
        found, parts = combined(Path(folder), specs, "lora_svd", rank=rank)
    weights = [w for _, w in specs]
    wanted, masses = oracle.summed(parts, weights), oracle.masses(parts, weights)
    for name, change in wanted.items():
        miss = float((found.get(name, torch.zeros_like(change)) - change).norm())
        slack = 64 * 2.0**-22 * float(masses[name].norm())
        assert abs(miss - oracle.tail(change, rank)) <= slack + 1e-4 * miss, name


@given(specs=some, energy=st.sampled_from([0.3, 0.7, 0.95, 1.0]))
@settings(max_examples=20)
def test_energy_keeps_at_least_its_share(specs, energy):
    with tempfile.TemporaryDirectory() as folder:
        found, parts = combined(Path(folder), specs, "lora_svd", energy=energy)
    weights = [w for _, w in specs]
    wanted, masses = oracle.summed(parts, weights), oracle.masses(parts, weights)
    for name, change in wanted.items():
        miss = float((found.get(name, torch.zeros_like(change)) - change).square().sum())
        slack = (64 * 2.0**-22 * float(masses[name].norm())) ** 2
        assert miss <= (1 - energy) * float(change.square().sum()) * (1 + 1e-4) + slack, name


@given(specs=some, density=st.sampled_from([0.25, 0.5, 1.0]), normalize=st.booleans())
@settings(max_examples=20)
def test_ties_is_that_of_the_changes(specs, density, normalize):
    with tempfile.TemporaryDirectory() as folder:
        found, parts = combined(
            Path(folder), specs, "lora_ties", density=density, normalize=normalize, rank=9
        )
    weights = [w for _, w in specs]
    masses = oracle.masses(parts, weights)
    for name in masses:
        blank = torch.zeros_like(masses[name])
        of_all = [part.get(name, blank) for part in parts]
        wanted = oracle.ties(of_all, weights, [density] * len(parts), normalize=normalize)
        scale = max(float(change.norm()) for change in of_all) * max(1.0, *map(abs, weights))
        miss = (found.get(name, blank) - wanted).norm()
        assert float(miss) <= 1e-5 * scale, name
