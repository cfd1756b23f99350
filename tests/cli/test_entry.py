from __future__ import annotations

import errno
import subprocess
import sys

import click
import pytest

from merge_kit.cli import commands, main
from merge_kit.errors import CheckpointError, InterruptedRun, Problems, RecipeError


@pytest.fixture
def command(monkeypatch):
    """Return a function that makes `mergekit schema` do something else."""

    def install(action):
        monkeypatch.setattr(commands.schema, "callback", action)

    return install


def raising(exc):
    def action():
        raise exc

    return action


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (RecipeError("odd"), 2),
        (CheckpointError("odd"), 3),
        (Problems([CheckpointError("odd"), RecipeError("too")]), 3),
        (InterruptedRun(15), 143),
        (MemoryError(), 4),
        (OSError(errno.ENOSPC, "full"), 4),
    ],
)
def test_errors_end_in_their_exit_code_without_a_traceback(command, capsys, error, code):
    command(raising(error))
    assert main(["schema"]) == code
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("error: ")
    assert "Traceback" not in captured.err


def test_a_defect_shows_its_type_and_asks_for_a_report(command, capsys, monkeypatch):
    monkeypatch.delenv("MERGE_KIT_TRACEBACK", raising=False)
    command(raising(KeyError("gone")))
    assert main(["schema"]) == 1
    assert capsys.readouterr().err == (
        "error: unexpected KeyError: 'gone'\n"
        "  hint: this is a defect: please report it with the output under MERGE_KIT_TRACEBACK=1\n"
    )


def test_a_defect_shows_its_traceback_on_demand(command, capsys, monkeypatch):
    monkeypatch.setenv("MERGE_KIT_TRACEBACK", "1")
    command(raising(KeyError("gone")))
    assert main(["schema"]) == 1
    assert "Traceback (most recent call last)" in capsys.readouterr().err


def test_ctrl_c_outside_a_run_is_quiet(command, capsys):
    command(raising(KeyboardInterrupt()))
    assert main(["schema"]) == 130
    assert capsys.readouterr().err == ""


def test_an_exit_code_of_a_command_is_the_programs(command):
    command(raising(click.exceptions.Exit(3)))
    assert main(["schema"]) == 3


@pytest.mark.parametrize(
    "words", [["bake"], ["run"], ["schema", "--bogus"], ["run", "x.yaml", "--memory", "lots"]]
)
def test_wrong_usage_ends_in_2(capsys, words):
    assert main(words) == 2
    assert "Error: " in capsys.readouterr().err


def test_help_names_every_command_in_working_order(capsys):
    assert main(["--help"]) == 0
    out = capsys.readouterr().out
    names = ["run", "plan", "inspect", "methods", "schema", "verify", "convert"]
    places = [out.index(f"\n  {name} ") for name in names]
    assert places == sorted(places)
    assert max(map(len, out.splitlines())) <= 80


def test_a_closed_standard_output_is_no_error(monkeypatch):
    monkeypatch.setattr(sys, "stdout", None)
    assert main(["methods"]) == 0


def python(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False
    )


@pytest.mark.parametrize("words", [["--help"], ["run", "--help"], ["plan", "-h"], ["--version"]])
def test_help_and_version_load_no_heavy_package(words):
    code = (
        "import sys; from merge_kit.cli import main\n"
        f"assert main({words}) == 0\n"
        "heavy = {'torch', 'numpy', 'pydantic', 'yaml', 'tqdm', 'huggingface_hub'}\n"
        "print('loaded', sorted(heavy & set(sys.modules)))"
    )
    done = python(code)
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith("loaded []\n")


def test_a_reader_that_goes_away_is_no_error():
    code = (
        "import sys; from merge_kit.cli import commands, main\n"
        "commands.schema.callback = lambda: print('line\\n' * 100_000)\n"
        "sys.exit(main(['schema']))"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.readline()
        process.stdout.close()
        assert process.stderr.read() == b""
        assert process.wait(60) == 141


def test_python_dash_m_is_the_same_program():
    done = subprocess.run(
        [sys.executable, "-m", "merge_kit", "bake"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert "Usage: mergekit" in done.stderr
