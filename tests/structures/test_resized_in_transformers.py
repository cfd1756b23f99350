"""Padded models, and models in another basis, compute in transformers what they did."""

from __future__ import annotations

from typing import Any

import deepened
import families
import pytest
import torch
from deepened import assert_generates, differences
from families import FAMILIES
from safetensors.torch import save_file

from merge_kit.api import merge

pytestmark = pytest.mark.usefixtures("single_thread")

SCALE = 8.0
"""Logits of these models lie within this; 1e-5 is taken of it where products are regrouped."""


WIDER = {"hidden_size": 48, "intermediate_size": 56}
PADDED = {
    "llama": {**WIDER, "num_attention_heads": 8, "num_key_value_heads": 4},
    "mistral": WIDER,
    "qwen2": {"intermediate_size": 56},
    "qwen3": {**WIDER, "num_attention_heads": 6, "num_key_value_heads": 3},
    "mixtral": WIDER,
    "phi3": {"intermediate_size": 56},
    "gemma2": {"intermediate_size": 56},
    "gpt2": {"intermediate_size": 140},
    "gpt_neox": {"intermediate_size": 56},
}


@pytest.mark.parametrize("kind", PADDED)
def test_a_padded_model_computes_what_it_did(kind, pair, tmp_path):
    family, (folders, sources) = FAMILIES[kind], pair(kind)
    recipe = {"merge_method": "pad", "models": [{"model": str(folders["a"])}]}
    merge(recipe | {"parameters": PADDED[kind]}, tmp_path / "out")
    made = deepened.load(family, tmp_path / "out")
    assert differences(family, made, sources["a"]) < 1e-5 * SCALE
    assert_generates(family, made)


@pytest.mark.parametrize("kind", ["llama", "mistral", "qwen3", "mixtral"])
@pytest.mark.parametrize("basis", ["svd", "permuted", "rotated"])
def test_a_model_in_another_basis_of_its_width_computes_what_it_did(kind, basis, pair, tmp_path):
    family, (folders, sources) = FAMILIES[kind], pair(kind)
    size = families.SIZES["hidden_size"]
    generator = torch.Generator().manual_seed(1)
    parameters: dict[str, Any] = {"basis": basis, "hidden_size": size}
    if basis != "svd":
        square = torch.randn(size, size, generator=generator, dtype=torch.float64)
        matrix = torch.linalg.qr(square).Q.float()
        if basis == "permuted":
            matrix = torch.eye(size)[torch.randperm(size, generator=generator)]
        save_file({"basis": matrix.contiguous()}, tmp_path / "basis.safetensors")
        parameters["basis"] = str(tmp_path / "basis.safetensors")
    recipe = {"merge_method": "project", "models": [{"model": str(folders["a"])}]}
    merge(recipe | {"parameters": parameters}, tmp_path / "out")
    made = deepened.load(family, tmp_path / "out")
    assert not torch.equal(made.model.norm.weight, sources["a"].model.norm.weight)
    assert differences(family, made, sources["a"]) < 2e-5 * SCALE  # products in another basis
    assert_generates(family, made)


def test_a_model_brought_to_the_width_of_another_merges_with_it(pair, tmp_path):
    """An explicit step: what is padded is an ordinary input of the next document."""
    folders, sources = pair("llama")
    family = FAMILIES["llama"]
    config = family.config(4)
    config.hidden_size, config.intermediate_size = 48, 64
    torch.manual_seed(1)
    family.model(config).save_pretrained(tmp_path / "wide")
    text = f"""\
name: widened
merge_method: pad
base_model: {tmp_path / "wide"}
models: [{{model: {folders["a"]}}}]
---
merge_method: linear
models:
  - {{model: widened, parameters: {{weight: 1.0}}}}
  - {{model: {tmp_path / "wide"}, parameters: {{weight: 0.0}}}}
parameters: {{normalize: false}}
"""
    (tmp_path / "recipe.yaml").write_text(text, encoding="utf-8")
    merge(tmp_path / "recipe.yaml", tmp_path / "out")
    made = deepened.load(family, tmp_path / "out")
    assert made.config.hidden_size == 48
    assert differences(family, made, sources["a"]) < 1e-5 * SCALE
