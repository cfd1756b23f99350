#!/usr/bin/env python3
"""Check that merge_kit imports downward only, and other packages only where they belong.

    python scripts/check_layers.py [PACKAGE]

Every import counts: on top, inside functions, under TYPE_CHECKING, and `import_module` of a name
in the text. Under TYPE_CHECKING, other packages are free, since nothing is loaded then.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

PACKAGE = "merge_kit"
INIT, MAIN = "__init__", "__main__"
LAYERS: tuple[tuple[str, ...], ...] = (
    ("errors",),
    ("core",),
    ("io", "methods", "architecture"),
    ("recipe",),
    ("plan",),
    ("engine", "publish"),
    ("api",),
    (INIT,),
    ("cli",),
    (MAIN,),
)
LEVEL = {layer: level for level, names in enumerate(LAYERS) for layer in names}
NOT_BELOW = {"engine": {"recipe"}, "publish": {"recipe"}}
"""Lower layers that a layer leaves alone all the same."""

ANYWHERE = {"numpy", "pydantic", "safetensors", "xxhash"}
SOMEWHERE: Mapping[str, set[str]] = {
    "torch": {"io", "methods", "engine"},
    "yaml": {"recipe", "publish"},
    "click": {"cli"},
    "tqdm": {"cli"},
    "huggingface_hub": {"io", "publish"},
    "scipy": {"engine"},
    "transformers": {"engine"},
}
NOWHERE = {"peft", "accelerate"}
TYPING_ONLY = ("TYPE_CHECKING", "typing.TYPE_CHECKING")


@dataclass(frozen=True, slots=True)
class Import:
    """One imported module; `typing_only` if only a type checker sees it."""

    line: int
    module: str
    typing_only: bool


def imports(tree: ast.AST, package: set[str], typing_only: bool = False) -> Iterator[Import]:
    """Yield what a module imports, wherever in the module.

    Args:
        package: Names below the package's root, to tell `from merge_kit import errors`, a module,
            from a name that the root itself offers.
    """
    for node in ast.iter_child_nodes(tree):
        for module in _modules(node, package):
            yield Import(node.lineno, module, typing_only)  # type: ignore[attr-defined]
        if isinstance(node, ast.If) and ast.unparse(node.test) in TYPING_ONLY:
            for child in node.body:
                yield from imports(ast.Module([child], []), package, typing_only=True)
            yield from imports(ast.Module(node.orelse, []), package, typing_only)
        else:
            yield from imports(node, package, typing_only)


def _modules(node: ast.AST, package: set[str]) -> list[str]:
    match node:
        case ast.Import(names=names):
            return [alias.name for alias in names]
        case ast.ImportFrom(module=module, level=level) if level:
            return ["." * level + (module or "")]
        case ast.ImportFrom(module=module, names=names) if module == PACKAGE:
            found = {a.name if a.name in package else INIT for a in names}
            return [f"{PACKAGE}.{name}" for name in sorted(found)]
        case ast.ImportFrom(module=str(module)):
            return [module]
        case ast.Call(func=func, args=[ast.Constant(value=str(name)), *_]):
            called = ast.unparse(func).rpartition(".")[2]
            return [name] if called in ("import_module", "__import__") else []
    return []


def complaint(layer: str, found: Import) -> str | None:
    """Return what is wrong with an import in a module of this layer, or None."""
    top, _, rest = found.module.partition(".")
    if not top:
        return "relative import, expected an absolute one"
    if top == PACKAGE:
        return _inside(layer, rest.partition(".")[0] or INIT)
    if top in sys.stdlib_module_names or top in ANYWHERE:
        return None
    if top in NOWHERE:
        return f"{layer} imports {top}, which belongs in tests only"
    if found.typing_only:
        return None
    if top not in SOMEWHERE:
        return f"{layer} imports {top}, which is no dependency of the package"
    if layer not in SOMEWHERE[top]:
        return f"{layer} imports {top}, which belongs in {', '.join(sorted(SOMEWHERE[top]))}"
    return None


def _inside(layer: str, other: str) -> str | None:
    if other not in LEVEL:
        return f"{layer} imports {other}, which is in no layer"
    apart = other == layer or LEVEL[other] < LEVEL[layer]
    if apart and other not in NOT_BELOW.get(layer, set()):
        return None
    return f"layer {layer} imports layer {other}"


def check(root: Path) -> list[str]:
    """Return `file:line: problem` for every import of the package at `root` that breaks a rule."""
    problems = []
    package = {path.stem for path in root.iterdir() if path.is_dir() or path.suffix == ".py"}
    for path in sorted(root.rglob("*.py")):
        layer = path.relative_to(root).parts[0].removesuffix(".py")
        shown = path.relative_to(root.parent).as_posix()
        if layer not in LEVEL:
            problems.append(f"{shown}:1: {layer} is in no layer")
            continue
        tree = ast.parse(path.read_text(encoding="utf-8"), str(path))
        for found in imports(tree, package):
            problem = complaint(layer, found)
            if problem:
                problems.append(f"{shown}:{found.line}: {problem}")
    return problems


def main(arguments: list[str]) -> int:
    """Print the problems and return 1 if there are any."""
    root = Path(arguments[0]) if arguments else Path(__file__).parent.parent / PACKAGE
    problems = check(root)
    for problem in problems:
        print(problem)
    if not problems:
        print(f"{root.name}: all imports point downward")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
