"""The examples of the documents run as they stand."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent


def test_the_example_of_a_method_runs_and_passes_its_test(tmp_path):
    text = (ROOT / "docs" / "add_a_method.md").read_text(encoding="utf-8")
    method, test = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    calls = "\ntest_the_mean_gets_the_mean_length()\n"
    inspected = (
        "from merge_kit.methods import registry\n"
        "print([p.name for p in registry.parameters(registry.find('length_mean'))])\n"
    )
    example = tmp_path / "example.py"
    example.write_text(method + test + calls + inspected, encoding="utf-8")
    # A process of its own: the example must not stay registered.
    done = subprocess.run(
        [sys.executable, "-W", "error", str(example)],
        env={"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "['floor']"
