"""Routers in the mixtures that they are made for: what transformers' own routers are given."""

from __future__ import annotations

import pytest
import torch
import transformers
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

from merge_kit.api import merge
from tests.models import config, contents, stored
from tests.structures import prompted
from tests.structures.prompted import LAYERS

EXPERTS = (
    {"positive_prompts": ["sun rain wind", "snow wind rain sun snow"]},
    {"positive_prompts": ["add sum times root", "sum"], "negative_prompts": ["code loop"]},
    {"positive_prompts": ["loop call if code loop call"]},
)
KINDS = tuple(prompted.OWN)
TINY = 1e-5


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("bases")
    even = {"qwen3": prompted.EVEN}
    return {kind: prompted.save(kind, root / kind, **even.get(kind, {})) for kind in KINDS}


def recipe(base, router, **more):
    """Return a recipe of three copies of a base, each with prompts."""
    models = [{"model": str(base), **prompts} for prompts in EXPERTS]
    parameters = {"router": router, "experts_per_token": 2, **more}
    return {
        "merge_method": "sparse_upcycle",
        "base_model": str(base),
        "models": models,
        "parameters": parameters,
    }


def load(folder):
    model, found = AutoModelForCausalLM.from_pretrained(
        folder, output_loading_info=True, dtype=torch.float32
    )
    assert not any(found.values()), found
    return model.eval()


def unit(vector):
    return vector / vector.norm()


@pytest.mark.parametrize("kind", KINDS)
def test_rows_are_what_the_mixtures_own_routers_are_given(kind, folders, tmp_path):
    merge(recipe(folders[kind], "hidden"), tmp_path / "out")
    model = load(tmp_path / "out")

    def mean(texts, layer):
        found = [prompted.entering(model, prompted.ids(kind, text)) for text in texts]
        return sum(states[layer][-1] for states in found) / len(texts)

    for layer, gate in enumerate(prompted.gates(model)):
        for row, prompts in zip(gate.weight.detach(), EXPERTS, strict=True):
            wanted = mean(prompts["positive_prompts"], layer)
            if "negative_prompts" in prompts:
                wanted = wanted - mean(prompts["negative_prompts"], layer)
            assert (row - unit(wanted)).abs().max() < TINY
            assert row.norm() == pytest.approx(1, abs=1e-6)


def test_a_prompt_goes_to_its_own_expert(folders, tmp_path):
    """What a router's input has most in common with is itself."""
    merge(recipe(folders["llama"], "hidden"), tmp_path / "out")
    model = load(tmp_path / "out")
    text = EXPERTS[2]["positive_prompts"][0]
    for states, gate in zip(
        prompted.entering(model, prompted.ids("llama", text)), prompted.gates(model), strict=True
    ):
        assert int((gate.weight.detach() @ states[-1]).argmax()) == 2


def test_a_shared_expert_has_a_gate_of_its_own_prompts(folders, tmp_path):
    base = folders["qwen2"]
    shared = {"model": str(base), "positive_prompts": ["sun rain wind"]}
    merge(recipe(base, "hidden") | {"shared_experts": [shared]}, tmp_path / "own")
    merge(recipe(base, "hidden"), tmp_path / "none")
    own, none = stored(tmp_path / "own"), stored(tmp_path / "none")
    model = prompted.build("qwen2")
    states = prompted.entering(model, prompted.ids("qwen2", "sun rain wind"))
    for layer in range(LAYERS):
        name = f"model.layers.{layer}.mlp.shared_expert_gate.weight"
        assert own[name].shape == (1, prompted.HIDDEN)
        assert (own[name][0] - unit(states[layer][-1])).abs().max() < TINY
        assert not none[name].any()
        rows = f"model.layers.{layer}.mlp.gate.weight"
        assert torch.equal(own[rows], none[rows])


@pytest.mark.parametrize("router", ["hidden", "cheap_embed"])
def test_a_shared_expert_without_prompts_has_a_gate_of_zeros(router, folders, tmp_path):
    base = folders["qwen2"]
    merge(recipe(base, router) | {"shared_experts": [{"model": str(base)}]}, tmp_path / "own")
    merge(recipe(base, router), tmp_path / "none")
    own, none = stored(tmp_path / "own"), stored(tmp_path / "none")
    for layer in range(LAYERS):
        lead = f"model.layers.{layer}.mlp"
        assert not own[f"{lead}.shared_expert_gate.weight"].any()
        assert own[f"{lead}.shared_expert.down_proj.weight"].any()  # weighed by a half
        assert torch.equal(own[f"{lead}.gate.weight"], none[f"{lead}.gate.weight"])


@pytest.mark.parametrize("router", ["hidden", "cheap_embed"])
def test_a_base_may_be_a_stage_with_an_adapter(router, folders, tmp_path):
    """The same as if the stage had been written to disk first."""
    adapted = f"{folders['llama']}+{_adapter(tmp_path / 'adapter')}"
    other = prompted.save("llama", tmp_path / "other", seed=5)
    soup = {
        "merge_method": "slerp",
        "base_model": adapted,
        "models": [{"model": str(other)}],
        "parameters": {"t": 0.25},
    }
    merge(soup, tmp_path / "soup")
    merge(recipe(tmp_path / "soup", router), tmp_path / "in_two_runs")
    merge([soup | {"name": "soup"}, recipe("soup", router)], tmp_path / "at_once")
    one, two = stored(tmp_path / "at_once"), stored(tmp_path / "in_two_runs")
    assert one.keys() == two.keys()
    assert all(torch.equal(one[name], two[name]) for name in one)


def _adapter(folder):
    """Write an adapter that changes two layers and the embedding's rows."""
    generator = torch.Generator().manual_seed(9)
    lead, tensors = "base_model.model.model.layers", {}
    for layer in (0, 2):
        for name, rows, columns in (("q_proj", 32, 16), ("o_proj", 16, 32)):
            module = f"{lead}.{layer}.self_attn.{name}"
            a, b = (torch.randn(s, generator=generator) for s in ((2, columns), (rows, 2)))
            tensors |= {f"{module}.lora_A.weight": a, f"{module}.lora_B.weight": 0.2 * b}
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors")
    settings = (
        '{"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": ["q_proj", "o_proj"]}'
    )
    (folder / "adapter_config.json").write_text(settings)
    return folder


@pytest.mark.parametrize("router", ["hidden", "hidden_avg", "cheap_embed", "random"])
def test_threads_change_no_byte(router, folders, tmp_path):
    for threads in (1, 3):
        merge(recipe(folders["qwen3"], router), tmp_path / str(threads), threads=threads)
    one, three = (contents(tmp_path / str(threads)) for threads in (1, 3))
    weights = [name for name in one if name.endswith(".safetensors")]
    assert weights
    assert all(one[name] == three[name] for name in weights)


def test_sparse_layers_have_routers_of_their_own_depth(folders, tmp_path):
    merge(recipe(folders["qwen3"], "hidden", sparse_layers=[1, 3]), tmp_path / "some")
    merge(recipe(folders["qwen3"], "hidden"), tmp_path / "all")
    some, every = stored(tmp_path / "some"), stored(tmp_path / "all")
    gates = sorted(name for name in some if name.endswith("mlp.gate.weight"))
    assert gates == [f"model.layers.{layer}.mlp.gate.weight" for layer in (1, 3)]
    assert all(torch.equal(some[name], every[name]) for name in gates)


def test_the_dtype_of_the_stage_is_that_of_its_routers(folders, tmp_path):
    merge(recipe(folders["llama"], "hidden") | {"dtype": "bfloat16"}, tmp_path / "out")
    merge(recipe(folders["llama"], "hidden"), tmp_path / "wide")
    narrow, wide = stored(tmp_path / "out"), stored(tmp_path / "wide")
    gates = [name for name in wide if "gate.weight" in name and "experts" not in name]
    assert len(gates) == LAYERS
    assert all(torch.equal(narrow[name], wide[name].bfloat16()) for name in gates)
    assert config(tmp_path / "out")["model_type"] == "mixtral"


def test_transformers_is_left_as_it_was(folders, tmp_path, capfd):
    settings = transformers.utils.logging
    before = settings.get_verbosity(), settings.is_progress_bar_enabled()
    merge(recipe(folders["mistral"], "hidden"), tmp_path / "out")
    assert (settings.get_verbosity(), settings.is_progress_bar_enabled()) == before
    assert capfd.readouterr() == ("", "")
