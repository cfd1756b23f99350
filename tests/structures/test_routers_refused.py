"""What makes no router of prompts is refused, before a run where headers tell, with an action."""

from __future__ import annotations

import json
import socket
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers.normalizers import Replace

from merge_kit.errors import CheckpointError, MergeKitError, MismatchError, PlanError, SolveError
from merge_kit.plan.building import routers_found
from merge_kit.recipe.values import Prompts
from tests.structures import prompted
from tests.structures.prompted import CODE, PROMPTS, SUMS, WEATHER

ROUTERS = ("cheap_embed", "hidden", "hidden_avg")


@pytest.fixture
def base(tmp_path):
    return prompted.save("llama", tmp_path / "base")


def planned_problem(base, router, prompts=PROMPTS, **options):
    """Return what the plan says is wrong."""
    site, _ = prompted.planned(base, router, prompts, **options)
    with pytest.raises(MergeKitError) as caught:
        site.findings.raise_any()
    return caught.value


def found_problem(base, router, prompts=PROMPTS):
    """Return what the run says is wrong, after a plan without a problem."""
    with pytest.raises(MergeKitError) as caught:
        prompted.read(*prompted.planned(base, router, prompts))
    return caught.value


@pytest.mark.parametrize("router", ROUTERS)
def test_an_expert_without_prompts_is_named(router, base):
    error = planned_problem(base, router, (WEATHER, None, Prompts(())))
    assert isinstance(error, PlanError)
    said = f"router {router} needs prompts, and there are none for expert 1 and expert 2"
    assert error.problem == said
    assert "positive_prompts" in error.hint


def test_the_same_prompts_for_all_are_refused_and_for_two_said(base):
    error = planned_problem(base, "hidden", (CODE, CODE, CODE))
    assert "all experts have the same prompts" in error.problem
    site, _ = prompted.planned(base, "hidden", (CODE, WEATHER, CODE))
    assert site.findings.notes == (
        "expert 0 and expert 2 have the same prompts, and so the same router row",
    )


def test_prompts_that_cancel_are_refused(base):
    same = Prompts(("sun", "rain"), ("rain", "sun"))
    error = planned_problem(base, "hidden", (same, WEATHER))
    assert error.problem == "positive and negative prompts of expert 0 are the same"


@pytest.mark.parametrize("router", ROUTERS)
def test_a_difference_of_nothing_is_refused_when_it_is_found(router, base):
    """Two words that the tokenizer does not know are one token."""
    error = found_problem(base, router, (Prompts(("maybe",), ("perhaps",)), WEATHER))
    assert isinstance(error, SolveError)
    assert "prompts of expert 0 give no direction" in error.problem


def test_prompts_are_bounded(base):
    long = Prompts(("sun " * 3_000,))
    assert (
        "has 12,000 bytes, expected at most 8,192"
        in planned_problem(base, "cheap_embed", (long, WEATHER)).problem
    )
    many = Prompts(tuple(f"sun {i}" for i in range(5_000)))
    assert (
        "5,002 prompts, expected at most 4,096"
        in planned_problem(base, "cheap_embed", (many, WEATHER)).problem
    )
    words = Prompts(("if " * 2_500,))
    assert (
        "2,501 tokens, expected at most 2,048"
        in found_problem(base, "hidden", (words, WEATHER)).problem
    )


@pytest.mark.parametrize("router", ROUTERS)
def test_a_base_without_a_tokenizer_is_refused(router, base, tmp_path):
    (base / "tokenizer.json").unlink()
    error = planned_problem(base, router)
    assert isinstance(error, CheckpointError)
    assert error.problem.startswith("prompts for a router without a tokenizer")
    assert error.where == "input-1:base"
    (only,) = base.glob("*.safetensors")
    if router == "cheap_embed":  # the others want a config first
        assert "without a tokenizer" in planned_problem(only, router).problem


def test_a_base_without_a_config_cannot_be_run(base):
    (base / "config.json").unlink()
    with pytest.raises(PlanError, match=r"router hidden runs the base .* no config.json"):
        prompted.planned(base, "hidden")
    rows, _ = prompted.read(*prompted.planned(base, "cheap_embed"))
    assert rows[0].any()


@pytest.mark.parametrize("router", ROUTERS)
def test_what_is_not_installed_is_named(router, base, monkeypatch):
    monkeypatch.setattr(routers_found, "find_spec", lambda name: None)
    error = planned_problem(base, router)
    assert "transformers" in error.problem
    assert error.hint == 'pip install "transformers>=5" sentencepiece protobuf'


def test_an_old_library_is_refused(base, monkeypatch):
    monkeypatch.setattr(routers_found, "version", lambda name: "4.57.1")
    error = planned_problem(base, "hidden")
    assert error.problem == "prompts for a router need transformers 5, and 4.57.1 is installed"


def test_a_model_of_pieces_needs_two_more_libraries(base, monkeypatch):
    (base / "tokenizer.json").rename(base / "tokenizer.model")
    there = {"transformers", "sentencepiece"}
    monkeypatch.setattr(routers_found, "find_spec", lambda name: name in there or None)
    error = planned_problem(base, "cheap_embed")
    assert "protobuf" in error.problem
    assert "tokenizer.model" in error.problem


@pytest.mark.parametrize("text", ["", "{", '{"model": 3}', '{"version": "1.0"}', "\0\1"])
def test_a_broken_tokenizer_is_an_error_of_the_base(text, base, capfd):
    (base / "tokenizer.json").write_text(text)
    error = found_problem(base, "cheap_embed")
    assert isinstance(error, CheckpointError)
    assert error.problem.startswith("transformers cannot read the tokenizer: ")
    assert error.where == "input-1:base"
    assert error.hint
    assert capfd.readouterr() == ("", "")


def test_code_beside_a_model_is_not_run(base, tmp_path):
    code = 'raise SystemExit("run")\n'
    (base / "mine.py").write_text(code)
    settings = json.loads((base / "tokenizer_config.json").read_text())
    settings |= {"tokenizer_class": "Mine", "auto_map": {"AutoTokenizer": ["mine.Mine", None]}}
    (base / "tokenizer_config.json").write_text(json.dumps(settings))
    config = json.loads((base / "config.json").read_text())
    config |= {"model_type": "mine", "auto_map": {"AutoModel": "mine.M", "AutoConfig": "mine.C"}}
    (base / "config.json").write_text(json.dumps(config))
    for router in ("cheap_embed", "hidden"):
        try:
            prompted.read(*prompted.planned(base, router))
        except MergeKitError as error:
            assert error.where == "input-1:base"  # noqa: PT017  (some tokenizers load all the same)


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"model_type": "unheard_of"}, "knows no model_type 'unheard_of'"),
        ({"model_type": None}, "knows no model_type None"),
        ({"hidden_act": "no_such"}, "cannot build the model"),
        ({"num_attention_heads": 0}, "transformers cannot "),
        ({"rope_scaling": {"rope_type": "no_such"}}, "cannot build the model"),
        ({"intermediate_size": 25}, "of layer 0 has shape"),
        ({"attention_bias": True}, "self_attn.k_proj.bias of layer 0 is missing"),
        ({"model_type": "gpt2"}, ""),
    ],
)
def test_a_config_that_makes_another_model_is_refused(changes, problem, base, capfd):
    config = json.loads((base / "config.json").read_text()) | changes
    (base / "config.json").write_text(json.dumps(config))
    error = found_problem(base, "hidden")
    assert isinstance(error, CheckpointError)
    assert problem in error.problem
    assert error.where == "input-1:base"
    assert error.hint
    assert capfd.readouterr() == ("", "")


def test_a_tensor_that_the_model_has_no_place_for_is_refused(base):
    (path,) = base.glob("*.safetensors")
    tensors = load_file(path)
    tensors["model.layers.2.mlp.extra.weight"] = torch.ones(3)
    tensors["model.layers.1.self_attn.rotary_emb.inv_freq"] = torch.ones(3)  # of old files: ignored
    save_file(tensors, path)
    error = found_problem(base, "hidden")
    assert isinstance(error, MismatchError)
    assert error.problem.startswith("mlp.extra.weight of layer 2 is not part of the model")


def test_tokens_without_an_embedding_are_refused(base):
    (path,) = base.glob("*.safetensors")
    tensors = load_file(path)
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        tensors[name] = tensors[name][:10].clone()
    save_file(tensors, path)
    error = found_problem(base, "cheap_embed")
    assert isinstance(error, MismatchError | CheckpointError)
    assert "and the embedding has 10 rows" in error.problem


def test_values_that_are_not_finite_are_named(base):
    (path,) = base.glob("*.safetensors")
    tensors = load_file(path)
    tensors["model.layers.1.mlp.up_proj.weight"][0, 0] = torch.nan
    save_file(tensors, path)
    error = found_problem(base, "hidden")
    assert error.problem == "the prompts of expert 0 give values that are not finite in layer 2"


def test_a_text_that_grows_into_many_tokens_is_refused(base):
    """The plan's memory goes by bytes."""
    prompted.tokenizer_of(Replace("x", "sun " * 30)).save_pretrained(base)
    error = found_problem(base, "cheap_embed", (Prompts(("x",)), WEATHER))
    assert isinstance(error, PlanError)
    assert error.problem == "a prompt of expert 0 has more tokens than bytes: 'x'"


def test_a_text_of_no_tokens_is_refused(base):
    settings = json.loads((base / "tokenizer_config.json").read_text())
    settings["bos_token"] = None
    (base / "tokenizer_config.json").write_text(json.dumps(settings))
    error = found_problem(base, "cheap_embed", (Prompts(("  ",)), WEATHER))
    assert error.problem == "a prompt of expert 0 has no tokens: '  '"


@pytest.mark.parametrize("router", ROUTERS)
def test_nothing_is_asked_of_a_network(router, base, monkeypatch):
    def refuse(*_):
        raise AssertionError("a connection was tried")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    rows, _ = prompted.read(*prompted.planned(base, router, (WEATHER, SUMS)))
    assert all(row.any() for row in rows.values())


PLANNING = """
import sys
from merge_kit.plan.build import build_plan
from merge_kit.recipe.parse import recipe_from_mapping
models = [{"model": sys.argv[1], "positive_prompts": [word]} for word in ("sun", "sum")]
made = build_plan(recipe_from_mapping({
    "merge_method": "sparse_upcycle", "base_model": sys.argv[1], "models": models,
    "parameters": {"router": "hidden"},
}))
assert made.artefacts
assert not {"torch", "transformers", "tokenizers"} & set(sys.modules)
"""


def test_a_plan_imports_neither_torch_nor_transformers(base):
    done = subprocess.run(
        [sys.executable, "-c", PLANNING, str(base)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
