"""config.json of the output: the donor's text with only what the merge changes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from merge_kit.architecture.config import read_config, with_dtype, with_tied
from merge_kit.architecture.several_stacks import stacked_configs
from merge_kit.architecture.stacking import Origins
from merge_kit.architecture.stacks import Stack
from merge_kit.architecture.ties import is_head, is_tied
from merge_kit.core.dtypes import config_name, is_float
from merge_kit.errors import CheckpointError, PlanError
from merge_kit.plan.assemble import Assembly
from merge_kit.plan.models import Model, Part
from merge_kit.plan.steps import Made


def result_parts(assembly: Assembly, made: Sequence[Made]) -> tuple[Part, ...]:
    """Return the components of a stage's result with their config.json texts."""
    donor = assembly.donor
    return tuple(Part(part.path, part.stem, _text(assembly, part, made)) for part in donor.parts)


def _text(assembly: Assembly, part: Part, made: Sequence[Made]) -> str | None:
    text = part.config_text
    if text is None:
        return None
    try:
        return _patched(assembly, part, made, text)
    except (CheckpointError, PlanError) as error:
        kind = CheckpointError if isinstance(error, CheckpointError) else PlanError
        where = f"{assembly.donor.label}/{error.where}"
        raise kind(error.problem, where=where, hint=error.hint) from error


def _patched(assembly: Assembly, part: Part, made: Sequence[Made], text: str) -> str:
    built = _built(assembly, part)
    if built:
        every = [stack for stack in assembly.donor.stacks if _folder(stack) == part.path]
        text = stacked_configs(text, built, every)
    own = [m for m in made if m.held.component == part.path]
    dtype = main_dtype(own)
    named = assembly.stage.out_dtype or assembly.stage.dtype
    if dtype is not None and (named or _stated_dtype(text) != config_name(dtype)):
        text = with_dtype(text, config_name(dtype))
    if part == assembly.donor.main and _untied(assembly.donor, own):
        text = with_tied(text, tied=False)
    return text


def _stated_dtype(text: str) -> str:
    """Return the dtype that a config states, "" if it states none."""
    config = read_config(text, "config.json")
    return str(config.get("dtype") or config.get("torch_dtype") or "").removeprefix("torch.")


def _built(assembly: Assembly, part: Part) -> list[tuple[Stack, Origins]]:
    """Return the stacks of a component that slices build, with the configs of their layers."""
    return [
        (one.stack, [(_config_text(model, part.path), layer) for model, layer in one.layers])
        for one in assembly.sliced
        if _folder(one.stack) == part.path
    ]


def _folder(stack: Stack) -> str:
    return stack.prefix.rpartition("/")[0]


def _config_text(model: Model, path: str) -> str:
    part = next((part for part in model.parts if part.path == path), model.main)
    return part.config_text or "{}"


def main_dtype(made: Sequence[Made]) -> str | None:
    """Return the float dtype that most elements have, None if no tensor is float."""
    counts: Counter[str] = Counter()
    for one in made:
        if is_float(one.held.spec.dtype):
            counts[one.held.spec.dtype] += one.held.spec.numel
    return counts.most_common(1)[0][0] if counts else None


def _untied(donor: Model, made: Sequence[Made]) -> bool:
    """Return whether a tied model gains a head of its own: a tied one's, or an untied one's."""
    if is_tied(donor.config or {}) is False:
        return False
    heads = [part for one in made if is_head(one.item.name) for part in one.item.parts]
    return any(part.stands_for != "" or is_tied(part.model.config) is False for part in heads)
