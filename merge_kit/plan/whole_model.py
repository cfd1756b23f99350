"""Statistics over all tensors that a stage merges by one method."""

from __future__ import annotations

from collections.abc import Sequence

from merge_kit.errors import MergeKitError, PlanError
from merge_kit.methods.base import Scan
from merge_kit.plan.values import Step

Group = tuple[int, str]
"""Number of the stage, and name of the method."""


def model_scans(step: Step) -> list[Scan]:
    """Return a step's scans of scope "model"."""
    return [s for s in step.method.scans() if s.scope == "model"] if step.method else []


def group_of(step: Step) -> Group:
    """Return the group whose statistics a step shares."""
    return step.group, step.method.method_name if step.method is not None else ""


def groups(steps: Sequence[Step]) -> dict[Group, list[Step]]:
    """Return the steps that have such scans by group, the groups of earlier stages first."""
    found: dict[Group, list[Step]] = {}
    for step in steps:
        if model_scans(step):
            found.setdefault(group_of(step), []).append(step)
    return dict(sorted(found.items()))


def differing(steps: Sequence[Step]) -> MergeKitError | None:
    """Return what is wrong if the tensors of one group are to be scanned in different ways."""
    for (_, method), members in groups(steps).items():
        first = [(s.name, s.reduction) for s in model_scans(members[0])]
        for step in members[1:]:
            if [(s.name, s.reduction) for s in model_scans(step)] != first:
                return PlanError(
                    f"{method} ranks the whole model at once, and its parameters or models differ "
                    f"between {members[0].outputs[0].key} and {step.outputs[0].key}",
                    where=step.outputs[0].key,
                    hint="give one value for all tensors, or rank each tensor by itself "
                    "(scope: tensor)",
                )
    return None
