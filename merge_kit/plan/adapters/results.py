"""One adapter that is made: what it is made of, and whether that can be one adapter."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from merge_kit.errors import MergeKitError, MismatchError, PlanError
from merge_kit.plan.adapters.groups import Member, ModuleGroup
from merge_kit.plan.adapters.terms import Combination, Terms, Use, active
from merge_kit.recipe.values import Stage


@dataclass(frozen=True, slots=True)
class Result:
    """One adapter that is made.

    Attributes:
        members: Those that count in it; all, if none does.
        combinations: Of each of its modules, in order.
    """

    use: Use
    members: tuple[Member, ...]
    combinations: tuple[Combination, ...]

    @property
    def same_as(self) -> Member | None:
        """The one adapter that it is, tensor by tensor and name by name, or None."""
        alone = len(self.members) == 1 and not self.members[0].renames
        alone = alone and all(one.kept is not None for one in self.combinations)
        return self.members[0] if alone else None


def result_of(
    use: Use, listed: Sequence[Member], every: Sequence[ModuleGroup], terms: Terms
) -> Result:
    """Return what an adapter that is made is made of.

    Raises:
        MergeKitError: If a parameter is missing or wrong.
    """
    combinations = [terms.combination(module, use) for module in every]
    indexes = {member.index for member in active(combinations)}
    indexes |= {m.index for m in listed if _is_whole(m) and terms.weight(m, _first(m), use)}
    counting = [member for member in listed if member.index in indexes] or list(listed)
    indexes = {member.index for member in counting}
    chosen = [
        one
        for one in combinations
        if any(change.member.index in indexes for change in one.module.changes)
    ]
    return Result(use, tuple(counting), tuple(chosen))


def _is_whole(member: Member) -> bool:
    """Return whether an adapter has no factors, only what it holds whole."""
    return not member.adapter.updates


def _first(member: Member) -> str:
    """Return the name of the first tensor that an adapter holds whole."""
    names = [saved.tensor for saved in member.adapter.saved]
    names += [f"{rows.module}.weight" for rows in member.adapter.rows]
    return names[0] if names else ""


def unfit(made: Result) -> Iterator[MergeKitError]:
    """Yield what keeps adapters from being one."""
    if made.same_as is not None:
        return
    for one in made.combinations:
        for change in one.module.changes:
            label = change.member.model.label
            if change.update.magnitude is not None:
                yield MismatchError(
                    f"{label} is an adapter of DoRA, whose lengths belong to its own weights",
                    where=one.module.name,
                    hint="list it alone with weight 1, or merge base+adapter into the base",
                )
    biased = first_biased(made)
    odd = next((o for o in made.combinations if o.module.kind in ("embedding", "experts")), None)
    if biased is not None and odd is not None:
        yield MismatchError(
            f"{biased.model.label} has biases of factors (lora_bias), and "
            f"{odd.module.changes[0].member.model.label} changes {odd.module.kind}: peft can load "
            "no adapter with both",
            where=odd.module.name,
            hint="leave one of the two out",
        )


def first_biased(made: Result) -> Member | None:
    """Return the first adapter with biases of b."""
    changes = [change for one in made.combinations for change in one.module.changes]
    return next((change.member for change in changes if change.update.bias is not None), None)


def refused_keys(stage: Stage) -> Iterator[MergeKitError]:
    """Yield an error for each key that makes no sense where adapters are combined."""
    keys = {
        "base_model": stage.base_model,
        "slices": stage.slices,
        "modules": stage.modules,
        "tensors": stage.tensors,
        "tokenizer_source": stage.tokenizer,
    }
    for key, value in keys.items():
        if value:
            yield PlanError(
                f"{stage.merge_method} combines adapters, and takes no {key}",
                where=str(getattr(value, "mark", stage.mark)),
                hint="remove it; the adapters stand under models",
            )
