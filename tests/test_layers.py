from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent.parent / "scripts" / "check_layers.py"


def check(package: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(SCRIPT), str(package)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


def package_with(folder: Path, module: str, text: str) -> Path:
    """Write a package of empty layers, and one module with this text."""
    root = folder / "merge_kit"
    for layer in ("core", "io", "methods", "recipe", "plan", "engine", "publish", "cli"):
        (root / layer).mkdir(parents=True)
    for name in ("__init__", "errors", "api"):
        (root / f"{name}.py").touch()
    (root / f"{module}.py").write_text(text)
    return root


def test_the_package_keeps_its_layers():
    result = check(SCRIPT.parent.parent / "merge_kit")
    assert result.returncode == 0, result.stdout


@pytest.mark.parametrize(
    ("module", "text", "problem"),
    [
        ("core/a", "import merge_kit.plan.cost", "a.py:1: layer core imports layer plan"),
        ("io/a", "from merge_kit import methods", "a.py:1: layer io imports layer methods"),
        ("engine/a", "from merge_kit.recipe import values", "layer engine imports layer recipe"),
        ("publish/a", "from merge_kit.engine.report import Report", "imports layer engine"),
        ("plan/a", "from merge_kit import merge", "layer plan imports layer __init__"),
        ("plan/a", "def f():\n    import merge_kit.engine", "a.py:2: layer plan imports"),
        ("plan/a", "async def f(x):\n  if x:\n    import torch", "a.py:3: plan imports torch"),
        ("plan/a", "import importlib\nimportlib.import_module('torch')", "a.py:2: plan imports"),
        ("plan/a", "x = 1 if __import__('torch') else 2", "plan imports torch"),
        (
            "io/a",
            "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import merge_kit.api",
            "a.py:3: layer io imports layer api",
        ),
        (
            "plan/a",
            "from typing import TYPE_CHECKING\nif not TYPE_CHECKING:\n    import torch",
            "a.py:3: plan imports torch",
        ),
        ("io/a", "from . import header", "a.py:1: relative import"),
        ("engine/a", "import peft.tuners", "peft, which belongs in tests only"),
        ("plan/a", "import transformers.models", "transformers, which belongs in engine"),
        ("engine/a", "import yaml", "engine imports yaml, which belongs in publish, recipe"),
        ("errors", "import click", "errors.py:1: errors imports click, which belongs in cli"),
        ("core/a", "import psutil", "core imports psutil, which is no dependency"),
        ("helpers", "", "helpers.py:1: helpers is in no layer"),
    ],
)
def test_a_broken_rule_is_reported_with_its_line(tmp_path, module, text, problem):
    result = check(package_with(tmp_path, module, text))
    assert result.returncode == 1
    assert result.stdout.count("\n") == 1
    assert problem in result.stdout


@pytest.mark.parametrize(
    ("module", "text"),
    [
        ("core/a", "import json, numpy\nfrom merge_kit.errors import UsageError"),
        ("io/a", "import torch\nfrom merge_kit import core, errors"),
        ("plan/a", "import typing\nif typing.TYPE_CHECKING:\n    import torch"),
        ("publish/a", "import yaml, huggingface_hub\nimport merge_kit.plan.values"),
        ("__init__", "from merge_kit.api import merge"),
        ("cli/a", "import click\nfrom merge_kit import merge\nimport merge_kit"),
        ("__main__", "from merge_kit.cli import main"),
    ],
)
def test_what_the_table_allows_passes(tmp_path, module, text):
    result = check(package_with(tmp_path, module, text))
    assert result.returncode == 0, result.stdout
