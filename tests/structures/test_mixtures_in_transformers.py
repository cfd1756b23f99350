"""Mixtures of copies, and dense models out of mixtures, compute the same in transformers."""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path
from typing import Any

import deepened
import pytest
import torch
import transformers
from deepened import assert_generates, differences
from families import FAMILIES, WINDOW, Family
from torch import Tensor

from merge_kit.api import merge
from merge_kit.errors import MergeKitError
from tests import models

pytestmark = pytest.mark.usefixtures("single_thread")

SCALE = 8.0
"""Logits of these models lie within this; 1e-5 is taken of it where products are regrouped."""


def dense(kind: str, root: Path, **changes: Any) -> tuple[Any, Path]:
    """Save a dense model with settings that a family of experts must take over."""
    family = FAMILIES[kind]
    config = family.config(4)
    config.sliding_window = None if kind != "mistral" else config.sliding_window
    if kind in ("qwen2", "qwen3"):
        config.use_sliding_window, config.layer_types = False, ["full_attention"] * 4
    for key, value in changes.items():
        setattr(config, key, value)
    torch.manual_seed(5)
    model = family.model(config)
    for weight in model.parameters():
        with torch.no_grad():
            noise = torch.randn(weight.shape)
            weight.copy_(weight + 0.1 * noise if weight.ndim < 2 else 0.25 * noise)
    model.save_pretrained(root)
    return model.eval(), root


def of_experts(folder: Path) -> tuple[Family, Any]:
    """Load a mixture as the class that its config names."""
    name = models.config(folder)["architectures"][0]
    family = Family(getattr(transformers, name), lambda _depth: None)
    return family, deepened.load(family, folder)


ROPE = {"rope_type": "yarn", "rope_theta": 5000.0, "factor": 4.0}
ROPE["original_max_position_embeddings"] = 16
TWINS = {
    "llama": ("MixtralForCausalLM", {}),
    "llama-rope": ("MixtralForCausalLM", {"rope_parameters": ROPE, "rms_norm_eps": 1e-3}),
    "llama-tied": ("MixtralForCausalLM", {"tie_word_embeddings": True}),
    "llama-wide": ("MixtralForCausalLM", {"head_dim": 16, "hidden_act": "gelu"}),
    "mistral": ("MixtralForCausalLM", {}),
    "qwen2": ("Qwen2MoeForCausalLM", {"rms_norm_eps": 1e-3}),
    "qwen2-tied": ("Qwen2MoeForCausalLM", {"tie_word_embeddings": True}),
    "qwen3": ("Qwen3MoeForCausalLM", {"rms_norm_eps": 1e-3}),
    "qwen3-rope": ("Qwen3MoeForCausalLM", {"rope_parameters": ROPE}),
}
"""What each dense model becomes, with settings that change what is computed."""


@pytest.mark.parametrize(
    ("case", "router"),
    [*((case, "random") for case in TWINS), ("llama", "zero"), ("qwen2", "zero")],
)
def test_copies_as_experts_compute_what_the_dense_model_does(case, router, tmp_path):
    kind, (name, changes) = case.partition("-")[0], TWINS[case]
    model, folder = dense(kind, tmp_path / "dense", **changes)
    parameters = {"num_experts": 4, "experts_per_token": 3, "router": router}
    recipe = {"merge_method": "sparse_upcycle", "base_model": str(folder)}
    merge(recipe | {"parameters": parameters}, tmp_path / "out")
    family, made = of_experts(tmp_path / "out")
    assert type(made).__name__ == name
    assert made.config.num_experts_per_tok == 3
    assert all(hasattr(layer.mlp, "experts") for layer in made.model.layers)
    ids = deepened.tokens(WINDOW + 10)
    assert deepened.forward(family, model, ids).abs().max() < SCALE
    assert differences(family, made, model) < 1e-5
    assert_generates(family, made)


@pytest.mark.parametrize("case", ["qwen2", "qwen3"])
@pytest.mark.parametrize("sparse", ["odd", "even", [0, 3], [1, 2, 3]], ids=str)
def test_layers_that_stay_dense_are_read_as_dense(case, sparse, tmp_path):
    model, folder = dense(case, tmp_path / "dense")
    parameters = {"num_experts": 3, "sparse_layers": sparse}
    recipe = {"merge_method": "sparse_upcycle", "base_model": str(folder)}
    merge(recipe | {"parameters": parameters}, tmp_path / "out")
    family, made = of_experts(tmp_path / "out")
    named = {"odd": [1, 3], "even": [0, 2]}
    held = [i for i, layer in enumerate(made.model.layers) if hasattr(layer.mlp, "experts")]
    assert held == (named[sparse] if isinstance(sparse, str) else sparse)
    assert differences(family, made, model) < 1e-5
    assert_generates(family, made)


@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3"])
def test_experts_of_two_models_are_chosen_by_the_router(kind, tmp_path):
    """With rows that choose expert 0 or 1 the mixture has one model's MLPs, whatever it reads."""
    one, first = dense(kind, tmp_path / "one")
    other = deepcopy(one)
    generator = torch.Generator().manual_seed(2)
    for layer in other.model.layers:
        for weight in layer.mlp.parameters():
            with torch.no_grad():
                weight.copy_(0.25 * torch.randn(weight.shape, generator=generator))
    other.save_pretrained(tmp_path / "other")
    listed = [{"model": str(tmp_path / name)} for name in ("one", "other")]
    recipe = {"merge_method": "sparse_upcycle", "base_model": str(first), "models": listed}
    merge(recipe | {"parameters": {"experts_per_token": 1}}, tmp_path / "out")
    family, made = of_experts(tmp_path / "out")
    assert_generates(family, made)
    for chosen, model in enumerate((one, other)):
        gates = [layer.mlp.gate for layer in made.model.layers]
        hooks = [gate.register_forward_hook(_always(chosen)) for gate in gates]
        assert differences(family, made, model) < 1e-5
        for hook in hooks:
            hook.remove()


def _always(expert: int) -> Any:
    """Return a hook that sends every token to one expert."""

    def hook(module: Any, inputs: Any, output: tuple[Tensor, Tensor, Tensor]) -> Any:
        logits, scores, indices = output
        one = torch.zeros_like(scores)
        one[:, 0] = 1.0
        return logits, one, torch.full_like(indices, expert)

    return hook


@pytest.mark.parametrize("kind", ["llama", "mistral", "qwen2", "qwen3"])
def test_the_way_back_from_copies_is_the_model_itself(kind, tmp_path):
    model, folder = dense(kind, tmp_path / "dense")
    recipe = {"merge_method": "sparse_upcycle", "base_model": str(folder)}
    merge(recipe | {"parameters": {"num_experts": 3}}, tmp_path / "moe")
    back = {"merge_method": "moe_to_dense", "models": [{"model": str(tmp_path / "moe")}]}
    if kind == "llama":
        back["parameters"] = {"architecture": "llama"}
    merge(back, tmp_path / "out")
    models.assert_same_tensors(models.stored(tmp_path / "out"), models.stored(folder))
    made = deepened.load(FAMILIES[kind], tmp_path / "out")
    assert differences(FAMILIES[kind], made, model) == 0
    assert_generates(FAMILIES[kind], made)


def test_an_expert_alone_is_the_mixture_when_every_token_is_sent_to_it(pair, tmp_path):
    folders, sources = pair("mixtral")
    recipe = {"merge_method": "moe_to_dense", "models": [{"model": str(folders["b"])}]}
    merge(recipe | {"parameters": {"experts": 1}}, tmp_path / "out")
    family, mixture = FAMILIES["mistral"], sources["b"]
    made = deepened.load(family, tmp_path / "out")
    hooks = [layer.mlp.gate.register_forward_hook(_always(1)) for layer in mixture.model.layers]
    assert differences(family, made, mixture) < 1e-5
    for hook in hooks:
        hook.remove()
    assert differences(family, made, mixture) > 1e-2
    assert_generates(family, made)


def test_experts_narrower_than_the_mlp_of_a_dense_layer_make_no_dense_model(pair, tmp_path):
    folder = pair("qwen3_moe")[0]["a"]
    recipe = {"merge_method": "moe_to_dense", "models": [{"model": str(folder)}]}
    with pytest.raises(MergeKitError, match=r"(?s)24.*48|48.*24"):
        merge(recipe, tmp_path / "out")
    assert not (tmp_path / "out").exists()
