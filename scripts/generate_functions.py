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

from merge_kit.api.lazy_adapter import LazyAdapter
from merge_kit.api.lazy_merge import LazyMerge
from merge_kit.api.nodes import Operand

__all__ = [
"""


def function(name: str) -> str:
    """Return the declaration of one function."""
    lines, found = [f"def {name}("], signature(registry.find(name))
    for argument in found.parameters.values():
        if argument.kind is Parameter.KEYWORD_ONLY and "    *," not in lines:
            lines.append("    *,")
        default = "" if argument.default is Parameter.empty else f" = {argument.default!r}"
        lines.append(f"    {argument.name}: {argument.annotation}{default},".replace("'", '"'))
    return "\n".join([*lines, f") -> {found.return_annotation}: ..."])


def document() -> str:
    """Return the whole text, of the methods that are in this package."""
    own = [n for n in registry.names() if registry.find(n).__module__.startswith("merge_kit.")]
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
