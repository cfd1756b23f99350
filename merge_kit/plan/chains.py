"""How deep stages feed one another, and how often the first of them would be computed."""

from __future__ import annotations

from collections.abc import Sequence

from merge_kit.errors import PlanError
from merge_kit.plan.steps import Made
from merge_kit.recipe.values import Stage

MAX_DEPTH = 100
MAX_TIMES = 1000
_HINT = "run the earlier stages as a recipe of their own, and use their output as a model"


class Chains:
    """The stages so far, by name."""

    def __init__(self) -> None:
        self._depth: dict[str, int] = {}  # stages that feed one another up to this one
        self._times: dict[str, int] = {}  # merges of one tensor, each stage wherever it is used

    def add(self, key: str, stage: Stage, made: Sequence[Made]) -> None:
        """Add a stage.

        Raises:
            PlanError: If it goes beyond what a run can do in any sensible time.
        """
        depth = times = 1
        for one in made:
            below = [part.model.key for part in one.item.parts if part.model.checkpoint is None]
            depth = max(depth, 1 + max((self._depth[name] for name in below), default=0))
            times = max(times, 1 + sum(self._times[name] for name in below))
        self._depth[key], self._times[key] = depth, times
        where = str(stage.mark)
        if depth > MAX_DEPTH:
            problem = f"{depth} stages feed one another up to this one, at most {MAX_DEPTH} may"
            raise PlanError(problem, where=where, hint=_HINT)
        if times > MAX_TIMES:
            problem = f"takes {times:,} merges for each tensor, at most {MAX_TIMES:,} are allowed"
            raise PlanError(problem, where=where, hint=_HINT)
