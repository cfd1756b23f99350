from __future__ import annotations

import io
import json
import os
import signal
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from merge_kit.cli import main
from merge_kit.errors import InterruptedRun, OutputExistsError


def test_a_run_shows_the_plan_first_and_ends_with_the_counts(library, recipe, capsys):
    assert main(["run", "soup.yaml", "-o", "my out"]) == 0
    captured = capsys.readouterr()
    before, after = captured.out.split("\n\n")
    assert "peak memory  600 MB with 2 threads" in before
    assert after == (
        "merged 0, copied 0, dropped 1 tensors\n"
        "1.5 s, 6 MB/s read and written, peak memory 500 MB of 600 MB\n"
        "output: my out\n"
        "verify: mergekit verify 'my out'\n"
    )
    assert captured.err == ""


def test_options_reach_the_library(library, recipe):
    words = ["--overwrite", "--allow-nonfinite", "--sync", "--memory", "1GB", "--threads", "3"]
    words += ["--set", "seed=1", "--set", "dtype=float32", "--seed", "7", "--shard-size", "2MB"]
    assert main(["run", "soup.yaml", *words]) == 0
    planning = {
        "overrides": ("seed=1", "dtype=float32"),
        "seed": 7,
        "shard_size": 2_000_000,
        "threads": 3,
        "memory": 1_000_000_000,
    }
    choices = {"overwrite": True, "allow_nonfinite": True, "sync": True}
    assert library.merged == [(recipe, Path("merged/soup"), planning | choices)]


def test_the_output_is_named_by_the_option_then_the_recipe_then_its_stem(library, recipe):
    main(["run", "soup.yaml"])
    recipe.write_text(recipe.read_text() + "output: here\n")
    main(["run", "soup.yaml"])
    main(["run", "soup.yaml", "--set", "output=there"])
    main(["run", "soup.yaml", "-o", "mine"])
    outputs = [str(output) for _, output, _ in library.merged]
    assert outputs == ["merged/soup", "here", "there", "mine"]


RESULT = {
    "output": "merged/soup",
    "seconds": 1.5,
    "merged": 0,
    "copied": 0,
    "dropped": 1,
    "peak_bytes": 500_000_000,
    "bytes_read": 6_000_000,
    "bytes_written": 3_000_000,
}


def test_json_is_the_result_and_nothing_else(library, recipe, capsys):
    assert main(["run", "soup.yaml", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == RESULT


def test_json_progress_is_a_line_an_event_and_the_result_last(library, recipe, capsys):
    assert main(["run", "soup.yaml", "--json-progress"]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert lines == [
        {"done_bytes": 1_000_000, "total_bytes": 3_000_000, "seconds": 0.5, "tensor": "a.weight"},
        {"done_bytes": 3_000_000, "total_bytes": 3_000_000, "seconds": 1.5, "tensor": "b.weight"},
        RESULT,
    ]


def test_a_terminal_gets_a_bar(library, recipe, monkeypatch, capsys):
    terminal = io.StringIO()
    terminal.isatty = lambda: True
    monkeypatch.setattr(sys, "stderr", terminal)
    assert main(["run", "soup.yaml"]) == 0
    assert "3.00M/3.00M" in terminal.getvalue()
    assert "3.00M" not in capsys.readouterr().out


def test_a_dry_run_merges_nothing(library, recipe, capsys):
    assert main(["run", "soup.yaml", "--dry-run", "-o", "x"]) == 0
    assert capsys.readouterr().out.startswith("method")
    assert main(["run", "soup.yaml", "--dry-run", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["identity"] == "abc"
    assert library.merged == []


def test_nonfinite_values_that_were_allowed_are_warned_of(library, recipe, capsys):
    library.report = replace(library.report, nonfinite={"a": 2, "b": 1}, saturated={"c": 4})
    assert main(["run", "soup.yaml", "--allow-nonfinite", "--json"]) == 0
    captured = capsys.readouterr()
    assert json.loads(captured.out) == RESULT
    assert captured.err == (
        "warning: 3 NaN or infinities in 2 tensors, the first is a\n"
        "warning: 4 values beyond the output dtype in 1 tensor, the first is c\n"
    )


def test_a_resumed_run_says_so(library, recipe, capsys):
    library.report = replace(library.report, resumed=5)
    main(["run", "soup.yaml"])
    assert "went on from an earlier run that had finished 5 steps\n" in capsys.readouterr().out


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_stops_the_run_with_its_own_exit_code(library, recipe, capfd, number, code):
    def interrupt(stop):
        os.kill(os.getpid(), number)
        assert stop.is_set()
        raise InterruptedRun(2)

    library.during = interrupt
    assert main(["run", "soup.yaml"]) == code
    assert capfd.readouterr().err.endswith(
        "error: stopped by a signal\n  hint: run the same command again to go on from here\n"
    )


def test_errors_of_a_run_stay_on_standard_error_with_json(library, recipe, capsys):
    def refuse(stop):
        raise OutputExistsError("is there already", where="x", hint="give --overwrite")

    library.during = refuse
    assert main(["run", "soup.yaml", "--json", "-o", "x"]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err == "error: x: is there already\n  hint: give --overwrite\n"
