"""What cannot become a mixture of experts is refused before the run, with the reason."""

from __future__ import annotations

import json

import dense_models
import pytest
import transformers
from safetensors.torch import save_file

from merge_kit.api import plan
from merge_kit.errors import MergeKitError, ParameterError, Problems
from merge_kit.methods.sparse_upcycle import SparseUpcycle


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """Save a model of a kind, once, and return its folder."""
    root, made = tmp_path_factory.mktemp("models"), {}

    def of(kind, seed=0, **values):
        key = f"{kind} {seed} {values}"
        if key not in made:
            made[key] = dense_models.saved(root / str(len(made)), kind, seed, **values)
        return made[key]

    return of


def refused(base, *models, shared=(), **parameters):
    """Return the problems of a recipe, in one text."""
    recipe = {"merge_method": "sparse_upcycle", "parameters": parameters}
    if base is not None:
        recipe["base_model"] = str(base)
    if models:
        recipe["models"] = [{"model": str(path)} for path in models]
    if shared:
        recipe["shared_experts"] = [{"model": str(path)} for path in shared]
    with pytest.raises(MergeKitError) as caught:
        plan(recipe)
    return str(caught.value)


def edited(folder, tmp_path, **values):
    """Return a copy of a model with other values in its config."""
    path = tmp_path / "edited"
    path.mkdir()
    for file in folder.iterdir():
        (path / file.name).write_bytes(file.read_bytes())
    config = json.loads((path / "config.json").read_text()) | values
    (path / "config.json").write_text(json.dumps(config))
    return path


@pytest.mark.parametrize(
    ("parameters", "problem"),
    [
        ({"num_experts": 0}, "num_experts is 0, expected 1 to 4,096"),
        ({"num_experts": 10**7}, "num_experts is 10,000,000, expected 1 to 4,096"),
        ({"experts_per_token": 0}, "experts_per_token is 0, expected at least 1"),
        ({"num_experts": 2, "experts_per_token": 3}, "is 3, and there are 2 experts"),
        ({"num_experts": 1}, "num_experts: experts_per_token is 2, and there is 1 expert\n"),
        ({"experts_per_token": 9}, "is 9, and there are 8 experts"),
        ({"router_scale": -1}, "router_scale is -1"),
        ({"noise_scale": -0.5}, "noise_scale is -0.5"),
        ({"router": "learned"}, "router is 'learned'"),
        ({"architecture": "qwen2_moe", "sparse_layers": [0, 7]}, "names layer 7, and"),
        ({"architecture": "qwen2_moe", "sparse_layers": "some"}, "sparse_layers is 'some'"),
        ({"sparse_layers": [0]}, "every layer of a mixtral has experts"),
        ({"architecture": "qwen3_moe"}, "is a llama, which cannot become a qwen3_moe"),
    ],
)
def test_a_parameter_out_of_range_is_named_with_its_place(model, parameters, problem):
    found = refused(model("llama"), **parameters)
    assert problem in found
    assert "hint: " in found


@pytest.mark.parametrize("count", [1, 2, 4, 5])
def test_a_number_of_experts_that_the_models_do_not_give_is_refused(model, count):
    models = [model("llama", seed) for seed in (1, 2, 3)]
    found = refused(model("llama"), *models, num_experts=count, experts_per_token=1)
    assert f"num_experts is {count}, and 3 models are listed" in found


@pytest.mark.parametrize("values", [{"noise_scale": float("inf")}, {"router_scale": float("nan")}])
def test_numbers_that_are_not_finite_are_refused(values):
    from merge_kit.methods.base import PerModel  # noqa: PLC0415  (only here)

    own = {k: PerModel([v]) if k == "noise_scale" else v for k, v in values.items()}
    with pytest.raises(ParameterError):
        SparseUpcycle(**own)


def test_experts_of_different_shapes_are_named(model):
    wide = model("llama", 2, intermediate_size=56)
    found = refused(model("llama"), model("llama", 1), wide)
    assert "experts of different shapes" in found
    assert "32 x 56 in layer 0, expected 32 x 40" in found


def test_experts_of_another_width_than_the_base_are_named(model):
    narrow = model("llama", 1, hidden_size=16)
    found = refused(model("llama"), narrow)
    assert "has a width of 16" in found


def test_models_of_another_depth_are_named(model):
    assert "has 2 layers, and" in refused(model("llama"), model("llama", 1, num_hidden_layers=2))


def test_models_of_another_architecture_are_named(model):
    found = refused(model("llama"), model("llama", 1), model("mistral"))
    assert "its model_type is mistral, and llama in" in found


def test_several_problems_come_in_one_list(model):
    models = model("mistral"), model("llama", 1, num_hidden_layers=2)
    with pytest.raises(Problems) as caught:
        plan(
            {
                "merge_method": "sparse_upcycle",
                "base_model": str(model("llama")),
                "models": [{"model": str(path)} for path in models],
                "parameters": {"num_experts": 3, "sparse_layers": [9]},
            }
        )
    assert len(caught.value.errors) == 4


@pytest.mark.parametrize(
    "config",
    [
        transformers.Gemma2Config(
            vocab_size=32,
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=8,
        ),
        transformers.GPT2Config(vocab_size=32, n_embd=16, n_layer=1, n_head=2),
        transformers.Phi3Config(
            vocab_size=32,
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=1,
            pad_token_id=0,
        ),
    ],
    ids=lambda config: config.model_type,
)
def test_an_architecture_without_a_sparse_twin_is_named_with_those_that_have_one(tmp_path, config):
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "model")
    found = refused(tmp_path / "model")
    assert f"is a {config.model_type}, for which there is no sparse architecture" in found
    assert "llama becomes mixtral or qwen2_moe" in found
    assert "qwen3 becomes qwen3_moe" in found


def test_a_mixture_is_not_upcycled_again(model, tmp_path):
    config = transformers.MixtralConfig(**dense_models.SIZES, num_local_experts=2)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "sparse")
    assert "is a mixture of experts already" in refused(tmp_path / "sparse")
    assert "is a mixture of experts already" in refused(model("llama"), tmp_path / "sparse")


def test_biases_are_named(model):
    found = refused(model("llama", mlp_bias=True))
    assert "mlp_bias is true" in found
    assert "model.layers.0.mlp.down_proj.bias" in found
    found = refused(model("llama", attention_bias=True), architecture="qwen2_moe")
    assert "attention_bias is true" in found
    assert "model.layers.0.self_attn.o_proj.bias" in found
    assert "for which an expert has no place" in refused(
        model("llama"), model("llama", 1), model("llama", mlp_bias=True)
    )


def test_windows_in_some_layers_are_named_where_there_is_no_such_switch(model):
    windows = {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1}
    found = refused(model("qwen3", **windows))
    assert "some layers have a sliding window" in found


def test_a_model_without_a_config_needs_an_architecture(model, tmp_path):
    bare = tmp_path / "bare.safetensors"
    save_file(dense_models.tensors(model("llama")), bare)
    found = refused(bare)
    assert "has no config.json" in found
    assert "architecture: mixtral" in found


def test_a_layer_that_lacks_a_tensor_is_named(model, tmp_path):
    held = dense_models.tensors(model("llama"))
    for lost, problem in (
        ("model.layers.1.mlp.up_proj.weight", "layer 1 lacks mlp.up_proj.weight"),
        ("model.layers.2.self_attn.q_proj.weight", "layer 2 lacks self_attn.q_proj.weight"),
    ):
        path = tmp_path / lost
        path.mkdir()
        save_file({n: t for n, t in held.items() if n != lost}, path / "model.safetensors")
        (path / "config.json").write_text((model("llama") / "config.json").read_text())
        assert problem in refused(path)


def test_a_shared_expert_needs_a_layout_that_has_one(model):
    other = model("qwen3", 1)
    assert "a qwen3_moe has no expert that every token passes" in refused(
        model("qwen3"), shared=[other]
    )


def test_a_llama_with_a_shared_expert_becomes_a_qwen2_moe(model):
    made = plan(
        {
            "merge_method": "sparse_upcycle",
            "base_model": str(model("llama")),
            "shared_experts": [{"model": str(model("llama", 1))}],
        }
    )
    assert made.architecture == "qwen2_moe"


def test_averaged_models_of_different_vocabulary_are_named(model):
    larger = model("llama", 1, vocab_size=50)
    found = refused(model("llama"), model("llama", 2), larger, non_experts="average")
    assert "model.embed_tokens.weight" in found
    assert "[48, 32]" in found


def test_an_adapter_is_no_base(tmp_path, model):
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 1, "lora_alpha": 1}')
    tensors = {
        f"base_model.model.model.layers.0.mlp.up_proj.lora_{side}.weight": tensor
        for side, tensor in (
            ("A", dense_models.torch.zeros(1, 32)),
            ("B", dense_models.torch.zeros(40, 1)),
        )
    }
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    assert "is an adapter" in refused(tmp_path)


def test_a_class_without_a_sparse_twin_is_named(model, tmp_path):
    path = edited(model("llama"), tmp_path, architectures=["LlamaForRanking"])
    assert "the class LlamaForRanking has no sparse twin" in refused(path)


def test_another_activation_is_named(model, tmp_path):
    path = edited(model("llama"), tmp_path, hidden_act="gelu")
    assert "its hidden_act is gelu, and silu in" in refused(model("llama"), model("llama", 1), path)
