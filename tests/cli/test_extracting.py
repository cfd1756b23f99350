"""`mergekit extract`: one line for a recipe, and what is missed in a table or as JSON."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from merge_kit.cli.entry import main

DIAGONALS = {
    "model.layers.0.up.weight": (3.0, 4.0),  # of rank 1: 3 of 5 missed
    "model.layers.0.down.weight": (1.0,),
    "model.layers.1.up.weight": (5.0, 12.0),  # 5 of 13
    "model.extra.weight": (2.0, 2.0),  # one of two equal values: 1 / sqrt(2)
}


def diagonal(values):
    found = torch.zeros(4, 6)
    found.diagonal()[: len(values)] = torch.tensor(values)
    return found


@pytest.fixture
def place(tmp_path, monkeypatch):
    """Return a working directory with a base of zeros and a model that differs by diagonals."""
    monkeypatch.chdir(tmp_path)
    norm = "model.norm.weight"
    for folder, grown in (("base", 0.0), ("tuned", 1.0)):
        (tmp_path / folder).mkdir()
        held = {name: grown * diagonal(values) for name, values in DIAGONALS.items()}
        held[norm] = torch.full((6,), 1 + grown)
        save_file(held, tmp_path / folder / "model.safetensors")
    return tmp_path


@pytest.fixture
def do(place, capsys):
    """Run a command that must end with a code; return what it printed."""

    def run(*words, code=0):
        capsys.readouterr()
        found = main(words)
        out, err = capsys.readouterr()
        assert found == code, err
        return out if code == 0 else err

    return run


WORDS = ("extract", "tuned", "--base", "base", "-o", "out")


def test_the_table_lists_modules_by_what_they_miss_then_layers_then_all(do):
    printed = do(*WORDS, "--rank", "1").splitlines()
    start = printed.index("missed  rank  norm   module")
    assert printed[start : start + 14] == [
        "missed  rank  norm   module",
        "70.71%  1     2.828  model.extra",
        "60.00%  1     5      model.layers.0.up",
        "38.46%  1     13     model.layers.1.up",
        "0.00%   1     1      model.layers.0.down",
        "",
        "missed  rank  norm   layer",
        "58.83%  1     5.099  model.layers.0",
        "38.46%  1     13     model.layers.1",
        "70.71%  1     2.828  outside layers",
        "",
        # the length of 3, 5, 2 over that of 5, 1, 13 and the square root of 8
        "43.27% of the change of 4 modules is missed (18.72% of its squares, which energy counts)",
        "",
        "merged 8, copied 1, dropped 1 tensors",
    ]


def test_json_has_every_number_in_one_line(do):
    found = json.loads(do(*WORDS, "--energy", "0.8", "--json"))
    modules = {one["name"]: one for one in found["missed"]["modules"]}
    assert {name: one["rank"] for name, one in modules.items()} == {
        "model.layers.0.up": 2,  # 16 of 25 are 0.64
        "model.layers.0.down": 1,
        "model.layers.1.up": 1,  # 144 of 169 are 0.85
        "model.extra": 2,
    }
    assert modules["model.layers.1.up"]["share"] == pytest.approx(5 / 13, rel=1e-5)
    assert [one["name"] for one in found["missed"]["layers"]] == [
        "model.layers.0",
        "model.layers.1",
        "outside layers",
    ]
    total = found["missed"]["total"]
    assert (total["modules"], total["residual"]) == (4, pytest.approx(5.0, rel=1e-5))


def test_a_recipe_with_the_method_prints_the_same_table(do, place):
    (place / "recipe.yaml").write_text(
        "merge_method: lora_extract\nbase_model: base\nmodels: [{model: tuned}]\n"
        "parameters: {rank: 1}\n"
    )
    printed = do("run", "recipe.yaml", "-o", "out")
    assert (
        "43.27% of the change of 4 modules is missed (18.72% of its squares, which energy counts)"
        in printed
    )
    first = (place / "out/adapter_model.safetensors").read_bytes()
    do(*WORDS, "--rank", "1", "--overwrite")
    assert (place / "out/adapter_model.safetensors").read_bytes() == first


def test_without_factors_there_is_no_table(do, place):
    save_file(
        {name: torch.zeros(4, 6) for name in DIAGONALS} | {"model.norm.weight": torch.zeros(6)},
        place / "tuned/model.safetensors",
    )
    printed = do(*WORDS, "--rank", "1")
    assert "missed" not in printed
    assert "copied 1" in printed


def test_options_reach_the_adapter(do, place):
    do(*WORDS, "--rank", "1", "--rest", "drop", "--dtype", "float16", "--threads", "1")
    found = load_file(place / "out/adapter_model.safetensors")
    assert len(found) == 8
    assert {tensor.dtype for tensor in found.values()} == {torch.float16}
    assert "model.norm.weight" in do(
        *WORDS, "--rank", "1", "--rest", "refuse", "--overwrite", code=3
    )


def test_a_dry_run_shows_upper_bounds_and_writes_nothing(do, place):
    printed = do(*WORDS, "--energy", "0.5", "--dry-run")
    assert "rank at most 4 for 4 modules" in printed
    assert json.loads(do(*WORDS, "--energy", "0.5", "--dry-run", "--json"))["method"]
    assert not (place / "out").exists()


def test_an_output_that_is_there_is_kept(do, place):
    do(*WORDS, "--rank", "1")
    assert "--overwrite" in do(*WORDS, "--rank", "2", code=2)


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        ((), "neither --rank nor --energy given"),
        (("--rank", "2", "--energy", "0.5"), "--rank and --energy given"),
        (("--rank", "0"), "--rank"),
        (("--energy", "0"), "--energy"),
        (("--rank", "1", "--rest", "keep"), "--rest"),
        (("--rank", "1", "--dtype", "float3"), "float3"),
    ],
)
def test_what_makes_no_sense_is_refused(do, place, words, problem):
    assert problem in do(*WORDS, *words, code=2)
    assert not (place / "out").exists()


def test_memory_that_is_too_small_is_refused(do):
    assert "the budget is" in do(*WORDS, "--rank", "1", "--memory", "1MB", code=2)


def test_missing_models_are_errors_of_inputs(do):
    assert "nowhere" in do("extract", "nowhere", "--base", "base", "--rank", "1", "-o", "o", code=3)
