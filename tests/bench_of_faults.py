"""A working directory with two small models and a recipe, and runs of the command line in it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import toys

from merge_kit.cli import main

ROOT = Path(__file__).parent.parent
RECIPE = """\
merge_method: linear
models:
  - {model: a, parameters: {weight: 0.5}}
  - {model: b, parameters: {weight: 0.5}}
"""
WEIGHTS = "model.safetensors"


@dataclass(frozen=True, slots=True)
class Done:
    """A command that has ended."""

    code: int
    out: str
    err: str

    def refuses(self, code: int, *parts: str, hint: bool = True) -> None:
        """Check that it ended with a message that names these parts and says what to do."""
        assert self.code == code, self.err
        assert [part for part in parts if part not in self.err] == [], self.err
        assert not hint or "\n  hint: " in self.err or "\n     hint: " in self.err, self.err
        assert "Traceback" not in self.err
        assert "unexpected" not in self.err


class Bench:
    """The folder: models a (all 1) and b (all 3) of two layers, and recipe.yaml, their mean."""

    def __init__(self, folder: Path, capsys) -> None:
        self.folder, self._capsys = folder, capsys
        for name, value in (("a", 1.0), ("b", 3.0)):
            toys.toy(folder / name, value, layers=2)
        self.recipe(RECIPE)
        self._before = self.names()

    def __truediv__(self, name: str) -> Path:
        return self.folder / name

    def recipe(self, text: str) -> None:
        (self.folder / "recipe.yaml").write_text(text)

    def names(self) -> set[str]:
        return {path.name for path in self.folder.iterdir()}

    def known(self, *names: str) -> None:
        """Count what a test has put here as not left behind."""
        self._before |= set(names)

    def left(self) -> set[str]:
        """Return what commands have left."""
        return self.names() - self._before

    def do(self, *words: str) -> Done:
        """Run a command in this process."""
        self._capsys.readouterr()
        code = main(words)
        out, err = self._capsys.readouterr()
        return Done(code, out, err)

    def run(self, *words: str) -> Done:
        return self.do("run", "recipe.yaml", "-o", "out", *words)

    def refused(self, code: int, *parts: str, words: tuple[str, ...] = ()) -> Done:
        """Run the recipe, which must fail with this code and leave nothing."""
        done = self.run(*words)
        done.refuses(code, *parts)
        assert self.left() == set()
        return done

    def merged(self, *words: str) -> dict:
        """Run the recipe, which must succeed, and return the tensors."""
        done = self.run(*words)
        assert done.code == 0, done.err
        return toys.load_file(self / "out" / WEIGHTS)

    def child(self, *words: str, before: Callable[[], None] | None = None, **more) -> Done:
        """Run a command in a process of its own."""
        with self.start(*words, preexec_fn=before, **more) as process:
            out, err = process.communicate(timeout=120)
        return Done(process.returncode, out, err)

    def start(self, *words: str, **more) -> subprocess.Popen:
        """Start a command in a process of its own, its outputs in pipes."""
        return subprocess.Popen(
            [sys.executable, "-m", "merge_kit", *words],
            **{
                "cwd": self.folder,
                "env": {**os.environ, "PYTHONPATH": str(ROOT)},
                "stdout": subprocess.PIPE,
                "stderr": subprocess.PIPE,
                "text": True,
                **more,
            },
        )


def edit_header(file: Path, change: Callable[[dict], dict | bytes]) -> None:
    """Replace a file's header by what `change` makes of it."""
    raw = file.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    made = change(json.loads(raw[8 : 8 + length]))
    text = made if isinstance(made, bytes) else json.dumps(made).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + raw[8 + length :])
