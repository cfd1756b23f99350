"""Text, files and mappings -> `Recipe`."""

from __future__ import annotations

from codecs import BOM_UTF8
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from merge_kit.core.sizes import parse_size
from merge_kit.errors import RecipeError, UsageError
from merge_kit.recipe.document import Document, read_document
from merge_kit.recipe.findings import Findings
from merge_kit.recipe.nodes import MAX_WHOLE, Node, from_python, to_yaml
from merge_kit.recipe.overrides import apply_overrides
from merge_kit.recipe.stages import order
from merge_kit.recipe.values import Recipe
from merge_kit.recipe.yaml_text import LIMIT_BYTES, place, read_documents, too_large

DEFAULT_SHARD_BYTES = 5_000_000_000


def parse_recipe(
    text: str,
    *,
    source: str = "<recipe>",
    folder: Path | None = None,
    overrides: Sequence[str] = (),
    seed: int | None = None,
    shard_size: str | int | None = None,
) -> Recipe:
    """Return what a recipe's text says, checked.

    Args:
        text: YAML of one or several documents.
        source: The text's name in messages.
        folder: Where relative paths are looked up first, before the working directory.
        overrides: `key=value` for the last document, applied before it is read.
        seed: Wins over the recipe's.
        shard_size: Wins over the recipe's, for example "2GiB".

    Raises:
        RecipeError: If the text is wrong (several problems: Problems).
        UsageError: If an override, the seed or the shard size is wrong.
    """
    findings = Findings()
    nodes = read_documents(text, source, findings)
    recipe = _recipe(nodes, findings, (source, folder, text), overrides)
    return _with_arguments(recipe, seed, shard_size)


def load_recipe(
    path: Path,
    *,
    overrides: Sequence[str] = (),
    seed: int | None = None,
    shard_size: str | int | None = None,
) -> Recipe:
    """Return the recipe of a file; relative paths in it are looked up beside it first.

    Raises:
        RecipeError: If it is no UTF-8, above 1 MB, or wrong as in `parse_recipe`.
        UsageError: If there is no such file, or it cannot be read.
    """
    path = Path(path)
    return parse_recipe(
        _text_of(path),
        source=str(path),
        folder=path.parent,
        overrides=overrides,
        seed=seed,
        shard_size=shard_size,
    )


def recipe_from_mapping(
    mapping: Mapping[str, object],
    *,
    folder: Path | None = None,
    overrides: Sequence[str] = (),
    seed: int | None = None,
    shard_size: str | int | None = None,
) -> Recipe:
    """Return the recipe that a Python mapping is; messages name key paths instead of lines.

    Raises:
        RecipeError: As `parse_recipe`.
        UsageError: As `parse_recipe`.
    """
    findings, source = Findings(), "<recipe>"
    node = from_python(mapping, source)
    recipe = _recipe([node], findings, (source, folder, to_yaml([node])), overrides)
    return _with_arguments(recipe, seed, shard_size)


def _text_of(path: Path) -> str:
    try:
        with path.open("rb") as file:
            content = file.read(LIMIT_BYTES + 1)
    except FileNotFoundError as exc:
        hint = "is the path right, seen from the working directory?"
        raise UsageError("there is no such recipe", where=str(path), hint=hint) from exc
    except IsADirectoryError as exc:
        hint = "name the recipe's file in it"
        raise UsageError("this is a folder, expected a recipe", where=str(path), hint=hint) from exc
    except (OSError, ValueError) as exc:
        raise UsageError(f"cannot read the recipe: {exc}", where=str(path)) from exc
    if len(content) > LIMIT_BYTES:
        raise too_large(str(path))
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as exc:
        before = content.removeprefix(BOM_UTF8)[: exc.start].decode()
        where = str(place(before, len(before), str(path)))
        problem = f"found the byte 0x{content[exc.start]:02X}, expected UTF-8 text"
        raise RecipeError(problem, where=where, hint="save the file as UTF-8") from exc


def _recipe(
    nodes: list[Node],
    findings: Findings,
    origin: tuple[str, Path | None, str],
    overrides: Sequence[str],
) -> Recipe:
    source, folder, text = origin
    if overrides:
        nodes = [*nodes[:-1], apply_overrides(nodes[-1], overrides)]
        text = to_yaml(nodes)
    documents = [read_document(node, folder, findings) for node in nodes]
    ordered = order(documents, findings)
    for document in ordered[:-1]:
        for key, node in document.output.items():
            hint = "move it to the document without a name"
            findings.error(node.key, f"{key} belongs to the output's document", hint)
    output = _output(ordered[-1] if ordered else documents[-1], findings)
    findings.raise_all()
    stages = tuple(document.stage for document in ordered)
    return Recipe(stages, source, folder, text, *output, notes=tuple(findings.notes))


def _output(document: Document, findings: Findings) -> tuple[int, int, str | None]:
    """Return seed, shard size and output folder as the recipe has them."""
    fields = document.output
    seed = findings.whole(fields["seed"]) if "seed" in fields else 0
    size = DEFAULT_SHARD_BYTES
    if "shard_size" in fields:
        size = _shard_size(fields["shard_size"], findings)
    output = findings.text(fields["output"]) if "output" in fields else None
    return seed or 0, size, output


def _shard_size(node: Node, findings: Findings) -> int:
    try:
        if isinstance(node.content, str | int) and not isinstance(node.content, bool):
            return parse_size(node.content)
        findings.wrong(node, "a size", "write for example 500MB, 5GB or 2GiB")
    except UsageError as error:
        findings.wrong(node, "a size", error.hint)
    return DEFAULT_SHARD_BYTES


def _with_arguments(recipe: Recipe, seed: int | None, shard_size: str | int | None) -> Recipe:
    whole = isinstance(seed, int) and not isinstance(seed, bool)
    if seed is not None and not (whole and 0 <= seed <= MAX_WHOLE):
        raise UsageError(f"the seed is {seed!r}, expected a whole number from 0 to {MAX_WHOLE}")
    if seed is not None:
        recipe = replace(recipe, seed=seed)
    if shard_size is not None:
        recipe = replace(recipe, shard_size_bytes=parse_size(shard_size))
    return recipe
