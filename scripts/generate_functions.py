#!/usr/bin/env python3
"""Write merge_kit/api/methods.pyi: the signatures of the package's methods for type checkers.

    python scripts/generate_functions.py [--check]

With --check nothing is written, and the exit code is 1 if the file is not up to date.
"""

from __future__ import annotations

import sys
from inspect import Parameter
from pathlib import Path

from merge_kit.api.functions import signature
from merge_kit.methods import registry

PATH = Path(__file__).parent.parent / "merge_kit" / "api" / "methods.pyi"
START = """\
# Written by scripts/generate_functions.py.

from collections.abc import Sequence

from merge_kit.api.expressions import Operand
from merge_kit.api.lazy_merge import LazyMerge

__all__ = [
"""


def function(name: str) -> str:
    """Return the declaration of one function."""
    lines = [f"def {name}("]
    for argument in signature(registry.find(name)).parameters.values():
        if argument.name == "base":
            lines.append("    *,")
        default = "" if argument.default is Parameter.empty else f" = {argument.default!r}"
        lines.append(f"    {argument.name}: {argument.annotation}{default},".replace("'", '"'))
    return "\n".join([*lines, ") -> LazyMerge: ..."])


def document() -> str:
    """Return the whole text, of the methods of this package that make models."""
    own = [
        name
        for name in registry.names()
        if registry.find(name).makes == "model"
        and registry.find(name).__module__.startswith("merge_kit.")
    ]
    exported = "".join(f'    "{name}",\n' for name in own)
    return START + exported + "]\n\n" + "\n".join(map(function, own)) + "\n"


def main(arguments: list[str]) -> int:
    """Write or check the file."""
    text = document()
    if "--check" not in arguments:
        PATH.write_text(text, encoding="utf-8")
        return 0
    current = PATH.exists() and PATH.read_text(encoding="utf-8") == text
    if not current:
        print(f"{PATH.name} is not up to date; run scripts/generate_functions.py")
    return 0 if current else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
