from __future__ import annotations

import json

import pytest
from handwritten import CONFIG, SHAPES, write_model

from merge_kit.cli import main


@pytest.fixture
def model(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = write_model(tmp_path / "toy")
    (folder / "tokenizer.json").write_text("{}")
    (folder / "optimizer.pt").write_bytes(b"")
    return folder


def rows(out: str) -> dict[str, str]:
    """Return label -> text of a table whose texts fit one line."""
    pairs = (line.split("  ", 1) for line in out.splitlines() if not line.startswith(" "))
    return {label: text.strip() for label, text in pairs}


def test_a_model_is_shown_by_what_its_headers_and_config_say(model, capsys):
    assert main(["inspect", "toy"]) == 0
    found = rows(capsys.readouterr().out)
    assert found["architecture"] == "llama (LlamaForCausalLM)"
    assert found["tensors"] == "4, 24 parameters, 96 B"  # 3*2 + 2 * 4*2 + 2 floats of 4 bytes
    assert found["dtypes"] == "F32 4"
    assert found["weights"] == "1 file: model.safetensors"
    assert found["layers"] == "2 in model.layers, as config.json says"
    assert found["head"] == "tied to model.embed_tokens.weight"
    assert found["vocabulary"] == "3 tokens"
    assert found["side files"] == "2: config.json, tokenizer.json"
    assert found["not copied"] == "optimizer.pt: the state of a training run"


def test_tensors_are_listed_on_demand(model, capsys):
    assert main(["inspect", "toy", "--tensors"]) == 0
    _, listed = capsys.readouterr().out.split("\n\n")
    assert listed.splitlines()[0].split() == ["model.embed_tokens.weight", "F32", "[3,", "2]"]
    assert len(listed.splitlines()) == 4


def test_json_holds_the_same(model, capsys):
    assert main(["inspect", "toy", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["tensor_count"], found["parameters"], found["nbytes"]) == (4, 24, 96)
    assert (found["layers"], found["tied"], found["vocabulary"]) == (2, True, 3)
    assert found["stacks"] == [{"prefix": "model.layers", "layers": [0, 1]}]
    assert "tensors" not in found
    assert main(["inspect", "toy", "--json", "--tensors"]) == 0
    norm = {"name": "model.norm.weight", "dtype": "F32", "shape": [2]}
    assert norm in json.loads(capsys.readouterr().out)["tensors"]


@pytest.mark.parametrize(
    ("tied", "text"),
    [
        (False, "lm_head.weight"),
        (True, "lm_head.weight, stored although config.json ties it to the embedding"),
    ],
)
def test_a_stored_head_is_named_with_what_the_config_says_of_it(tmp_path, capsys, tied, text):
    config = {**CONFIG, "tie_word_embeddings": tied}
    write_model(tmp_path / "toy", shapes={**SHAPES, "lm_head.weight": (3, 2)}, config=config)
    assert main(["inspect", str(tmp_path / "toy"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["head"] == "lm_head.weight"
    assert main(["inspect", str(tmp_path / "toy")]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert f" head {text} vocabulary " in shown


def test_a_single_file_is_a_model_too(model, capsys):
    assert main(["inspect", "toy/model.safetensors"]) == 0
    found = rows(capsys.readouterr().out)
    assert found["layers"] == "2 in model.layers"
    assert "architecture" not in found
    assert found["side files"] == "none"


@pytest.fixture
def other(tmp_path):
    shapes = {**SHAPES, "model.norm.weight": (3,), "lm_head.weight": (3, 2)}
    del shapes["model.embed_tokens.weight"]
    return write_model(tmp_path / "other", shapes=shapes)


def test_two_models_are_compared_by_names_dtypes_and_shapes(model, other, capsys):
    assert main(["inspect", "toy", "other"]) == 0
    assert capsys.readouterr().out == (
        "only in toy: 1 tensor\n"
        "  model.embed_tokens.weight\n"
        "only in other: 1 tensor\n"
        "  lm_head.weight\n"
        "different: 1 tensor\n"
        "  model.norm.weight: F32 [2] and F32 [3]\n"
        "the same name, dtype and shape: 2 tensors\n"
    )


def test_a_comparison_as_json(model, other, capsys):
    assert main(["inspect", "toy", "other", "--json"]) == 0
    first, second = {"dtype": "F32", "shape": [2]}, {"dtype": "F32", "shape": [3]}
    assert json.loads(capsys.readouterr().out) == {
        "only_first": ["model.embed_tokens.weight"],
        "only_second": ["lm_head.weight"],
        "changed": [{"name": "model.norm.weight", "first": first, "second": second}],
        "same": 2,
    }


def test_a_model_that_is_not_there_is_an_input_error(model, capsys):
    assert main(["inspect", "gone"]) == 3
    assert capsys.readouterr().err.startswith("error: gone: ")
