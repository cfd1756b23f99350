"""The commands and their options.

What a command does is in a module of its own, imported when the command runs: `--help` answers
at once, and `plan` and `inspect` never load torch.
"""

from __future__ import annotations

from pathlib import Path
from typing import Unpack

import click

from merge_kit.cli.options import (
    Planning,
    json_option,
    output_option,
    overrides_option,
    planning_options,
    seed_option,
    shard_size_option,
    size,
)

RECIPE = click.argument("recipe", type=click.Path(path_type=Path))
FOLDER = click.Path(path_type=Path)
SHARD_BYTES = 5_000_000_000


def _show_version(context: click.Context, _: click.Parameter, wanted: bool) -> None:
    if wanted and not context.resilient_parsing:
        from merge_kit.cli.about import version_line  # noqa: PLC0415

        click.echo(version_line())
        context.exit()


class InOrder(click.Group):
    """Lists its commands in the order in which they are used, not by the alphabet."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Return the names as they were declared."""
        del ctx
        return list(self.commands)


@click.group(
    cls=InOrder,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 80},
    epilog="Exit codes: 2 usage or recipe, 3 input model, 4 disk or system, 130 and 143 signals.",
)
@click.option(
    "--version",
    is_flag=True,
    is_eager=True,
    expose_value=False,
    callback=_show_version,
    help="Show the version and exit.",
)
def app() -> None:
    """Merge model checkpoints on a CPU, in memory that does not grow with the model."""


@app.command()
@RECIPE
@output_option(required=False)
@click.option("--overwrite", is_flag=True, help="Replace an output that is there already.")
@click.option("--dry-run", is_flag=True, help="Show the plan and stop.")
@planning_options
@json_option
@click.option("--json-progress", is_flag=True, help="Print progress as lines of JSON.")
@click.option("--allow-nonfinite", is_flag=True, help="Write NaN and infinities, and count them.")
@click.option("--sync/--no-sync", default=False, help="Wait until everything is on disk.")
@click.option(
    "--engine",
    type=click.Choice(["threads"]),
    default="threads",
    expose_value=False,
    help="Engine.",
)
@click.option(
    "--device", type=click.Choice(["cpu"]), default="cpu", expose_value=False, help="Device."
)
def run(  # noqa: PLR0913, PLR0917  (one argument an option)
    recipe: Path,
    output: Path | None,
    overwrite: bool,
    dry_run: bool,
    as_json: bool,
    json_progress: bool,
    allow_nonfinite: bool,
    sync: bool,
    **planning: Unpack[Planning],
) -> None:
    """Merge models as RECIPE says.

    A run that was stopped goes on where it was when the same command is given again.
    """
    if dry_run:
        from merge_kit.cli.planning import show_plan  # noqa: PLC0415

        show_plan(recipe, planning, output=output, as_json=as_json or json_progress)
        return
    from merge_kit.cli.running import Choices, run_recipe  # noqa: PLC0415

    choices = Choices(overwrite, allow_nonfinite, sync, as_json, json_progress)
    run_recipe(recipe, output, choices, planning)


@app.command()
@RECIPE
@click.option("--layers", is_flag=True, help="Show where each output layer comes from.")
@click.option("--rules", is_flag=True, help="Show what is done to each output tensor.")
@planning_options
@json_option
def plan(
    recipe: Path, layers: bool, rules: bool, as_json: bool, **planning: Unpack[Planning]
) -> None:
    """Show what a run of RECIPE would do and take, from headers alone."""
    from merge_kit.cli.planning import show_plan  # noqa: PLC0415

    show_plan(recipe, planning, layers=layers, rules=rules, as_json=as_json)


@app.command()
@click.argument("models", type=FOLDER, nargs=-1, required=True, metavar="MODEL [OTHER]...")
@click.option("--tensors", is_flag=True, help="List every tensor; of adapters, every module.")
@json_option
def inspect(models: tuple[Path, ...], tensors: bool, as_json: bool) -> None:
    """Show what MODEL holds, or how it differs from OTHER.

    Of LoRA adapters, two or more: how close their changes are (cosine, norms, common subspaces).
    """
    from merge_kit.cli.inspecting import show  # noqa: PLC0415

    show(models, tensors=tensors, as_json=as_json)


@app.command()
@click.argument("name", required=False)
@json_option
def methods(name: str | None, as_json: bool) -> None:
    """List the merge methods, or explain the one called NAME."""
    from merge_kit.cli.explaining import show_method, show_methods  # noqa: PLC0415

    if name is None:
        show_methods(as_json=as_json)
    else:
        show_method(name, as_json=as_json)


@app.command()
def schema() -> None:
    """Print the JSON Schema of recipes, for editors."""
    from merge_kit.cli.about import show_schema  # noqa: PLC0415

    show_schema()


@app.command()
@click.argument("out", type=FOLDER)
@click.option("--against", type=FOLDER, metavar="RECIPE", help="A recipe it should come from.")
@overrides_option
@seed_option
@json_option
def verify(
    out: Path,
    against: Path | None,
    overrides: tuple[str, ...],
    seed: int | None,
    as_json: bool,
) -> None:
    """Check the merged model in OUT against its record.

    With --against, also whether it comes from that recipe, with --set and --seed as they were
    given to the run. The exit code is 3 if anything differs.
    """
    from merge_kit.cli.verifying import Origin, show_verification  # noqa: PLC0415

    origin = None if against is None else Origin(against, overrides, seed)
    show_verification(out, origin, as_json=as_json)


@app.command()
@click.argument("finetuned")
@click.option("--base", required=True, metavar="BASE", help="The model it was trained from.")
@click.option("--rank", type=click.IntRange(min=1), metavar="N", help="Rank of each matrix.")
@click.option(
    "--energy",
    type=click.FloatRange(0, 1, min_open=True),
    metavar="E",
    help="Share of each matrix's squared change to keep, in place of a rank.",
)
@click.option(
    "--rest",
    type=click.Choice(["save", "refuse", "drop"]),
    default="save",
    show_default=True,
    help="What becomes of changed norms, biases, embeddings and heads.",
)
@click.option("--dtype", metavar="DTYPE", help="Of the factors, default: that of the models.")
@output_option(required=True)
@click.option("--overwrite", is_flag=True, help="Replace an output that is there already.")
@click.option("--dry-run", is_flag=True, help="Show the plan and stop.")
@click.option("--threads", type=click.IntRange(min=1), metavar="N", help="Threads that work.")
@click.option("--memory", type=size, metavar="SIZE", help="Most memory of the whole process.")
@shard_size_option
@json_option
@click.option("--json-progress", is_flag=True, help="Print progress as lines of JSON.")
def extract(  # noqa: PLR0913, PLR0917  (one argument an option)
    finetuned: str,
    base: str,
    rank: int | None,
    energy: float | None,
    rest: str,
    dtype: str | None,
    output: Path,
    overwrite: bool,
    dry_run: bool,
    threads: int | None,
    memory: int | None,
    shard_size: int | None,
    as_json: bool,
    json_progress: bool,
) -> None:
    """Turn what FINETUNED has changed of its base into a LoRA adapter.

    Each matrix becomes two factors of low rank; a table says how much of its change they miss.
    """
    from merge_kit.cli.extracting import Wanted, show, start  # noqa: PLC0415
    from merge_kit.cli.running import Choices  # noqa: PLC0415

    wanted = Wanted(finetuned, base, rank, energy, rest, dtype)
    planning = Planning(
        overrides=(), seed=None, shard_size=shard_size, threads=threads, memory=memory
    )
    if dry_run:
        show(wanted, output, planning, as_json=as_json or json_progress)
        return
    choices = Choices(overwrite, False, False, as_json, json_progress)
    start(wanted, output, choices, planning)


@app.command()
@click.argument("pickled", type=FOLDER)
@output_option(required=True)
@shard_size_option
@json_option
def convert(pickled: Path, output: Path, shard_size: int | None, as_json: bool) -> None:
    """Convert PICKLED weights (.bin, .pt) to safetensors."""
    from merge_kit.cli.converting import convert_weights  # noqa: PLC0415

    convert_weights(pickled, output, shard_size or SHARD_BYTES, as_json=as_json)
