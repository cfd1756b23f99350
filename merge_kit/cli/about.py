"""`mergekit --version` and `mergekit schema`."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version

from merge_kit.cli.text import print_json


def version_line() -> str:
    """Return the program's name and version."""
    try:
        return f"mergekit {version('merge_kit')}"
    except PackageNotFoundError:
        return "mergekit, version unknown: merge_kit runs from a folder where it is not installed"


def show_schema() -> None:
    """Print the JSON Schema of recipes."""
    from merge_kit.recipe import recipe_schema  # noqa: PLC0415  (the version needs no YAML)

    print_json(recipe_schema())
