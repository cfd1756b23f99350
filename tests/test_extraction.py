"""A fine-tuned model as an adapter: exact where it can be, and nothing lost without a word."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

from merge_kit import merge, plan
from merge_kit.errors import MergeKitError, MismatchError, PlanError
from merge_kit.plan.extracting import looks
from tests.adapters.makers import (
    answers,
    load_adapted,
    load_base,
    make_base,
    quiet,
    randomise,
    tensors,
)
from tests.oracles import adapters as oracle

ROOT = Path(__file__).resolve().parent.parent
QUERY = "model.layers.0.self_attn.q_proj.weight"
NORM = "model.norm.weight"


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    """Return what makes a base once: a folder by kind and dtype."""
    folder, made = tmp_path_factory.mktemp("bases"), {}

    def base(kind="llama", dtype=torch.float32):
        if (kind, dtype) not in made:
            made[kind, dtype] = make_base(kind, folder / f"{kind}-{len(made)}", dtype)
        return made[kind, dtype]

    return base


def edited(base, folder, changes, *, added=None, dtype=None):
    """Return a copy of a model in which functions have changed tensors, or tensors are new."""
    shutil.copytree(base, folder)
    held = {
        name: tensor if dtype is None else tensor.to(dtype)
        for name, tensor in tensors(base).items()
    }
    for name, change in changes.items():
        held[name] = change(held[name]).contiguous()
    held |= added or {}
    save_file(held, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def recipe(base, tuned, **parameters):
    dtype = parameters.pop("dtype", None)
    found = {
        "merge_method": "lora_extract",
        "base_model": str(base),
        "models": [{"model": str(tuned)}],
        "parameters": parameters,
    }
    return found if dtype is None else {**found, "dtype": dtype}


def extracted(base, tuned, out, **parameters):
    return merge(recipe(base, tuned, **parameters), out)


def low_rank(rank, seed=0, size=0.5):
    """Return what adds a random change of a rank."""

    def add(weight):
        generator = torch.Generator().manual_seed(seed)
        b = torch.randn(weight.shape[0], rank, generator=generator, dtype=torch.float64)
        a = torch.randn(rank, weight.shape[1], generator=generator, dtype=torch.float64)
        return (weight.double() + size * b @ a).to(weight.dtype)

    return add


def diagonal(*values):
    """Return what adds these numbers to the diagonal."""

    def add(weight):
        change = torch.zeros_like(weight)
        change.diagonal()[: len(values)] = torch.tensor(values, dtype=weight.dtype)
        return weight + change

    return add


def matrices(base):
    return [n for n, t in tensors(base).items() if ".layers." in n and t.ndim == 2]


def same_answers(kind, base, out, tuned, tolerance=1e-5):
    found, wanted = answers(load_adapted(kind, base, out)), answers(load_base(kind, tuned))
    return float((found - wanted).abs().max()) <= tolerance * float(wanted.abs().max())


def config_of(out):
    return json.loads((out / "adapter_config.json").read_text())


def dropped(done, model):
    return {f.tensor: f.why for f in done.plan.fates if f.what == "dropped" and f.model == model}


# factors -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_change_of_known_ranks_is_recovered(tmp_path, bases, dtype):
    base = bases(dtype=dtype)
    ranks = {name: 1 + 5 * i % 7 for i, name in enumerate(matrices(base))}
    changes = {name: low_rank(rank, i) for i, (name, rank) in enumerate(ranks.items())}
    tuned = edited(base, tmp_path / "tuned", changes, dtype=torch.float32)
    extracted(base, tuned, tmp_path / "out", energy=1 - 1e-9)
    found, old, new = oracle.changes(tmp_path / "out"), tensors(base), tensors(tuned)
    assert found.keys() == ranks.keys()
    for name, rank in ranks.items():
        change = new[name].double() - old[name].double()
        assert float((found[name] - change).norm()) <= 1e-5 * float(change.norm())
        module = name.removesuffix(".weight")
        stored = load_file(tmp_path / "out/adapter_model.safetensors")
        assert stored[f"base_model.model.{module}.lora_A.weight"].shape[0] == rank


def test_models_in_bfloat16_give_factors_in_bfloat16_or_as_asked(tmp_path, bases):
    base = bases(dtype=torch.bfloat16)
    tuned = edited(base, tmp_path / "tuned", {QUERY: diagonal(4.0, 2.0)})
    for dtype, wanted in ((None, torch.bfloat16), ("float32", torch.float32)):
        more = {} if dtype is None else {"dtype": dtype}
        extracted(base, tuned, tmp_path / str(wanted), rank=2, **more)
        found = load_file(tmp_path / str(wanted) / "adapter_model.safetensors")
        assert {tensor.dtype for tensor in found.values()} == {wanted}


@pytest.mark.parametrize(
    ("parameters", "rank", "residual"),
    [
        ({"rank": 1}, 1, 5**0.5),
        ({"rank": 2}, 2, 1.0),
        ({"rank": 9}, 9, 0.0),
        ({"energy": 0.6}, 1, 5**0.5),
        ({"energy": 0.7}, 2, 1.0),
        ({"energy": 1}, 3, 0.0),
    ],
)
def test_ranks_and_energies_by_hand(tmp_path, bases, parameters, rank, residual):
    base = bases()
    tuned = edited(base, tmp_path / "tuned", {QUERY: diagonal(1.0, -3.0, 2.0)})  # squares 9, 4, 1
    done = extracted(base, tuned, tmp_path / "out", **parameters)
    assert [(one.key, one.rank) for one in done.plan.ranks] == [(QUERY[: -len(".weight")], rank)]
    facts = done.report.facts[QUERY[: -len(".weight")]]
    assert facts["norm"] == pytest.approx(14**0.5, rel=1e-5)  # of weights rounded to float32
    assert facts["residual"] == pytest.approx(residual, rel=1e-5, abs=1e-5)
    config = config_of(tmp_path / "out")
    assert (config["r"], config["lora_alpha"]) == (rank, rank)


def test_a_rank_may_differ_from_tensor_to_tensor(tmp_path, bases):
    base = bases()
    value = "model.layers.1.self_attn.v_proj.weight"
    tuned = edited(base, tmp_path / "tuned", {QUERY: low_rank(4), value: low_rank(4)})
    ranks = [{"filter": "q_proj", "value": 3}, {"value": 2}]
    done = extracted(base, tuned, tmp_path / "out", rank=ranks)
    assert {one.key.rpartition(".")[2]: one.rank for one in done.plan.ranks} == {
        "q_proj": 3,
        "v_proj": 2,
    }
    load_adapted("llama", base, tmp_path / "out")


def test_a_plan_shows_upper_bounds_and_a_manifest_what_was_found(tmp_path, bases):
    base = bases()
    tuned = edited(base, tmp_path / "tuned", {QUERY: low_rank(2)})
    planned = plan(recipe(base, tuned, energy=0.999))
    module = QUERY[: -len(".weight")]
    bound = next(one for one in planned.ranks if one.key == module)
    assert (bound.rank, bound.fitted, bool(planned.fits)) == (16, True, True)
    done = extracted(base, tuned, tmp_path / "out", energy=0.999)
    assert not done.plan.fits
    assert json.loads((tmp_path / "out/merge_kit.json").read_text())["ranks"] == {module: 2}


def test_threads_change_no_byte(tmp_path, bases):
    base = bases()
    make_base("llama", tmp_path / "tuned", torch.float32, seed=2)
    for threads in (1, 3):
        request = recipe(base, tmp_path / "tuned", energy=0.8)
        merge(request, tmp_path / f"out{threads}", threads=threads)
    one, other = (tmp_path / f"out{n}/adapter_model.safetensors" for n in (1, 3))
    assert one.read_bytes() == other.read_bytes()


# what is not changed -----------------------------------------------------------------------------


def test_what_is_not_changed_is_left_out_by_name(tmp_path, bases):
    base = bases()
    tuned = edited(base, tmp_path / "tuned", {QUERY: low_rank(2)})
    done = extracted(base, tuned, tmp_path / "out", rank=2)
    assert len(tensors(tmp_path / "out")) == 2
    for model in ("input-1", "input-2"):
        left = dropped(done, model)
        assert left.keys() == tensors(base).keys() - {QUERY}
        assert set(left.values()) == {"not changed"}


@pytest.mark.parametrize("parameters", [{"rank": 2}, {"energy": 0.5}])
def test_models_that_are_equal_make_no_adapter(tmp_path, bases, parameters):
    tuned = edited(bases(), tmp_path / "tuned", {})
    with pytest.raises(PlanError, match="are equal in every tensor"):
        extracted(bases(), tuned, tmp_path / "out", **parameters)
    assert not (tmp_path / "out").exists()


def test_the_same_numbers_in_another_dtype_are_no_change(tmp_path, bases):
    base = bases(dtype=torch.bfloat16)
    tuned = edited(base, tmp_path / "tuned", {QUERY: low_rank(2)}, dtype=torch.float32)
    done = extracted(base, tuned, tmp_path / "out", rank=2)
    assert len(tensors(tmp_path / "out")) == 2
    assert {one.key for one in done.plan.ranks} == {QUERY[: -len(".weight")]}


# what has no low rank ----------------------------------------------------------------------------


def more(tensor):
    return tensor + 0.5 * torch.linspace(-1, 1, tensor.numel()).view(tensor.shape)


REST = {
    "norms": ("llama", [NORM, "model.layers.1.input_layernorm.weight"]),
    "a head": ("llama", ["lm_head.weight"]),
    "embeddings": ("llama", ["model.embed_tokens.weight"]),
    "tied embeddings": ("llama_tied", ["model.embed_tokens.weight"]),
    "a bias beside its matrix": (
        "llama_biased",
        ["model.layers.0.self_attn.q_proj.bias"],
    ),
    "biases alone": (
        "llama_biased",
        ["model.layers.0.self_attn.k_proj.bias", "model.layers.1.mlp.up_proj.bias"],
    ),
    "norms with biases": ("gpt2", ["transformer.h.0.ln_1.weight", "transformer.h.1.ln_2.bias"]),
    "positions": ("gpt2", ["transformer.wpe.weight"]),
    "tied embeddings of gpt2": ("gpt2", ["transformer.wte.weight"]),
}
MATRIX = {"gpt2": "transformer.h.0.attn.c_attn.weight"}


@pytest.mark.parametrize("what", REST)
def test_what_has_no_low_rank_is_saved_as_peft_reads_it(tmp_path, bases, what):
    kind, names = REST[what]
    base = bases(kind)
    matrix = MATRIX.get(kind, QUERY)
    changes = {matrix: low_rank(3), **dict.fromkeys(names, more)}
    tuned = edited(base, tmp_path / "tuned", changes)
    done = extracted(base, tuned, tmp_path / "out", rank=3)
    assert same_answers(kind, base, tmp_path / "out", tuned)
    copied = {f.tensor for f in done.plan.fates if f.model == "input-1" and f.what == "copied"}
    assert set(names) <= copied


def test_every_way_of_saving_says_so_in_the_config(tmp_path, bases):
    base = bases("llama_biased")
    bias = "model.layers.0.self_attn.q_proj.bias"
    one = edited(base, tmp_path / "one", {QUERY: low_rank(1), bias: more})
    extracted(base, one, tmp_path / "a", rank=1)
    assert (config_of(tmp_path / "a")["bias"], config_of(tmp_path / "a")["modules_to_save"]) == (
        "lora_only",
        None,
    )
    two = edited(base, tmp_path / "two", {bias: more, NORM: more})
    extracted(base, two, tmp_path / "b", rank=1)
    assert (config_of(tmp_path / "b")["bias"], config_of(tmp_path / "b")["modules_to_save"]) == (
        "all",
        ["model.norm"],
    )


def test_only_what_has_no_low_rank_may_be_changed(tmp_path, bases):
    tuned = edited(bases(), tmp_path / "tuned", {NORM: more})
    extracted(bases(), tuned, tmp_path / "out", rank=4)
    assert list(tensors(tmp_path / "out")) == ["base_model.model.model.norm.weight"]
    assert same_answers("llama", bases(), tmp_path / "out", tuned)


def test_rest_is_refused_when_it_is_found_with_the_first_names(tmp_path, bases):
    names = [n for n in tensors(bases()) if "norm" in n or "embed" in n or "head" in n]
    tuned = edited(bases(), tmp_path / "tuned", {QUERY: low_rank(2), **dict.fromkeys(names, more)})
    with pytest.raises(MismatchError) as caught:
        extracted(bases(), tuned, tmp_path / "out", rank=2, rest="refuse")
    assert caught.value.problem.startswith(f"{len(names)} tensors (")
    assert caught.value.problem.count(", ") == 5  # five names and an ellipsis
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("piece", [1 << 21, 5])
def test_rest_is_dropped_by_name_and_said_so(tmp_path, bases, monkeypatch, piece):
    monkeypatch.setattr(looks, "PIECE", piece)
    tuned = edited(bases(), tmp_path / "tuned", {QUERY: low_rank(2), NORM: lambda t: t + 0.5})
    done = extracted(bases(), tuned, tmp_path / "out", rank=2, rest="drop")
    assert len(tensors(tmp_path / "out")) == 2
    assert dropped(done, "input-1")[NORM] == "changed, and left out (rest: drop)"
    norm = "; the norm of this change is 2"  # of 16 elements, 0.5 each
    assert f"rest: drop: 1 changed tensor is left out: {NORM}{norm}" in done.plan.notes


def test_if_all_that_differs_is_dropped_there_is_no_adapter(tmp_path, bases):
    tuned = edited(bases(), tmp_path / "tuned", {NORM: more})
    with pytest.raises(PlanError, match="differ only in what is left out"):
        extracted(bases(), tuned, tmp_path / "out", rank=2, rest="drop")


def test_rest_may_differ_from_tensor_to_tensor(tmp_path, bases):
    tuned = edited(bases(), tmp_path / "tuned", {"lm_head.weight": more, NORM: more})
    rest = [{"filter": "lm_head", "value": "drop"}, {"value": "save"}]
    extracted(bases(), tuned, tmp_path / "out", rank=2, rest=rest)
    assert list(tensors(tmp_path / "out")) == ["base_model.model.model.norm.weight"]


@pytest.mark.parametrize("kind", ["llama", "llama_tied"])
def test_new_tokens_are_saved_and_load_into_a_base_of_their_size(tmp_path, bases, kind):
    base = bases(kind)
    model = load_base(kind, base, torch.float32)
    with quiet():
        model.resize_token_embeddings(44, mean_resizing=False)
    with torch.no_grad():
        model.get_input_embeddings().weight[40:] = 0.25
        model.model.layers[0].self_attn.q_proj.weight.mul_(1.5)
    model.save_pretrained(tmp_path / "tuned")
    done = extracted(base, tmp_path / "tuned", tmp_path / "out", rank=16)
    assert any("resize_token_embeddings(44)" in note for note in done.plan.notes)
    assert tensors(tmp_path / "out")["base_model.model.lm_head.weight"].shape == (44, 16)
    wide = load_base(kind, base)
    with quiet():
        wide.resize_token_embeddings(44, mean_resizing=False)
        wide.save_pretrained(tmp_path / "wide")
    found = answers(load_adapted(kind, tmp_path / "wide", tmp_path / "out"))
    wanted = answers(load_base(kind, tmp_path / "tuned"))
    assert float((found - wanted).abs().max()) <= 1e-5 * float(wanted.abs().max())


def test_new_tokens_are_refused_before_anything_is_read(tmp_path, bases):
    wide = {"model.embed_tokens.weight": lambda t: torch.cat([t, t[:2]])}
    tuned = edited(bases(), tmp_path / "tuned", wide)
    with pytest.raises(MismatchError, match=r"model\.embed_tokens\.weight is changed"):
        plan(recipe(bases(), tuned, rank=2, rest="refuse"))


def test_a_parameter_beside_modules_cannot_be_saved(tmp_path, bases):
    name = "model.layers.0.self_attn.sinks"
    tuned = edited(bases(), tmp_path / "tuned", {QUERY: low_rank(2)}, added={name: torch.ones(4)})
    with pytest.raises(MismatchError, match="no adapter of peft can hold it") as caught:
        extracted(bases(), tuned, tmp_path / "out", rank=2)
    assert name in caught.value.problem
    extracted(bases(), tuned, tmp_path / "out", rank=2, rest="drop")


def test_a_bias_that_the_base_lacks_cannot_be_saved(tmp_path, bases):
    name = QUERY.replace("weight", "bias")
    tuned = edited(bases(), tmp_path / "tuned", {QUERY: low_rank(2)}, added={name: torch.ones(16)})
    with pytest.raises(MismatchError, match="the module has none in the base") as caught:
        extracted(bases(), tuned, tmp_path / "out", rank=2)
    assert caught.value.problem.startswith(f"{name} is changed")
    done = extracted(bases(), tuned, tmp_path / "out", rank=2, rest="drop")
    assert dropped(done, "input-1")[name] == "changed, and left out (rest: drop)"
    assert config_of(tmp_path / "out")["bias"] == "none"


def test_a_module_that_ends_like_a_saved_one_is_saved_with_it(tmp_path):
    names = ("norm.weight", "layers.0.input_norm.weight", "layers.0.up.weight")
    held = {name: torch.eye(4) if "up" in name else torch.ones(4) for name in names}
    for folder, changed in (("base", {}), ("tuned", {"norm.weight": torch.full((4,), 2.0)})):
        (tmp_path / folder).mkdir()
        save_file({**held, **changed}, tmp_path / folder / "model.safetensors")
    extracted(tmp_path / "base", tmp_path / "tuned", tmp_path / "out", rank=1)
    assert list(tensors(tmp_path / "out")) == [
        "base_model.model.layers.0.input_norm.weight",  # peft would look for it
        "base_model.model.norm.weight",
    ]


# names -------------------------------------------------------------------------------------------


def renamed(source, folder, rename):
    """Return a copy of a model whose tensors have other names."""
    shutil.copytree(source, folder)
    held = {rename(name): tensor for name, tensor in tensors(source).items()}
    save_file(held, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize("which", ["both", "base", "tuned"])
def test_a_base_without_the_prefix_of_its_class_is_named_as_peft_sees_it(tmp_path, bases, which):
    whole = bases("gpt2")
    matrix = "transformer.h.1.mlp.c_fc.weight"
    norm = "transformer.ln_f.weight"
    tuned = edited(whole, tmp_path / "whole", {matrix: low_rank(2), norm: more})
    paths = {"base": whole, "tuned": tuned}
    for name in paths if which == "both" else (which,):
        paths[name] = renamed(
            paths[name], tmp_path / name, lambda n: n.removeprefix("transformer.")
        )
    done = extracted(paths["base"], paths["tuned"], tmp_path / "out", rank=2)
    assert {one.key for one in done.plan.ranks} == {"transformer.h.1.mlp.c_fc"}
    assert config_of(tmp_path / "out")["fan_in_fan_out"] is True
    assert same_answers("gpt2", whole, tmp_path / "out", tuned)


def handmade(folder, config, **held):
    folder.mkdir()
    save_file(held, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_buffers_that_only_old_files_have_are_dropped_by_name(tmp_path):
    config = {"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"]}
    old = {"h.0.attn.c_attn.weight": torch.eye(4), "h.0.attn.bias": torch.ones(1, 1, 4, 4)}
    new = {"transformer.h.0.attn.c_attn.weight": 2 * torch.eye(4)}
    base = handmade(tmp_path / "base", config, **old)
    done = extracted(base, handmade(tmp_path / "tuned", config, **new), tmp_path / "out", rank=1)
    assert dropped(done, "input-2") == {"h.0.attn.bias": "programs compute it"}
    assert [one.key for one in done.plan.ranks] == ["transformer.h.0.attn.c_attn"]


def test_buffers_that_the_base_lacks_are_dropped_by_name(tmp_path, bases):
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    tuned = edited(bases(), tmp_path / "tuned", {QUERY: low_rank(2)}, added={name: torch.ones(2)})
    done = extracted(bases(), tuned, tmp_path / "out", rank=2)
    assert dropped(done, "input-1")[name] == "programs compute it"
    assert len(tensors(tmp_path / "out")) == 2


T5 = T5Config(
    vocab_size=40,
    d_model=16,
    d_kv=4,
    d_ff=24,
    num_layers=1,
    num_heads=4,
    decoder_start_token_id=0,
)
BART = BartConfig(
    vocab_size=40,
    d_model=16,
    encoder_layers=1,
    decoder_layers=1,
    encoder_attention_heads=2,
    decoder_attention_heads=2,
    max_position_embeddings=32,
    encoder_ffn_dim=24,
    decoder_ffn_dim=24,
)
SIDES = {"shared.weight", "encoder.embed_tokens.weight", "decoder.embed_tokens.weight"}


@pytest.mark.parametrize(
    ("kind", "config", "lead"),
    [
        (T5ForConditionalGeneration, T5, ""),
        (BartForConditionalGeneration, BART, "model."),
    ],
)
def test_an_embedding_that_two_sides_share_is_saved_for_each(tmp_path, kind, config, lead):
    for name, seed in (("base", 1), ("tuned", 2)):
        model = kind(config)
        randomise(model, seed)
        model.save_pretrained(tmp_path / name)
    base, out = tmp_path / "base", tmp_path / "out"
    extracted(base, tmp_path / "tuned", out, rank=24)
    saved = {f"base_model.model.{lead}{name}" for name in SIDES}
    assert {*saved, "base_model.model.lm_head.weight"} <= tensors(out).keys()
    with quiet():
        adapted = peft.PeftModel.from_pretrained(kind.from_pretrained(base), out).eval()
    asked = {"input_ids": torch.arange(2, 8)[None], "decoder_input_ids": torch.arange(3, 7)[None]}
    with torch.no_grad():
        found = adapted(**asked).logits
        wanted = kind.from_pretrained(tmp_path / "tuned").eval()(**asked).logits
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
    back = {"merge_method": "passthrough", "models": [{"model": f"{base}+{out}"}]}
    done = merge(back, tmp_path / "in")
    shared = tensors(tmp_path / "tuned")[f"{lead}shared.weight"]
    assert tensors(tmp_path / "in").keys() == tensors(base).keys()
    assert torch.equal(tensors(tmp_path / "in")[f"{lead}shared.weight"], shared)
    owner = f"base_model.model.{lead}shared.weight"
    repeats = (saved | {"base_model.model.lm_head.weight"}) - {owner}
    assert dropped(done, "input-2") == dict.fromkeys(repeats, f"it repeats {owner}")


def test_one_side_that_has_another_embedding_than_the_other_does_not_come_back(tmp_path):
    for name, seed in (("base", 1), ("tuned", 2)):
        model = T5ForConditionalGeneration(T5)
        randomise(model, seed)
        model.save_pretrained(tmp_path / name)
    out = tmp_path / "out"
    extracted(tmp_path / "base", tmp_path / "tuned", out, rank=24)
    held = tensors(out)
    held["base_model.model.decoder.embed_tokens.weight"] += 1
    save_file(held, out / "adapter_model.safetensors")
    back = {
        "merge_method": "passthrough",
        "models": [{"model": f"{tmp_path / 'base'}+{out}"}],
    }
    assert "decoder.embed_tokens.weight" in refusal(tmp_path / "no", back)


def test_the_head_of_whisper_follows_its_embedding(tmp_path):
    kind = "WhisperForConditionalGeneration"
    config = {"model_type": "whisper", "architectures": [kind], "is_encoder_decoder": True}
    held = {"model.decoder.embed_tokens.weight": torch.ones(6, 4)}
    base = handmade(tmp_path / "base", config, **held)
    tuned = handmade(tmp_path / "tuned", config, **{k: 2 * v for k, v in held.items()})
    out = tmp_path / "out"
    extracted(base, tuned, out, rank=1)
    head = "base_model.model.proj_out.weight"
    assert list(tensors(out)) == ["base_model.model.model.decoder.embed_tokens.weight", head]
    back = {"merge_method": "passthrough", "models": [{"model": f"{base}+{out}"}]}
    merge(back, tmp_path / "in")
    assert tensors(tmp_path / "in").keys() == held.keys()
    reference = {"model": str(base), "lora": [{"path": str(out), "weight": 0}]}
    done = merge({**back, "models": [{"model": reference}]}, tmp_path / "none")
    assert dropped(done, "input-2").keys() == tensors(out).keys()


def test_programs_of_an_unknown_task_are_said_to_name_modules_as_they_like(tmp_path):
    config = {"model_type": "t5", "architectures": ["T5ForConditionalGeneration"]}
    held = {"encoder.block.0.wi.weight": torch.eye(4)}
    base = handmade(tmp_path / "base", config, **held)
    tuned = handmade(tmp_path / "tuned", config, **{k: 2 * v for k, v in held.items()})
    done = extracted(base, tuned, tmp_path / "out", rank=1)
    assert any("a program that calls those of T5" in note for note in done.plan.notes)


def test_modules_whose_names_end_in_numbers_are_chosen_alone(tmp_path):
    config = {"model_type": "net"}
    held = {"top.0.weight": torch.eye(4), "n.0.n.bias": torch.ones(4)}
    base = handmade(tmp_path / "base", config, **held)
    changed = {**held, "top.0.weight": 2 * torch.eye(4)}
    extracted(base, handmade(tmp_path / "tuned", config, **changed), tmp_path / "out", rank=4)

    class Inner(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.n = torch.nn.LayerNorm(4)

    net = torch.nn.Module()
    net.top = torch.nn.Sequential(torch.nn.Linear(4, 4, bias=False))
    net.n = torch.nn.ModuleList([Inner()])  # n.0 is no layer that peft can adapt
    with quiet():
        found = peft.PeftModel.from_pretrained(net, tmp_path / "out")
    assert [name for name, _ in found.named_modules() if name.endswith("lora_A.default")] == [
        "base_model.model.top.0.lora_A.default"
    ]


def test_the_head_of_gpt_neox_loads_and_comes_back(tmp_path):
    sizes = {"hidden_size": 16, "num_attention_heads": 2, "num_hidden_layers": 1}
    settings = GPTNeoXConfig(vocab_size=40, intermediate_size=24, **sizes)
    for name, seed in (("base", 1), ("tuned", 2)):
        model = GPTNeoXForCausalLM(settings)
        randomise(model, seed)
        model.save_pretrained(tmp_path / name)
    base, out = tmp_path / "base", tmp_path / "out"
    assert "embed_out.weight" in tensors(base)
    extracted(base, tmp_path / "tuned", out, rank=48)
    assert "base_model.model.lm_head.weight" in tensors(out)
    with quiet():
        adapted = peft.PeftModel.from_pretrained(GPTNeoXForCausalLM.from_pretrained(base), out)
    wanted = answers(GPTNeoXForCausalLM.from_pretrained(tmp_path / "tuned").eval())
    torch.testing.assert_close(answers(adapted.eval()), wanted, rtol=1e-4, atol=1e-4)
    merge({"merge_method": "passthrough", "models": [{"model": f"{base}+{out}"}]}, tmp_path / "in")
    found, wanted = tensors(tmp_path / "in"), tensors(tmp_path / "tuned")
    assert found.keys() == wanted.keys()
    assert torch.equal(found["embed_out.weight"], wanted["embed_out.weight"])


def test_a_head_of_its_own_may_leave_a_tied_base_and_join_an_untied_one(tmp_path):
    untied = {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}
    untied["tie_word_embeddings"] = False
    tied = {**untied, "tie_word_embeddings": True}
    embedding, head = torch.ones(6, 4), torch.full((6, 4), 3.0)
    one = {"model.embed_tokens.weight": embedding, "model.layers.0.up.weight": torch.eye(4)}
    two = {**one, "lm_head.weight": head}
    a = handmade(tmp_path / "tied", tied, **one)
    b = handmade(tmp_path / "untied", untied, **two)
    extracted(a, b, tmp_path / "leaves", rank=1)
    stored = tensors(tmp_path / "leaves")
    assert list(stored) == ["base_model.model.lm_head.weight"]
    assert torch.equal(stored["base_model.model.lm_head.weight"], head)
    extracted(b, a, tmp_path / "joins", rank=1)
    stored = tensors(tmp_path / "joins")
    assert torch.equal(stored["base_model.model.lm_head.weight"], embedding)


def test_the_config_names_the_base_and_no_place_of_this_machine(tmp_path, bases, monkeypatch):
    tuned = edited(bases(), tmp_path / "tuned", {QUERY: low_rank(2)})
    extracted(bases(), tuned, tmp_path / "out", rank=2)
    assert config_of(tmp_path / "out")["base_model_name_or_path"] == bases().name
    monkeypatch.chdir(tmp_path)
    shutil.copytree(bases(), tmp_path / "org/base")
    extracted("org/base", "tuned", "named", rank=2)
    config = config_of(tmp_path / "named")
    assert config["base_model_name_or_path"] == "org/base"
    assert config["task_type"] == "CAUSAL_LM"
    assert str(tmp_path) not in json.dumps(config)


def test_targets_are_short_where_they_mean_all_modules(tmp_path, bases):
    every = {name: low_rank(2, i) for i, name in enumerate(matrices(bases()))}
    tuned = edited(bases(), tmp_path / "all", every)
    extracted(bases(), tuned, tmp_path / "out", rank=2)
    assert "q_proj" in config_of(tmp_path / "out")["target_modules"]
    one = edited(bases(), tmp_path / "one", {QUERY: low_rank(2)})
    extracted(bases(), one, tmp_path / "single", rank=2)
    assert config_of(tmp_path / "single")["target_modules"] == [QUERY[: -len(".weight")]]


def test_the_tokenizer_of_the_model_goes_with_it(tmp_path, bases):
    tuned = edited(bases(), tmp_path / "tuned", {QUERY: low_rank(2)})
    (tuned / "chat_template.jinja").write_text("{{ messages }}")
    (tuned / "training_log.txt").write_text("secret")
    extracted(bases(), tuned, tmp_path / "out", rank=2)
    assert (tmp_path / "out/chat_template.jinja").read_text() == "{{ messages }}"
    assert not (tmp_path / "out/training_log.txt").exists()


# stages, adapters, other forms -------------------------------------------------------------------


@pytest.fixture
def adapter(tmp_path, bases):
    """Return an adapter of rank 3 of the base."""
    tuned = edited(bases(), tmp_path / "first", {name: low_rank(3) for name in matrices(bases())})
    extracted(bases(), tuned, tmp_path / "adapter", rank=3)
    return tmp_path / "adapter"


def test_a_base_with_an_adapter_gives_the_adapter_back(tmp_path, bases, adapter):
    done = extracted(bases(), f"{bases()}+{adapter}", tmp_path / "out", rank=3)
    found, wanted = oracle.changes(tmp_path / "out"), oracle.changes(adapter)
    assert found.keys() == wanted.keys()
    for name, change in wanted.items():
        assert float((found[name] - change).norm()) <= 1e-6 * float(change.norm())
    fates = {f.what for f in done.plan.fates if "lora_A" in f.tensor}
    assert fates == {"merged"}


def test_a_base_with_an_adapter_may_be_the_base(tmp_path, bases, adapter):
    tuned = edited(bases(), tmp_path / "tuned", {NORM: more})
    done = extracted(f"{bases()}+{adapter}", tuned, tmp_path / "out", rank=3)
    found, wanted = oracle.changes(tmp_path / "out"), oracle.changes(adapter)
    for name, change in wanted.items():
        assert float((found[name] + change).norm()) <= 1e-5 * float(change.norm())
    assert any("the adapter belongs on what" in note for note in done.plan.notes)


def test_a_stage_may_be_the_model(tmp_path, bases):
    tuned = edited(bases(), tmp_path / "tuned", {QUERY: diagonal(4.0), NORM: more})
    half = {"model": "half"}
    documents = [
        {
            "name": "half",
            "merge_method": "linear",
            "models": [
                {"model": str(tuned), "parameters": {"weight": 0.5}},
                {"model": str(bases()), "parameters": {"weight": 0.5}},
            ],
        },
        {
            "merge_method": "lora_extract",
            "base_model": str(bases()),
            "models": [half],
            "parameters": {"rank": 1},
        },
    ]
    done = merge(documents, tmp_path / "out")
    change = oracle.changes(tmp_path / "out")[QUERY]
    assert float(change[0, 0]) == pytest.approx(2.0, rel=1e-5)
    norm = (tensors(tuned)[NORM] + tensors(bases())[NORM]) / 2
    stored = tensors(tmp_path / "out")["base_model.model.model.norm.weight"]
    torch.testing.assert_close(stored, norm)
    what = {f.tensor: f.what for f in done.plan.fates if f.model == "input-1"}
    assert what[QUERY] == "merged"
    assert len(what) == len(tensors(tuned))


def refusal(tmp_path, request):
    with pytest.raises(MergeKitError) as caught:
        merge(request, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    return str(caught.value)


def test_what_cannot_be_extracted_is_refused_with_a_reason(tmp_path, bases, adapter):
    base = bases()
    narrow = edited(base, tmp_path / "narrow", {QUERY: lambda t: t[:8]})
    assert "[16, 16]" in refusal(tmp_path, recipe(base, narrow, rank=2))
    short = shutil.copytree(base, tmp_path / "short")
    held = tensors(base)
    del held[QUERY]
    save_file(held, short / "model.safetensors", metadata={"format": "pt"})
    assert f"lacks 1 tensors that input-2:{base.name} has: {QUERY}" in refusal(
        tmp_path, recipe(base, short, rank=2)
    )
    both = refusal(tmp_path, recipe(base, narrow, rank=0))
    assert "expected at least 1" in both  # all problems in one list
    assert "[8, 16]" in both
    assert "expected one" in refusal(tmp_path, recipe(base, narrow))
    assert "expected one of them" in refusal(tmp_path, recipe(base, narrow, rank=2, energy=0.5))
    assert "expected a number in (0, 1]" in refusal(tmp_path, recipe(base, narrow, energy=1.5))
    assert "save or refuse or drop" in refusal(tmp_path, recipe(base, narrow, rank=1, rest="keep"))
    assert "its own base" in refusal(tmp_path, recipe(base, base, rank=2))
    without = {k: v for k, v in recipe(base, narrow, rank=2).items() if k != "base_model"}
    assert "needs a base_model" in refusal(tmp_path, without)
    two = recipe(base, narrow, rank=2)
    two["models"] = [*two["models"], {"model": str(short)}]
    assert "takes 1 model beside the base, found 2" in refusal(tmp_path, two)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("uses", {"one": [1]}),
        ("tokenizer_source", "base"),
        ("tensors", [{"match": "*", "drop": True}]),
    ],
)
def test_keys_of_other_stages_are_refused(tmp_path, bases, key, value):
    tuned = edited(bases(), tmp_path / "tuned", {QUERY: low_rank(2)})
    found = refusal(tmp_path, {**recipe(bases(), tuned, rank=2), key: value})
    assert key in found


def test_a_pipeline_is_extracted_folder_by_folder(tmp_path, bases):
    for name in ("base", "tuned"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "model_index.json").write_text('{"unet": ["diffusers", "UNet"]}')
        shutil.copytree(bases("net"), tmp_path / name / "unet")
    problem = refusal(tmp_path, recipe(tmp_path / "base", tmp_path / "tuned", rank=2))
    assert "has components: unet" in problem
    held = tensors(tmp_path / "tuned/unet")
    held["wide.weight"] = low_rank(2)(held["wide.weight"])
    save_file(held, tmp_path / "tuned/unet/model.safetensors")
    extracted(tmp_path / "base/unet", tmp_path / "tuned/unet", tmp_path / "out", rank=2)
    assert same_answers("net", bases("net"), tmp_path / "out", tmp_path / "tuned/unet")


def test_of_a_model_with_more_programs_the_one_at_the_top_is_extracted(tmp_path, bases):
    for name in ("base", "tuned", "other"):
        changes = {} if name == "base" else {"wide.weight": low_rank(2)}
        edited(bases("net"), tmp_path / name, changes)
        dense = {"linear.weight": torch.full((4, 6), 2.0 if name == "other" else 1.0)}
        handmade(tmp_path / name / "2_Dense", {}, **dense)
    base, tuned = tmp_path / "base", tmp_path / "tuned"
    done = extracted(base, tuned, tmp_path / "out", rank=2)
    assert same_answers("net", bases("net"), tmp_path / "out", tuned)
    dense = "2_Dense/linear.weight"
    assert dropped(done, "input-1")[dense] == "not changed"
    found = refusal(tmp_path / "no", recipe(base, tmp_path / "other", rank=2))
    assert f"{dense} is changed" in found
    assert "of another folder" in found
    done = extracted(base, tmp_path / "other", tmp_path / "less", rank=2, rest="drop")
    assert dropped(done, "input-1")[dense] == "changed, and left out (rest: drop)"


def test_a_quantised_model_is_refused(tmp_path, bases):
    tuned = edited(bases(), tmp_path / "tuned", {QUERY: low_rank(2)})
    config = json.loads((tuned / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "fp8"}
    (tuned / "config.json").write_text(json.dumps(config))
    assert "quantised with fp8" in refusal(tmp_path, recipe(bases(), tuned, rank=2))


def test_numbers_that_are_not_finite_stop_it(tmp_path, bases):
    tuned = edited(bases(), tmp_path / "tuned", {QUERY: lambda t: t * torch.inf})
    for parameters in ({"rank": 2}, {"energy": 0.5}):
        assert "q_proj" in refusal(tmp_path, recipe(bases(), tuned, **parameters))


# experts -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["mixtral", "qwen3_moe"])
def test_experts_that_files_store_apart_get_one_rank(tmp_path, bases, kind):
    base = bases(kind)
    make_base(kind, tmp_path / "tuned", torch.float32, seed=2)
    done = extracted(base, tmp_path / "tuned", tmp_path / "out", energy=0.9)
    ranks = {one.rank for one in done.plan.ranks if ".experts." in one.key}
    assert len(ranks) == 1
    assert len({one.rank for one in done.plan.ranks}) > 1
    merged = {"merge_method": "passthrough", "models": [{"model": f"{base}+{tmp_path / 'out'}"}]}
    merge(merged, tmp_path / "whole")
    assert same_answers(kind, base, tmp_path / "out", tmp_path / "whole")


def test_an_expert_that_is_not_changed_stays_beside_one_that_is(tmp_path, bases):
    base = bases("qwen3_moe")
    name = "model.layers.0.mlp.experts.1.up_proj.weight"
    tuned = edited(base, tmp_path / "tuned", {name: low_rank(2)})
    extracted(base, tuned, tmp_path / "out", rank=2)
    assert same_answers("qwen3_moe", base, tmp_path / "out", tuned)


# the demo ----------------------------------------------------------------------------------------


def test_a_demo_expert_comes_closer_with_every_rank(tmp_path):
    demo = ROOT / "recipes/demo"
    missed, size = [], []
    for rank in (4, 16, 64):
        out = tmp_path / f"rank-{rank}"
        done = extracted(demo / "base", demo / "sort", out, rank=rank, dtype="float32")
        facts = done.report.facts.values()
        residual = sum(one["residual"] ** 2 for one in facts) / sum(
            one["norm"] ** 2 for one in facts
        )
        missed.append(residual**0.5)
        size.append((out / "adapter_model.safetensors").stat().st_size)
    assert missed == sorted(missed, reverse=True)
    assert size == sorted(size)
    assert missed[0] > 0.5  # a full fine-tune is of no low rank
    assert missed[-1] < 0.15
