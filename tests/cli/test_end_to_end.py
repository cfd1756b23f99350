"""The command line over the real library, on toy models."""

from __future__ import annotations

import fcntl
import json
import signal
import struct
import subprocess
import sys
import termios
import time
from pathlib import Path

import pytest
from handwritten import CONFIG, SHAPES, write_model

from merge_kit.cli import main

ON_PATH = f"sys.path.insert(0, {str(Path(__file__).parents[2])!r})"
"""What a child process runs first: it starts in another folder than the package's."""

RECIPE = """\
merge_method: task_arithmetic
base_model: base
models:
  - {model: a, parameters: {weight: 0.5}}
  - {model: b, parameters: {weight: 0.25}}
"""


@pytest.fixture
def place(tmp_path, monkeypatch) -> Path:
    """Return the working directory: base = 1, a = 2, b = 4, and a recipe of them."""
    monkeypatch.chdir(tmp_path)
    for name, fill in (("base", 1.0), ("a", 2.0), ("b", 4.0)):
        write_model(tmp_path / name, fill)
    (tmp_path / "soup.yaml").write_text(RECIPE)
    return tmp_path


def floats(file: Path) -> set[float]:
    """Return the numbers that a file of float32 tensors holds."""
    raw = file.read_bytes()
    start = 8 + struct.unpack("<Q", raw[:8])[0]
    return {number for (number,) in struct.iter_unpack("<f", raw[start:])}


def test_a_recipe_becomes_a_model_that_verifies(place, capsys):
    assert main(["run", "soup.yaml"]) == 0
    assert "\nmerged 4, copied 0, dropped 0 tensors\n" in capsys.readouterr().out
    merged = 1 + 0.5 * (2 - 1) + 0.25 * (4 - 1)
    assert floats(place / "merged/soup/model.safetensors") == {merged}
    assert main(["verify", "merged/soup", "--against", "soup.yaml"]) == 0
    assert capsys.readouterr().out == "as written: 4 tensors\nrecipe: the same\nintact\n"


def test_a_flipped_bit_is_found(place, capsys):
    assert main(["run", "soup.yaml", "-o", "out", "--json"]) == 0
    file = place / "out/model.safetensors"
    raw = bytearray(file.read_bytes())
    raw[-1] ^= 1
    file.write_bytes(raw)
    (place / "out/config.json").unlink()
    capsys.readouterr()
    assert main(["verify", "out"]) == 3
    broken = capsys.readouterr().out
    assert broken.startswith("as written: 3 tensors\nother bytes: 1 tensor\n  model.")
    assert broken.endswith("files: 1 problem\n  config.json: missing\nnot intact\n")
    assert main(["verify", "out", "--json"]) == 3
    found = json.loads(capsys.readouterr().out)
    assert (found["intact"], found["ok"], len(found["differing"])) == (False, 3, 1)


def test_another_recipe_or_seed_is_a_difference(place, capsys):
    changed = ["--set", "models.0.parameters.weight=2"]
    assert main(["run", "soup.yaml", "-o", "out", "--json", *changed]) == 0
    assert floats(place / "out/model.safetensors") == {3.75}
    capsys.readouterr()
    assert main(["verify", "out", "--against", "soup.yaml"]) == 3
    assert "another recipe" in capsys.readouterr().out
    assert main(["verify", "out", "--against", "soup.yaml", *changed]) == 0
    assert main(["verify", "out", "--against", "soup.yaml", *changed, "--seed", "1"]) == 3
    assert "seed 1, the record has seed 0" in capsys.readouterr().out


def test_all_problems_of_a_recipe_come_in_one_list(place, capsys):
    wrong = RECIPE.replace("base_model", "base_modle").replace("weight: 0.5", "wieght: 1")
    (place / "wrong.yaml").write_text(wrong)
    assert main(["plan", "wrong.yaml"]) == 2
    err = capsys.readouterr().err
    assert "wrong.yaml:2:1: " in err
    assert "did you mean 'base_model'?" in err
    assert "did you mean 'weight'?" in err
    assert "\n  1. " in err


def test_an_output_that_is_there_is_kept_without_overwrite(place, capsys):
    (place / "out").mkdir()
    (place / "out/notes.txt").write_text("mine")
    assert main(["run", "soup.yaml", "-o", "out"]) == 2
    assert "--overwrite" in capsys.readouterr().err
    assert (place / "out/notes.txt").read_text() == "mine"


def test_the_json_plan_is_the_same_text_twice(place, capsys):
    texts = []
    for _ in range(2):
        assert main(["plan", "soup.yaml", "--json"]) == 0
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1]
    plan = json.loads(texts[0])
    assert plan["tensors"] == {"merged": {"task_arithmetic": 4}, "copied": 0, "dropped": 0}
    assert len(plan["steps"]) == 4


def test_slices_show_where_their_layers_come_from(place, capsys):
    slices = "slices:\n- sources: [{model: a, layer_range: [0, 2]}]\n"
    slices += "- sources: [{model: b, layer_range: [1, 2]}]\nmerge_method: passthrough\n"
    (place / "stack.yaml").write_text(slices)
    assert main(["plan", "stack.yaml", "--layers", "--rules"]) == 0
    _, layers, rules = capsys.readouterr().out.split("\n\n")
    assert layers == ("model.layers 0-1 from input-1:a 0-1\nmodel.layers 2 from input-2:b 1")
    assert "model.layers.2.mlp.up_proj.weight: copy input-2:b\n" in rules


@pytest.mark.parametrize(
    "words", [["plan", "soup.yaml", "--layers", "--rules"], ["inspect", "a"], ["inspect", "a", "b"]]
)
def test_plan_and_inspect_load_without_torch(place, words):
    code = (
        f"import sys; {ON_PATH}; from merge_kit.cli import main\n"
        f"assert main({words}) == 0\n"
        "print('torch loaded:', 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith("torch loaded: False\n")


def test_pickled_weights_become_safetensors(place, capsys):
    torch = pytest.importorskip("torch")
    (place / "old").mkdir()
    (place / "old/config.json").write_text(json.dumps(CONFIG))
    tensors = {name: torch.full(shape, 3.0) for name, shape in SHAPES.items()}
    torch.save(tensors, place / "old/pytorch_model.bin")
    assert main(["inspect", "old"]) == 3
    assert main(["convert", "old", "-o", "new"]) == 0
    assert "converted 4 tensors\n" in capsys.readouterr().out
    assert floats(place / "new/model.safetensors") == {3.0}


MANY = {f"model.layers.{i}.weight": (2, 2) for i in range(1500)}


@pytest.fixture
def started(tmp_path):
    """Start a run that cannot end: its progress fills a pipe that nobody reads."""
    for name, fill in (("base", 1.0), ("a", 2.0), ("b", 4.0)):
        write_model(tmp_path / name, fill, MANY, {"model_type": "x", "num_hidden_layers": 1500})
    (tmp_path / "soup.yaml").write_text(RECIPE)
    code = f"import sys; {ON_PATH}; from merge_kit.cli import main; sys.exit(main())"
    words = ["run", "soup.yaml", "-o", "out", "--json-progress"]
    with subprocess.Popen(
        [sys.executable, "-c", code, *words],
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        process.stdout.readline()
        wait_until_full(process.stdout)
        yield process
        process.kill()


def wait_until_full(pipe) -> None:
    """Wait until a pipe that nobody reads takes no more: who writes to it then stands still."""
    held = -1
    while (now := waiting_bytes(pipe)) != held or not now:
        held = now
        time.sleep(0.3)


def waiting_bytes(pipe) -> int:
    return int.from_bytes(fcntl.ioctl(pipe, termios.FIONREAD, bytes(4)), sys.byteorder)


def test_a_signal_ends_a_run_which_then_goes_on_where_it_was(
    started, tmp_path, monkeypatch, capsys
):
    started.send_signal(signal.SIGTERM)
    assert started.stderr.readline() == "\n"  # the handler has run; only now is the pipe read
    out, err = started.communicate(timeout=60)
    assert started.returncode == 143
    assert err.endswith(
        "error: stopped by a signal\n  hint: run the same command again to go on from here\n"
    )
    assert 0 < len(out.splitlines()) < 1499
    assert not (tmp_path / "out").exists()
    monkeypatch.chdir(tmp_path)
    assert main(["run", "soup.yaml", "-o", "out"]) == 0
    assert "went on from an earlier run" in capsys.readouterr().out
    assert floats(tmp_path / "out/model.safetensors") == {2.25}


def test_a_second_signal_does_not_wait(started):
    started.send_signal(signal.SIGINT)
    assert started.stderr.readline() == "\n"
    started.send_signal(signal.SIGTERM)
    assert started.wait(10) == 143
