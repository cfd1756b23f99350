"""Where scales and weights of combined adapters go, on numbers that show what each choice costs."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from merge_kit import merge
from tests.plan.adapters_by_hand import adapter

Q = "model.layers.0.self_attn.q_proj"
NAMES = [f"{Q}.lora_{which}.weight" for which in "AB"]
KEYS = [f"base_model.model.{name}" for name in NAMES]


def write(folder, seed, dtype=torch.float32, **config):
    """Write an adapter of rank 2 on one module, and return its a and b."""
    generator = torch.Generator().manual_seed(seed)
    shapes = ((2, 40), (30, 2))
    drawn = [(0.05 * torch.randn(shape, generator=generator)).to(dtype) for shape in shapes]
    adapter(folder, dict(zip(NAMES, drawn, strict=True)), r=2, target_modules=["q_proj"], **config)
    return [one.double() for one in drawn]


def test_a_small_weight_costs_float16_few_digits(tmp_path):
    one = write(tmp_path / "one", 1, torch.float16, lora_alpha=2)
    two = write(tmp_path / "two", 2, torch.float16, lora_alpha=2)
    models = [
        {"model": str(tmp_path / "one"), "parameters": {"weight": 1.0}},
        {"model": str(tmp_path / "two"), "parameters": {"weight": 1e-5}},
    ]
    merge({"merge_method": "lora_concat", "models": models}, tmp_path / "out")
    made = load_file(tmp_path / "out" / "adapter_model.safetensors")
    a, b = (made[key].double() for key in KEYS)
    assert torch.equal(a[:2], one[0])
    assert torch.equal(b[:, :2], one[1])
    wanted = 1e-5 * two[1] @ two[0]
    missed = (b[:, 2:] @ a[2:] - wanted).norm() / wanted.norm()
    assert missed < 0.005  # 0.8 with the whole weight in b, whose numbers are then below 6e-7


@pytest.mark.parametrize("alphas", [(2, -3), (-2, 3), (2, 3)])
def test_the_variant_of_peft_gives_the_sign_to_a(tmp_path, alphas):
    pairs = [write(tmp_path / f"m{i}", i, lora_alpha=alpha) for i, alpha in enumerate(alphas)]
    models = [{"model": str(tmp_path / f"m{i}")} for i in range(2)]
    merge(
        {"merge_method": "lora_linear", "models": models, "parameters": {"variant": "peft"}},
        tmp_path / "out",
    )
    made = load_file(tmp_path / "out" / "adapter_model.safetensors")
    found = made[KEYS[1]].double() @ made[KEYS[0]].double()
    scales = [alpha / 2 for alpha in alphas]
    # peft 0.21, add_weighted_adapter, "linear": a takes sign(c) sqrt(|c|), b takes sqrt(|c|)
    every = list(zip(pairs, scales, strict=True))
    a = sum(np.sign(c) * abs(c) ** 0.5 * pair[0] for pair, c in every)
    b = sum(abs(c) ** 0.5 * pair[1] for pair, c in every)
    torch.testing.assert_close(found, b @ a, rtol=1e-5, atol=1e-7)


def test_numbers_of_numpy_are_weights(tmp_path):
    _, b = write(tmp_path / "one", 1, lora_alpha=2)
    model = {"model": str(tmp_path / "one"), "parameters": {"weight": np.float64(0.5)}}
    merge({"merge_method": "lora_concat", "models": [model]}, tmp_path / "out")
    assert "weight: 0.5" in (tmp_path / "out" / "README.md").read_text()
    assert torch.equal(
        load_file(tmp_path / "out" / "adapter_model.safetensors")[KEYS[1]], b.float()
    )
