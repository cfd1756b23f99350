"""Whether two paths, of two adapters of one model, name one part of the model.

No base tells it here. Certain are words more or less that models of transformers, and what wraps
them, put around a stack of layers, in any order; and one other word in front, as a model with a
head has it and the same model without does not.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Literal

from merge_kit.architecture.components import kind_of, side_of
from merge_kit.core.names import natural_key

Verdict = Literal["same", "apart", "unsure"]

_AROUND = frozenset(
    (
        *("model", "base_model", "module", "_orig_mod", "_fsdp_wrapped_module", "backbone", "llm"),
        *("thinker", "transformer", "unet", "diffusion_model", "language_model", "text_model"),
        *("vision_model", "vision_tower", "visual", "audio_model", "audio_tower"),
    )
)
"""Words around a stack that say no more than which kind of model it belongs to, if anything."""

_TABLES = ("embed_tokens", "wte")
"""Embeddings that lie beside the stack of layers in their model."""

_AUXILIARY = re.compile(r"(^|[._])(mtp|nextn|draft|medusa|eagle|perceiver|q_?former)|resampler")
"""Stacks that models have beside their main one."""

_COMPONENT = re.compile(
    r"(unet|transformer(_\d+)?|prior|controlnet|vae|text_encoder(_\d+)?)(?=\.|$)"
)
"""First words that are components of a pipeline."""

_BLOCKS = {
    "input_blocks": "original",
    "middle_block": "original",
    "output_blocks": "original",
    "double_blocks": "original",
    "single_blocks": "original",
    "joint_blocks": "original",
    "down_blocks": "diffusers",
    "mid_block": "diffusers",
    "up_blocks": "diffusers",
    "transformer_blocks": "diffusers",
    "single_transformer_blocks": "diffusers",
}
"""Whose names the blocks of diffusion models have: those that made them, or diffusers."""

_BLOCK = re.compile(rf"(?<![^._])({'|'.join(sorted(_BLOCKS, key=len, reverse=True))})(?=[._])")


def verdict(one: str, other: str) -> Verdict:
    """Return whether two paths before layer numbers are one stack."""
    words, others = one.split("."), other.split(".")
    if words[-1] != others[-1] or _are_apart(one, other):
        return "apart"
    unknown = _unknown(words, others)
    if unknown is None:
        return "unsure"
    if not unknown:
        return "same"
    in_front = one.endswith(f".{other}") or other.endswith(f".{one}")
    is_one = len(unknown) == 1 and not _COMPONENT.fullmatch(unknown[0])
    return "same" if in_front and is_one else "unsure"


def is_same_module(one: str, other: str) -> bool:
    """Return whether two paths of modules outside layers are certainly one module."""
    words, others = one.split("."), other.split(".")
    alike = words[-1] == others[-1] and not _are_apart(one, other)
    return alike and _unknown(words, others) == []


def closest(path: str, others: Iterable[str]) -> list[str]:
    """Return the paths that share most words with one, of these the shortest."""
    own = Counter(path.split("."))

    def rank(other: str) -> tuple[int, int]:
        words = Counter(other.split("."))
        return -(own & words).total(), words.total()

    found = sorted(others, key=natural_key)
    first = min(map(rank, found), default=None)
    return [other for other in found if rank(other) == first]


def layout_of(module: str) -> str:
    """Return whose names the blocks of a diffusion model have in a path, "" if that is open."""
    found = _BLOCK.search(module)
    return _BLOCKS[found[1]] if found else ""


def component_of(path: str) -> str:
    """Return the component of a pipeline that a path begins with, or ""."""
    found = _COMPONENT.match(path)
    return found[0] if found else ""


def of_towers(changes: Iterable[tuple[str, str, str]]) -> Iterator[tuple[str, str, str]]:
    """Yield what changes of prefix mean for towers: programs moved all parts below one name.

    Each is what stands in front in both namings, and the kind of the part.
    """
    for old, new, _ in changes:
        if old == _NOW and new in _ONCE:
            yield from (("model.", "", kind) for kind in _TOWERS)
        elif new == _NOW and old in _ONCE:
            yield from (("", "model.", kind) for kind in _TOWERS)


def stack_beside(head: str, heads: Iterable[str], modules: Iterable[str]) -> str | None:
    """Return the name of a stack beside an embedding, where others have no stack of its kind.

    Args:
        heads: Paths before layer numbers that others have.
        modules: Their modules outside layers.
    """
    if any(kind_of(other) == kind_of(head) for other in heads):
        return None
    tables = [path for path in modules if path.rpartition(".")[2] in _TABLES]
    names = [_moved(head, table) for table in tables]
    found = closest(head, [name for name in names if verdict(head, name) == "same"])
    return found[0] if found and found[0] != head else None


def table_beside(module: str, heads: Iterable[str]) -> str | None:
    """Return the name of an embedding beside a stack that others have, None if it is none."""
    if module.rpartition(".")[2] not in _TABLES:
        return None
    names = [_moved(module, head) for head in heads]
    found = closest(module, [name for name in names if is_same_module(module, name)])
    return found[0] if found else None


def _moved(path: str, beside: str) -> str:
    """Return the last word of a path after the words that another has before its last."""
    above, last = beside.rpartition(".")[0], path.rpartition(".")[2]
    return f"{above}.{last}" if above else last


_NOW, _ONCE = "model.language_model.", ("language_model.model.", "model.")
"""What is in front of the text part of a model with pictures, and what was."""

_TOWERS = ("vision", "audio")


def may_follow(head: str, old: str, new: str) -> bool:
    """Return whether a stack can have a change of prefix that others of its adapter have.

    What stands beside the main stack does not move with it; only blocks of a diffusion model are
    known to lie in a component that names leave out.
    """
    if _AUXILIARY.search(head):
        return False
    return bool(old) or not component_of(new.removesuffix(".")) or layout_of(f"{head}.") != ""


def _are_apart(one: str, other: str) -> bool:
    """Return whether two paths lie in different parts of a model: towers, sides, components."""
    if kind_of(one) != kind_of(other) or side_of(one) != side_of(other):
        return True
    if bool(_AUXILIARY.search(one)) != bool(_AUXILIARY.search(other)):
        return True
    for two in ({component_of(one), component_of(other)}, {_end(one), _end(other)}):
        if len(two) == 2 and "" not in two:
            return True
    return False


def _end(path: str) -> str:
    """Return "encoder" or "decoder" where a word ends so ("text_decoder")."""
    words = [word for word in path.split(".") if word.endswith(("encoder", "decoder"))]
    return words[-1][-len("encoder") :] if words else ""


def _unknown(words: list[str], others: list[str]) -> list[str] | None:
    """Return the words that one path has more and that say something; None if both have more."""
    more, less = Counter(words) - Counter(others), Counter(others) - Counter(words)
    if more and less:
        return None
    return [word for word in (more + less).elements() if word not in _AROUND]
