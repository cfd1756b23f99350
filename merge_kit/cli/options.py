"""Options that several commands share, so that they have one name and one meaning."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypedDict, TypeVar

import click

from merge_kit.core.sizes import parse_size
from merge_kit.errors import UsageError

F = TypeVar("F", bound=Callable[..., Any])


class Planning(TypedDict):
    """What `plan` and `run` pass on to the planner, by the names that the library uses."""

    overrides: tuple[str, ...]
    seed: int | None
    shard_size: int | None
    threads: int | None
    memory: int | None


def size(text: str) -> int:
    """Return the bytes of a size as people write it, for click."""
    try:
        return parse_size(text)
    except UsageError as exc:
        raise click.BadParameter(f"{exc.problem}; {exc.hint}") from exc


def overrides_option(command: F) -> F:
    """Add `--set`."""
    return click.option(
        "--set",
        "overrides",
        multiple=True,
        metavar="KEY=VALUE",
        help="Change the recipe: models.0.parameters.weight=0.5 (repeatable; value as YAML).",
    )(command)


def seed_option(command: F) -> F:
    """Add `--seed`."""
    return click.option("--seed", type=int, metavar="N", help="Seed of everything random.")(command)


def shard_size_option(command: F) -> F:
    """Add `--shard-size`."""
    text = "Largest shard, for example 5GB or 2GiB."
    return click.option("--shard-size", type=size, metavar="SIZE", help=text)(command)


def planning_options(command: F) -> F:
    """Add the options that decide a plan."""
    threads, memory = "Threads that merge.", "Most memory of the whole process."
    for option in (
        click.option("--threads", type=click.IntRange(min=1), metavar="N", help=threads),
        click.option("--memory", type=size, metavar="SIZE", help=memory),
        shard_size_option,
        seed_option,
        overrides_option,
    ):
        command = option(command)
    return command


def json_option(command: F) -> F:
    """Add `--json`."""
    return click.option("--json", "as_json", is_flag=True, help="Print JSON.")(command)


def output_option(*, required: bool) -> Callable[[F], F]:
    """Return a decorator that adds `-o`."""
    path = click.Path(path_type=Path)
    text = "Output folder." if required else "Output folder; default: merged/<recipe's name>."
    return click.option("-o", "--output", type=path, required=required, metavar="OUT", help=text)
