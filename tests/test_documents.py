"""The examples of the documents run as they stand."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file

from tests.api.low_rank import Q, factors, write_adapter
from tests.toys import toy

ROOT = Path(__file__).parent.parent


def blocks(document: str, language: str) -> list[str]:
    """Return the code blocks of one language, in order."""
    text = (ROOT / document).read_text(encoding="utf-8")
    return re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL)


def run(*words: str, folder: Path) -> str:
    """Return what a Python process prints; warnings are errors in it."""
    done = subprocess.run(
        [sys.executable, "-W", "error", *words],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_examples_of_methods_run_and_pass_their_test(tmp_path):
    method, test, plain = blocks("docs/add_a_method.md", "python")
    calls = (
        "\ntest_the_mean_gets_the_mean_length()\n"
        "from merge_kit.methods import registry\n"
        "print([p.name for p in registry.parameters(registry.find('length_mean'))])\n"
    )
    (tmp_path / "example.py").write_text(method + test + plain + calls, encoding="utf-8")
    # A process of its own: the examples must not stay registered.
    assert run("example.py", folder=tmp_path).strip() == "['floor']"


def test_the_recipe_of_the_readme_merges_in_the_shell_and_in_python(tmp_path):
    for name, value in (("base", 1.0), ("code", 2.0), ("math", 4.0)):
        toy(tmp_path / "models" / name, value, dtype=torch.bfloat16)
    for name in ("a", "b"):
        write_adapter(tmp_path / "adapters" / name, factors(1, Q))
    (tmp_path / "soup.yaml").write_text(blocks("README.md", "yaml")[0], encoding="utf-8")
    printed = run("-m", "merge_kit", "run", "soup.yaml", "-o", "merged/shell", folder=tmp_path)
    assert "merged 18, copied 0, dropped 0 tensors" in printed
    (code,) = blocks("README.md", "python")
    same = (
        "from safetensors.torch import load_file\n"
        "folder = load_file('merged/soup/model.safetensors')\n"
        "assert all(tensors[name].equal(folder[name]) for name in folder)\n"
    )
    run("-c", code + same, folder=tmp_path)
    files = [tmp_path / "merged" / n / "model.safetensors" for n in ("shell", "soup", "code")]
    assert files[0].read_bytes() == files[1].read_bytes()
    soup, skill = (load_file(file)["model.norm.weight"] for file in files[1:])
    assert soup.tolist() == torch.full((4,), 0.6 * 2 + 0.4 * 4).bfloat16().tolist()
    assert (
        skill.tolist() == torch.full((4,), 1 + 0.8 * ((2 - 1) + 0.5 * (4 - 1))).bfloat16().tolist()
    )
