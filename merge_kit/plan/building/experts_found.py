"""The experts of a model, whole, or an error that says what is wrong with them."""

from __future__ import annotations

from collections.abc import Sequence

from merge_kit.architecture.expert_groups import ExpertGroup, find_experts
from merge_kit.errors import MismatchError
from merge_kit.plan.models import Model


def whole_groups(model: Model) -> Sequence[ExpertGroup]:
    """Return the groups of experts of a model.

    Raises:
        MismatchError: If there are none, or one is not whole.
    """
    groups = find_experts({name: spec.shape for name, spec in model.specs.items()})
    if not groups:
        raise MismatchError(
            "has no experts, in no tensor's name",
            where=model.label,
            hint="experts are looked for as `experts.0.up_proj.weight` or `experts.up_proj`",
        )
    for group in groups:
        if group.problem:
            hint = "is the download complete?"
            raise MismatchError(group.problem, where=f"{model.label}, {group.path}", hint=hint)
    return groups
