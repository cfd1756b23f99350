"""Adapters on the command line: plan, run, verify, extract, inspect, and what is written."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from merge_kit.cli import main
from tests.adapters.makers import (
    KINDS,
    answers,
    changed,
    load_adapted,
    load_base,
    make_adapter,
    make_base,
    tensors,
)
from tests.oracles import adapters as oracle

ROOT = Path(__file__).resolve().parent.parent.parent
SVD = """\
merge_method: lora_svd
models:
  - {model: one, parameters: {weight: 1}}
  - {model: two, parameters: {weight: -0.5}}
parameters: {energy: 0.9}
"""
EXTRACT = """\
merge_method: lora_extract
base_model: base
models: [{model: tuned}]
parameters: {energy: 0.9}
"""
USES = """\
merge_method: lora_svd
models: [{model: one}, {model: two}]
uses: {plus: [1, 1], minus: [1, -1]}
parameters: {energy: 0.9}
"""


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """Return a folder with a base, two adapters, and what the first makes of the base."""
    folder = tmp_path_factory.mktemp("commands")
    base = make_base("llama", folder / "base", torch.float32)
    one = make_adapter("llama", base, folder / "one", seed=1, **KINDS["both_patterns"].config)
    make_adapter("llama", base, folder / "two", seed=2, **KINDS["plain"].config)
    tuned = changed("llama", base, oracle.changes(one)).to(torch.float32)
    tuned.save_pretrained(folder / "tuned")
    return folder


@pytest.fixture
def place(made, tmp_path, monkeypatch) -> Path:
    """Return an empty working directory beside which the models lie."""
    for name in ("base", "one", "two", "tuned"):
        (tmp_path / name).symlink_to(made / name)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def do(capsys):
    """Run a command that must end with a code, and return what it prints."""

    def run(*words: str, code: int = 0) -> str:
        capsys.readouterr()
        found = main(words)
        out, err = capsys.readouterr()
        assert found == code, err
        assert "Traceback" not in err
        return out if code == 0 else err

    return run


def recipe(place: Path, text: str) -> str:
    (place / "recipe.yaml").write_text(text)
    return "recipe.yaml"


# plan --------------------------------------------------------------------------------------------


def test_a_plan_shows_upper_bounds_of_ranks(place, do):
    text = do("plan", recipe(place, SVD))
    assert "at most" in text
    plan = json.loads(do("plan", "recipe.yaml", "--json"))
    ranks = {rank["key"]: rank for rank in plan["ranks"]}
    assert len(ranks) == 14
    assert all(rank["fitted"] for rank in ranks.values())
    assert ranks["model.layers.1.self_attn.o_proj"]["rank"] == 7 + 4
    assert ranks["model.layers.1.self_attn.q_proj"]["rank"] == 4 + 4


def test_a_plan_shows_ranks_that_are_sure(place, do):
    plan = json.loads(do("plan", recipe(place, SVD.replace("energy: 0.9", "rank: 3")), "--json"))
    assert {(rank["rank"], rank["fitted"]) for rank in plan["ranks"]} == {(3, False)}


@pytest.mark.parametrize(
    "text",
    [
        SVD,
        USES,
        SVD.replace("lora_svd", "lora_ties"),
        "merge_method: passthrough\nmodels: [{model: base+one}]\n",
        EXTRACT,
    ],
)
def test_planning_loads_no_torch(place, text):
    code = (
        "import sys, merge_kit as mk\n"
        f"mk.plan({recipe(place, text)!r})\n"
        "assert not {'torch', 'peft', 'transformers', 'accelerate'} & set(sys.modules)\n"
    )
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        cwd=place,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr


# run and verify ----------------------------------------------------------------------------------


@pytest.mark.parametrize("text", [SVD, USES, SVD.replace("lora_svd", "lora_concat")])
def test_an_output_is_verified_and_a_flipped_bit_is_found(place, do, text):
    text = text if "svd" in text else text.replace("parameters: {energy: 0.9}\n", "")
    do("run", recipe(place, text), "-o", "out")
    do("verify", "out")
    do("verify", "out", "--against", "recipe.yaml")
    do("verify", "out", "--against", "recipe.yaml", "--seed", "7", code=3)
    file = next((place / "out").rglob("adapter_model.safetensors"))
    raw = bytearray(file.read_bytes())
    raw[-1] ^= 1
    file.write_bytes(raw)
    do("verify", "out", code=3)


def test_the_same_run_gives_the_same_bytes_whatever_the_threads(place, do):
    recipe(place, USES)
    for threads in ("1", "2", "5"):
        do("run", "recipe.yaml", "-o", f"out{threads}", "--threads", threads)
    files = sorted(p.relative_to(place / "out1") for p in (place / "out1").rglob("*.*"))
    assert len(files) >= 6
    for file in files:
        if (place / "out1" / file).is_file():
            first = (place / "out1" / file).read_bytes()
            assert (
                first
                == (place / "out2" / file).read_bytes()
                == (place / "out5" / file).read_bytes()
            ), file


def test_no_output_names_a_place_of_this_machine(place, do):
    for text in (SVD, USES, "merge_method: passthrough\nmodels: [{model: base+one}]\n"):
        do("run", recipe(place, text), "-o", "out", "--overwrite")
        for file in (place / "out").rglob("*"):
            if file.is_file():
                raw = file.read_bytes()
                assert str(place).encode() not in raw, file
                assert str(place.resolve()).encode() not in raw, file


def test_a_dry_run_writes_nothing(place, do):
    do("run", recipe(place, SVD), "-o", "out", "--dry-run")
    assert not (place / "out").exists()
    assert not list(place.glob("out*"))


def test_the_manifest_has_ranks_and_residuals_of_every_module(place, do):
    do("run", recipe(place, SVD), "-o", "out")
    manifest = json.loads((place / "out/merge_kit.json").read_text())
    changes = [oracle.changes(place / name) for name in ("one", "two")]
    wanted = oracle.summed(changes, (1.0, -0.5))
    assert manifest["ranks"] == {
        name.removesuffix(".weight"): oracle.rank_for_energy(change, 0.9)
        for name, change in wanted.items()
    }
    for name, change in wanted.items():
        module = name.removesuffix(".weight")
        found = manifest["residuals"][module]
        tail = oracle.tail(change, manifest["ranks"][module])
        assert found["norm"] == pytest.approx(float(change.norm()), rel=1e-5)
        assert found["relative"] == pytest.approx(tail / float(change.norm()), rel=1e-3)


# extract -----------------------------------------------------------------------------------------


def test_extract_makes_the_adapter_of_a_fine_tune(place, do):
    do("extract", "tuned", "--base", "base", "--rank", "7", "-o", "out")
    found = answers(load_adapted("llama", place / "base", place / "out"))
    wanted = answers(load_base("llama", place / "tuned"))
    assert float((found - wanted).abs().max()) <= 1e-3  # the fine-tune is rounded to float32
    for name, change in oracle.changes(place / "one").items():
        miss = oracle.changes(place / "out")[name] - change
        assert float(miss.norm()) <= 1e-5 * float(change.norm())


def test_extract_says_what_each_tensor_and_layer_misses(place, do):
    printed = do("extract", "tuned", "--base", "base", "--energy", "0.9", "-o", "out")
    assert "q_proj" in printed
    wanted = oracle.changes(place / "one")
    ranks = json.loads((place / "out/merge_kit.json").read_text())["ranks"]
    for name, change in wanted.items():
        assert ranks[name.removesuffix(".weight")] == oracle.rank_for_energy(change, 0.9)


@pytest.mark.parametrize(
    "words",
    [
        ("--base", "base"),
        ("--base", "base", "--rank", "2", "--energy", "0.5"),
        ("--base", "base", "--rank", "0"),
        ("--base", "base", "--energy", "1.5"),
        ("--base", "base", "--rank", "2", "--rest", "perhaps"),
        ("--rank", "2"),
    ],
)
def test_extract_refuses_what_cannot_be(place, do, words):
    do("extract", "tuned", *words, "-o", "out", code=2)
    assert not (place / "out").exists()


def test_extract_of_a_model_that_is_its_base_says_so(place, do, capsys):
    code = main(("extract", "base", "--base", "base", "--rank", "2", "-o", "out"))
    _, err = capsys.readouterr()
    assert code in {2, 3}, err
    assert not (place / "out").exists()


# inspect -----------------------------------------------------------------------------------------


def numbers(value) -> list[float]:
    """Return every number in a JSON value."""
    if isinstance(value, dict):
        return [number for one in value.values() for number in numbers(one)]
    if isinstance(value, list):
        return [number for one in value for number in numbers(one)]
    return [value] if isinstance(value, int | float) and not isinstance(value, bool) else []


def test_inspect_shows_the_cosine_of_changes(place, do):
    found = numbers(json.loads(do("inspect", "one", "two", "--tensors", "--json")))
    one, two = (oracle.changes(place / name) for name in ("one", "two"))
    dot = sum(float((one[name] * two[name]).sum()) for name in one)
    squares = [sum(float(c.square().sum()) for c in part.values()) for part in (one, two)]
    cosine = dot / (squares[0] * squares[1]) ** 0.5
    assert min(abs(number - cosine) for number in found) <= 1e-5
    module = "model.layers.1.self_attn.o_proj.weight"
    a, b = one[module], two[module]
    of_module = float((a * b).sum() / (a.norm() * b.norm()))
    assert min(abs(number - of_module) for number in found) <= 1e-5


def test_inspect_of_one_adapter_shows_its_modules(place, do):
    printed = do("inspect", "one")
    assert "q_proj" in printed
    assert json.loads(do("inspect", "one", "--json"))


def test_inspect_of_an_adapter_and_itself_is_a_cosine_of_1(place, do):
    found = numbers(json.loads(do("inspect", "one", "one", "--json")))
    assert any(abs(number - 1) <= 1e-6 for number in found)


def test_base_and_extraction_of_an_adapter_agree(place, do):
    recipe(place, "merge_method: passthrough\nmodels: [{model: base+one}]\n")
    do("run", "recipe.yaml", "-o", "whole")
    for name, tensor in tensors(place / "whole").items():
        other = tensors(place / "tuned")[name]
        assert float((tensor - other).abs().max()) <= 2.0**-20 * float(other.abs().max())
