"""The files beside the weights of an adapter that is made."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from merge_kit.architecture.vocab import is_tokenizer_file
from merge_kit.errors import MergeKitError, MismatchError
from merge_kit.plan.adapters.config import Bias, adapter_config_text
from merge_kit.plan.adapters.groups import Member
from merge_kit.plan.adapters.made import OutModule
from merge_kit.plan.models import full_name
from merge_kit.plan.values import SideFile

CONFIG = "adapter_config.json"


def config_file(
    folder: str,
    members: Sequence[Member],
    modules: Sequence[OutModule],
    *,
    tokens: Mapping[str, Sequence[int]],
    biases: bool,
    left_out: bool,
) -> SideFile:
    """Return the config of an adapter: the first one's, patched.

    Args:
        members: Those that it is made of.
        biases: Whether it holds biases of the base whole.
        left_out: Whether modules that the adapters have are not part of it.
    """
    first = members[0].adapter
    text = adapter_config_text(
        first.config_text,
        modules,
        base=_first(members, "base"),
        revision=_first(members, "revision"),
        targets=None if left_out else _targets(members),
        parameters=_parameters(members),
        saved_modules=_saved_modules(members),
        tokens=tokens,
        bias=_bias(members) if biases else "none",
        transposed=_is_turned(members, modules),
    )
    return SideFile(full_name(folder, CONFIG), None, text)


def same_config(folder: str, member: Member) -> SideFile:
    """Return the config of an adapter as it is."""
    text = member.adapter.config_text
    assert text is not None  # of the style of peft
    return SideFile(full_name(folder, CONFIG), None, text)


def tokenizer_files(folder: str, member: Member) -> list[SideFile]:
    """Return the tokenizer and chat files that lie beside an adapter; nothing else is taken."""
    checkpoint = member.adapter.checkpoint
    if checkpoint.is_file:
        return []
    return [
        SideFile(full_name(folder, name), checkpoint.root / name, None)
        for name in checkpoint.side_files
        if is_tokenizer_file(name)
    ]


def _first(members: Sequence[Member], field: str) -> str:
    return next((str(v) for m in members if (v := getattr(m.adapter, field))), "")


def _targets(members: Sequence[Member]) -> list[str] | None:
    """Return the ends of names by which the adapters chose modules, None where one has none."""
    found: dict[str, None] = {}
    for member in members:
        config = member.adapter.config
        targets = config.get("target_modules")
        others = ("exclude_modules", "layers_to_transform")
        if not isinstance(targets, list) or any(config.get(key) for key in others):
            return None
        if config.get("layers_to_transform") == 0:
            return None
        found |= dict.fromkeys(str(target) for target in targets)
    return list(found)


def _parameters(members: Sequence[Member]) -> list[str]:
    """Return the ends of names by which the adapters chose parameters of experts, all the same."""
    for member in members:
        named = member.adapter.config.get("target_parameters")
        if named:
            return [str(name) for name in named]
    return []


def _saved_modules(members: Sequence[Member]) -> list[str]:
    found: dict[str, None] = {}
    for member in members:
        found |= dict.fromkeys(str(n) for n in member.adapter.config.get("modules_to_save") or [])
    return list(found)


def _bias(members: Sequence[Member]) -> Bias:
    found = [member.adapter.config.get("bias") for member in members]
    return "all" if "all" in found else "lora_only"


def _is_turned(members: Sequence[Member], modules: Sequence[OutModule]) -> bool:
    """Return what the first says that changes a matrix; others may say it of the same weights."""
    made = {one.module for one in modules}
    said = (
        update.transposed
        for member in members
        for update in member.adapter.updates
        if update.kind == "linear" and member.renamed(update.module) in made
    )
    return next(said, members[0].adapter.config.get("fan_in_fan_out") is True)


def config_problems(members: Sequence[Member]) -> Iterator[MergeKitError]:
    """Yield what configs say that cannot be said of one adapter."""
    first = members[0]
    for other in members[1:]:
        for key in ("ensure_weight_tying", "target_parameters"):
            one, two = (m.adapter.config.get(key) or None for m in (first, other))
            if isinstance(one, list) and isinstance(two, list):
                one, two = sorted(map(str, one)), sorted(map(str, two))
            if one != two and not (key == "target_parameters" and None in (one, two)):
                yield MismatchError(
                    f"{key} is {one} in {first.model.label}, {two} in {other.model.label}",
                    where=CONFIG,
                    hint="one adapter has one value: leave one of the two out",
                )
