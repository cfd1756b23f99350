"""Upcycled models load in transformers, compute what the dense one did, and generate."""

from __future__ import annotations

import json

import dense_models
import pytest
import torch
import transformers
from dense_models import KINDS

from merge_kit.api import merge

TOLERANCE = 1e-5  # of logits: expert weights that sum to 1 in float32, and other kernels


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Let torch use one thread, which is the fastest for models as small as these."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def upcycled(tmp_path_factory):
    """Save a dense model, upcycle it, and return both folders, once a kind."""
    made = {}

    def of(kind):
        if kind not in made:
            root = tmp_path_factory.mktemp("upcycled")
            dense_models.saved(root / "dense", kind)
            parameters = {"num_experts": 4, "architecture": KINDS[kind].becomes, "router_scale": 1}
            merge(recipe(root / "dense", **parameters), root / "sparse")
            made[kind] = root / "dense", root / "sparse"
        return made[kind]

    return of


def recipe(base, **parameters):
    return {"merge_method": "sparse_upcycle", "base_model": str(base), "parameters": parameters}


@pytest.mark.parametrize("kind", KINDS)
def test_copies_compute_what_the_dense_model_does(upcycled, kind):
    before, after = upcycled(kind)
    dense, sparse = dense_models.load(before), dense_models.load(after)
    assert sparse.config.model_type == KINDS[kind].becomes
    tokens = dense_models.prompt()
    with torch.no_grad():
        wanted, found = dense(tokens).logits, sparse(tokens).logits
    assert wanted.abs().max() > 1  # not a model of zeros
    assert (wanted - found).abs().max() <= TOLERANCE * wanted.abs().max()


@pytest.mark.parametrize("kind", KINDS)
def test_copies_generate_what_the_dense_model_does_with_a_cache(upcycled, kind):
    before, after = upcycled(kind)
    dense, sparse = dense_models.load(before), dense_models.load(after)
    wanted, found = (
        model.generate(
            dense_models.prompt(3), max_new_tokens=10, do_sample=False, eos_token_id=None
        )
        for model in (dense, sparse)
    )
    assert found.shape == (2, 13)
    assert torch.equal(wanted, found)


@pytest.mark.parametrize("kind", KINDS)
def test_files_hold_the_names_and_shapes_that_transformers_writes(upcycled, tmp_path, kind):
    _, after = upcycled(kind)
    config = transformers.AutoConfig.from_pretrained(after)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    written = {n: t.shape for n, t in dense_models.tensors(tmp_path).items()}
    assert {n: t.shape for n, t in dense_models.tensors(after).items()} == written


@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3"])
def test_an_upcycled_model_trains(upcycled, kind):
    _, after = upcycled(kind)
    model, tokens = dense_models.load(after).train(), dense_models.prompt()
    steps = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(4):
        loss = model(tokens, labels=tokens, output_router_logits=True).loss
        loss.backward()
        steps.step()
        steps.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("kind", ["qwen2", "qwen3"])
@pytest.mark.parametrize(("asked", "dense_layers"), [([1], [0, 2]), ("even", [1]), ("odd", [0, 2])])
def test_layers_can_stay_dense(tmp_path, kind, asked, dense_layers):
    before = dense_models.saved(tmp_path / "dense", kind)
    merge(recipe(before, num_experts=4, sparse_layers=asked), tmp_path / "sparse")
    config = json.loads((tmp_path / "sparse/config.json").read_text())
    assert config["mlp_only_layers"] == dense_layers
    assert config["intermediate_size"] == config["moe_intermediate_size"] == 40
    dense, sparse = dense_models.load(before), dense_models.load(tmp_path / "sparse")
    with torch.no_grad():
        wanted, found = (model(dense_models.prompt()).logits for model in (dense, sparse))
    assert (wanted - found).abs().max() <= TOLERANCE * wanted.abs().max()
    names = dense_models.tensors(tmp_path / "sparse")
    for layer in range(3):
        assert (f"model.layers.{layer}.mlp.gate_proj.weight" in names) == (layer in dense_layers)


def test_a_config_of_version_4_keeps_its_meaning(tmp_path):
    before = dense_models.saved(tmp_path / "dense", "mistral")
    path = before / "config.json"
    values = json.loads(path.read_text())
    for key in ("rope_parameters", "rms_norm_eps", "sliding_window", "bos_token_id", "dtype"):
        values.pop(key)
    values |= {"torch_dtype": "float32", "head_dim": None, "hidden_act": "silu"}
    path.write_text(json.dumps(values))
    for layout in ("mixtral", "qwen2_moe"):
        merge(recipe(before, num_experts=2, architecture=layout), tmp_path / layout)
        dense, sparse = dense_models.load(before), dense_models.load(tmp_path / layout)
        with torch.no_grad():
            wanted, found = (model(dense_models.prompt()).logits for model in (dense, sparse))
        assert (wanted - found).abs().max() <= TOLERANCE * wanted.abs().max()
        assert sparse.config.bos_token_id == dense.config.bos_token_id == 1
        assert sparse.config.sliding_window == dense.config.sliding_window == 4096
