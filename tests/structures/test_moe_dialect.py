"""Recipes of mergekit-moe, run: what each of their keys makes of the tensors."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from merge_kit import api
from merge_kit.errors import MergeKitError
from merge_kit.recipe.values import Prompts
from tests.structures.prompted import CODE, HIDDEN, LAYERS, SUMS, WEATHER, ids, save
from tests.toys import merge, plan

MLP = {"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Write a base and two fine-tunes of each kind of model."""
    root = tmp_path_factory.mktemp("dense")
    for kind in ("llama", "qwen2", "qwen3"):
        for seed, name in enumerate(("base", "a", "b")):
            save(kind, root / f"{kind}-{name}", seed)
            if kind == "qwen3":
                attend_to_all(root / f"{kind}-{name}" / "config.json")
    return root


def attend_to_all(path):
    """Take the sliding window out of a config: a Qwen3-MoE has one in all layers or in none."""
    config = json.loads(path.read_text())
    config |= {"use_sliding_window": False, "sliding_window": None}
    del config["layer_types"]
    path.write_text(json.dumps(config))


def recipe(kind="llama", prompts=(WEATHER, SUMS), extra=("", ""), **keys):
    """Return the text of a recipe with two experts."""
    top = {"base_model": f"{kind}-base", **keys}
    lines = [f"{key}: {value}" for key, value in top.items()]
    lines.append("experts:")
    for name, own, more in zip("ab", prompts, extra, strict=True):
        lines.append(f"  - {{source_model: {kind}-{name}{texts(own)}{more}}}")
    return "\n".join(lines) + "\n"


def texts(prompts: Prompts | None) -> str:
    if prompts is None:
        return ""
    negative = f", negative_prompts: {list(prompts.negative)}" if prompts.negative else ""
    return f", positive_prompts: {list(prompts.positive)}{negative}"


def dense(models, name):
    return load_file(models / name / "model.safetensors")


def expert(made, layer, number, part):
    return made[f"model.layers.{layer}.block_sparse_moe.experts.{number}.{MLP[part]}.weight"]


def rows(made, layer=0, block="block_sparse_moe"):
    return made[f"model.layers.{layer}.{block}.gate.weight"]


def test_experts_are_the_mlps_of_the_models_and_all_else_is_the_bases(models):
    made = merge(recipe(gate_mode="random"), models)
    base, sources = dense(models, "llama-base"), [dense(models, f"llama-{n}") for n in "ab"]
    for name, tensor in base.items():
        if ".mlp." not in name:
            assert torch.equal(made.pop(name), tensor)
    for layer in range(LAYERS):
        for number, source in enumerate(sources):
            for part, ours in MLP.items():
                name = f"model.layers.{layer}.block_sparse_moe.experts.{number}.{ours}.weight"
                assert torch.equal(
                    made.pop(name), source[f"model.layers.{layer}.mlp.{part}.weight"]
                )
    assert sorted(made) == [
        f"model.layers.{layer}.block_sparse_moe.gate.weight" for layer in range(LAYERS)
    ]


def test_the_base_may_be_an_expert_and_a_model_two(models):
    text = recipe(gate_mode="random").replace("llama-b,", "llama-base,")
    text += "  - {source_model: llama-a}\n"
    made = merge(text, models)
    for number, name in enumerate(("a", "base", "a")):
        wanted = dense(models, f"llama-{name}")["model.layers.1.mlp.up_proj.weight"]
        assert torch.equal(expert(made, 1, number, "up_proj"), wanted)


def test_residual_scale_is_of_the_down_projection_and_noise_of_all(models):
    extra = (", residual_scale: -0.5", ", noise_scale: 0.25, residual_scale: 2")
    made = merge(recipe(gate_mode="random", extra=extra), models)
    a, b = (dense(models, f"llama-{name}") for name in "ab")
    noise = []
    for layer in range(LAYERS):
        for part in MLP:
            name, factor = f"model.layers.{layer}.mlp.{part}.weight", 1 + (part == "down_proj")
            wanted = a[name] * (-0.5 if part == "down_proj" else 1.0)
            assert torch.equal(expert(made, layer, 0, part), wanted)
            noise.append((expert(made, layer, 1, part) / factor - b[name]).flatten())
    drawn = torch.cat(noise) / 0.25  # 4,608 standard normal numbers
    assert abs(float(drawn.mean())) < 5 / len(drawn) ** 0.5
    assert float(drawn.std()) == pytest.approx(1, abs=5 / (2 * len(drawn)) ** 0.5)


def test_random_gates_are_standard_normal_numbers(models):
    made = merge(recipe(gate_mode="random"), models)
    drawn = torch.stack([rows(made, layer) for layer in range(LAYERS)]).flatten()
    assert drawn.shape == (LAYERS * 2 * HIDDEN,)
    assert abs(float(drawn.mean())) < 4 / len(drawn) ** 0.5
    assert float(drawn.std()) == pytest.approx(1, abs=4 / (2 * len(drawn)) ** 0.5)
    assert len(set(drawn.tolist())) == len(drawn)
    again, other = (merge(recipe(gate_mode="random", seed=seed), models) for seed in (0, 1))
    assert torch.equal(rows(again), rows(made))
    assert not torch.equal(rows(other), rows(made))


def test_uniform_random_gates_lie_within_the_root_of_the_width(models):
    made = merge(recipe(gate_mode="uniform_random", prompts=(None, None)), models)
    drawn = torch.stack([rows(made, layer) for layer in range(LAYERS)]).flatten() * HIDDEN**0.5
    assert float(drawn.abs().max()) <= 1
    assert float(drawn.abs().max()) > 0.95  # of 128 numbers, none would be so large once in 700
    assert abs(float(drawn.mean())) < 4 * (1 / 3 / len(drawn)) ** 0.5
    assert float(drawn.square().mean()) == pytest.approx(1 / 3, abs=4 * 0.3 / len(drawn) ** 0.5)


def test_prompts_that_no_gate_needs_are_said_to_have_no_effect_once(models):
    with_prompts, without = (
        plan(recipe(prompts=prompts, gate_mode="random"), models).notes
        for prompts in ((WEATHER, SUMS), (None, None))
    )
    assert len([note for note in with_prompts if "prompts have no effect" in note]) == 1
    assert not [note for note in without if "prompts" in note]


def embedded(models, prompts, kind="llama"):
    """Return the row of an expert under cheap_embed, in float64."""
    table = dense(models, f"{kind}-base")["model.embed_tokens.weight"].double()

    def summed(some):
        total = sum(table[ids(kind, text)].sum(0) for text in some)
        return total / total.norm()

    row = summed(prompts.positive)
    row = row - summed(prompts.negative) if prompts.negative else row
    return row / row.norm()


def test_cheap_embed_is_the_same_sum_of_embeddings_in_every_layer(models):
    made = merge(recipe(gate_mode="cheap_embed"), models)
    wanted = torch.stack([embedded(models, prompts) for prompts in (WEATHER, SUMS)])
    for layer in range(LAYERS):
        assert (rows(made, layer).double() - wanted).abs().max() < 2e-7  # float32 of length 1


def test_a_shared_expert_of_qwen_moe_has_its_own_gate(models):
    shared = f"shared_experts:\n  - {{source_model: qwen2-a{texts(CODE)}, residual_scale: 2}}\n"
    made = merge(recipe("qwen2", gate_mode="cheap_embed") + shared, models)
    source = dense(models, "qwen2-a")
    for layer in range(LAYERS):
        lead = f"model.layers.{layer}.mlp"
        for part in MLP:
            wanted = source[f"{lead}.{part}.weight"] * (2 if part == "down_proj" else 1)
            assert torch.equal(made[f"{lead}.shared_expert.{part}.weight"], wanted)
        gate = made[f"{lead}.shared_expert_gate.weight"].double()
        assert (gate - embedded(models, CODE, "qwen2")).abs().max() < 2e-7
        wanted = torch.stack([embedded(models, p, "qwen2") for p in (WEATHER, SUMS)])
        assert (rows(made, layer, "mlp").double() - wanted).abs().max() < 2e-7


def test_a_llama_with_a_shared_expert_becomes_a_qwen_moe_with_biases_of_zero(models, tmp_path):
    shared = "shared_experts: [{source_model: llama-a}]\n"
    text = recipe(prompts=(None, None), gate_mode="random") + shared
    done = api.merge(write(models, tmp_path, text), tmp_path / "out")
    config = json.loads((done.output / "config.json").read_text())
    assert config["model_type"] == "qwen2_moe"
    made = load_file(done.output / "model.safetensors")
    biases = [name for name in made if name.endswith("_proj.bias")]
    assert len(biases) == 3 * LAYERS
    assert not any(made[name].any() for name in biases)
    gates = [made[name] for name in made if name.endswith("shared_expert_gate.weight")]
    assert torch.stack(gates).std() == pytest.approx(1, abs=0.36)  # 4 sigma of 64 normal numbers


def write(models, folder, text):
    """Write a recipe that finds the models."""
    path = folder / "recipe.yml"
    path.write_text(text.replace(": llama-", f": {models}/llama-"))
    return path


@pytest.mark.parametrize(
    ("kind", "architecture", "model_type", "count"),
    [
        ("llama", "mixtral", "mixtral", "num_local_experts"),
        ("qwen2", "Qwen MoE", "qwen2_moe", "num_experts"),
        ("qwen3", "QWEN3", "qwen3_moe", "num_experts"),
        ("qwen3", "", "qwen3_moe", "num_experts"),
    ],
)
def test_what_a_recipe_makes_loads_and_generates(
    models, tmp_path, kind, architecture, model_type, count
):
    keys = {"gate_mode": "hidden", "experts_per_token": 1, "dtype": "bfloat16"}
    text = recipe(kind, architecture=architecture, **keys)
    text = text.replace(f": {kind}-", f": {models}/{kind}-")
    (tmp_path / "recipe.yml").write_text(text)
    done = api.merge(tmp_path / "recipe.yml", tmp_path / "out")
    config = json.loads((done.output / "config.json").read_text())
    assert (config["model_type"], config[count], config["num_experts_per_tok"]) == (
        model_type,
        2,
        1,
    )
    model, loading = AutoModelForCausalLM.from_pretrained(done.output, output_loading_info=True)
    assert not any(loading.values())
    made = model.generate(torch.tensor([ids(kind, "sun")]), max_new_tokens=4, do_sample=False)
    assert torch.isfinite(model(made).logits).all()
    stored = load_file(done.output / "model.safetensors")
    assert {tensor.dtype for tensor in stored.values()} == {torch.bfloat16}


@pytest.mark.parametrize("mode", ["hidden", "hidden_last", "hidden_avg", "cheap_embed", "random"])
def test_the_same_in_words_of_sparse_upcycle_is_the_same(models, mode):
    router = {"hidden_last": "hidden"}.get(mode, mode)
    native = f"""\
merge_method: sparse_upcycle
base_model: llama-base
models:
  - {{model: llama-a{texts(WEATHER)}, parameters: {{noise_scale: 0.1}}}}
  - {{model: llama-b{texts(SUMS)}}}
parameters: {{router: {router}{", router_scale: 1" if mode == "random" else ""}}}
seed: 5
"""
    ours = merge(native, models)
    theirs = merge(recipe(gate_mode=mode, seed=5, extra=(", noise_scale: 0.1", "")), models)
    assert {name: t.tolist() for name, t in ours.items()} == {
        name: t.tolist() for name, t in theirs.items()
    }


def test_stages_may_be_base_and_experts(models):
    mean = "---\nname: {}\nmerge_method: linear\nparameters: {{weight: 0.5}}\n"
    mean += "models: [{{model: llama-a}}, {{model: llama-b}}]\n"
    text = recipe(gate_mode="cheap_embed").replace("llama-base", "middle").replace("llama-b", "two")
    made = merge(text + mean.format("middle") + mean.format("two"), models)
    a, b = (dense(models, f"llama-{name}") for name in "ab")
    for part in MLP:
        name = f"model.layers.2.mlp.{part}.weight"
        assert torch.equal(expert(made, 2, 0, part), a[name])
        assert torch.equal(expert(made, 2, 1, part), (a[name] + b[name]) / 2)
    norm = "model.layers.2.input_layernorm.weight"
    assert torch.equal(made[norm], (a[norm] + b[norm]) / 2)


def test_overrides_reach_an_expert(models, tmp_path):
    path = write(models, tmp_path, recipe(gate_mode="random"))
    done = api.merge(path, tmp_path / "out", overrides=["experts.0.residual_scale=3"])
    made = load_file(done.output / "model.safetensors")
    name = "model.layers.0.mlp.down_proj.weight"
    assert torch.equal(expert(made, 0, 0, "down_proj"), 3 * dense(models, "llama-a")[name])
    assert torch.equal(expert(made, 0, 1, "down_proj"), dense(models, "llama-b")[name])


def test_an_output_does_not_say_where_its_models_lay(models, tmp_path):
    shared = "shared_experts: [{source_model: llama-a}]\n"
    path = write(models, tmp_path, recipe(gate_mode="random") + shared)
    done = api.merge(path, tmp_path / "out")
    for name in ("README.md", "merge_kit.json"):
        text = (done.output / name).read_text()
        assert str(models) not in text
        assert "input-1:llama-a" in text


REFUSED = {
    "shared in Qwen3": (
        recipe("qwen3", gate_mode="random") + "shared_experts: [{source_model: qwen3-a}]\n",
        "qwen3",
    ),
    "two kinds": (recipe("llama", gate_mode="random").replace("llama-b", "qwen3-b"), "qwen3"),
    "Mixtral of Qwen": (recipe("qwen2", gate_mode="random", architecture="Mixtral"), "qwen2"),
    "same texts": (recipe(prompts=(WEATHER, WEATHER)), "all experts have the same prompts"),
    "no such model": (recipe().replace("llama-b,", "llama-c,"), "no folder or file 'llama-c'"),
    "noise below 0": (recipe(extra=(", noise_scale: -1", "")), "noise_scale is -1"),
}


@pytest.mark.parametrize("row", REFUSED)
def test_what_cannot_be_built_is_refused_before_anything_is_read(models, row):
    text, message = REFUSED[row]
    with pytest.raises(MergeKitError) as caught:
        plan(text, models)
    assert message in str(caught.value)


def test_experts_that_differ_in_one_split_between_positive_and_negative_are_not_the_same(models):
    both = Prompts(("sun", "rain")), Prompts(("sun",), ("rain",))
    made = merge(recipe(prompts=both, gate_mode="cheap_embed"), models)
    assert not torch.equal(rows(made)[0], rows(made)[1])
