from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from types import SimpleNamespace

from merge_kit.cli import main
from merge_kit.cli.planning import free_bytes


def test_a_plan_is_a_table_of_at_most_80_columns(library, recipe, capsys):
    assert main(["plan", "soup.yaml"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "method       linear, seed 0"
    assert "tensors      merged 0, copied 0, dropped 1 tensors" in lines
    assert max(map(len, lines)) <= 80


def test_layers_and_rules_come_after_the_table(library, recipe, capsys):
    assert main(["plan", "soup.yaml", "--layers", "--rules"]) == 0
    _, layers, rules = capsys.readouterr().out.split("\n\n")
    assert layers == "layers 0 from input-1:a 4"
    assert rules == "no tensors\n"


def test_the_json_plan_is_one_object(library, recipe, capsys):
    assert main(["plan", "soup.yaml", "--json", "--seed", "3"]) == 0
    assert json.loads(capsys.readouterr().out)["bill"]["peak_bytes"] == 600_000_000
    assert library.planned[0][1]["seed"] == 3


def test_free_space_is_that_of_the_disk_where_the_output_would_be(tmp_path, monkeypatch):
    asked = []

    def usage(folder):
        asked.append(folder)
        return SimpleNamespace(free=123)

    monkeypatch.setattr(shutil, "disk_usage", usage)
    monkeypatch.chdir(tmp_path)
    assert free_bytes(Path("not/there/yet")) == 123
    assert [os.fspath(folder) for folder in asked] == [os.fspath(tmp_path)]
