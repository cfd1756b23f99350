"""`mergekit extract`: the recipe that it stands for, run as any other."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from merge_kit import api
from merge_kit.cli.options import Planning
from merge_kit.cli.planning import print_summary
from merge_kit.cli.running import Choices, run_into
from merge_kit.cli.text import print_json
from merge_kit.errors import UsageError
from merge_kit.plan.describe_json import plan_json


@dataclass(frozen=True, slots=True)
class Wanted:
    """What is extracted from what.

    Attributes:
        rank: Of each matrix, None if energy says it.
        energy: Share of each matrix's change that is kept, None if rank says it.
        rest: save, refuse or drop.
        dtype: Of the factors, None for that of the models.
    """

    model: str
    base: str
    rank: int | None
    energy: float | None
    rest: str
    dtype: str | None

    def recipe(self) -> dict[str, Any]:
        """Return the recipe.

        Raises:
            UsageError: If neither rank nor energy is given, or both.
        """
        if (self.rank is None) == (self.energy is None):
            both = "neither --rank nor --energy" if self.rank is None else "--rank and --energy"
            hint = (
                "--rank 32 makes every matrix of rank 32, --energy 0.99 of the rank that it needs"
            )
            raise UsageError(f"{both} given, expected one of them", hint=hint)
        parameters = {"rank": self.rank, "energy": self.energy, "rest": self.rest}
        recipe = {
            "merge_method": "lora_extract",
            "base_model": self.base,
            "models": [{"model": self.model}],
            "parameters": {key: value for key, value in parameters.items() if value is not None},
        }
        return recipe if self.dtype is None else {**recipe, "dtype": self.dtype}


def start(wanted: Wanted, output: Path, choices: Choices, planning: Planning) -> None:
    """Extract an adapter, and say what it misses."""
    run_into(wanted.recipe(), output, choices, planning)


def show(wanted: Wanted, output: Path, planning: Planning, *, as_json: bool) -> None:
    """Print the plan of an extraction."""
    plan = api.plan(wanted.recipe(), **planning)
    if as_json:
        print_json(plan_json(plan))
    else:
        print_summary(plan, output)
