"""Layer stacks, found from tensor names alone."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from merge_kit.architecture.sections import main_section, path_words, section_of, side_of
from merge_kit.core.names import natural_key

_NUMBER = re.compile(r"0|[1-9][0-9]{0,8}")
_AUXILIARY = re.compile(r"(^|[._])(mtp|nextn|draft|medusa)")


@dataclass(frozen=True, slots=True)
class Stack:
    """Numbered layers of a model.

    Attributes:
        prefix: Path before the layer's number ("model.layers"), with its component's folder
            ("unet/down_blocks"); "" where names begin with the number.
        count: Highest layer number plus one.
        layers: The layer numbers that exist, ascending; fewer than `count` where some are missing
            (the activations of an nn.Sequential, say).
    """

    prefix: str
    count: int
    layers: tuple[int, ...]


def find_stacks(names: Iterable[str]) -> tuple[Stack, ...]:
    """Return the stacks of a model, by prefix in natural order.

    A name belongs to the stack of its outermost part that is a number: experts in
    `model.layers.3.mlp.experts.7.w1` are part of layer 3. Names without such a part are loose.
    """
    found: dict[str, set[int]] = {}
    for name in names:
        place = outermost(name)
        if place is not None:
            found.setdefault(place[0], set()).add(place[1])
    stacks = (
        Stack(prefix, max(layers) + 1, tuple(sorted(layers))) for prefix, layers in found.items()
    )
    return tuple(sorted(stacks, key=lambda stack: natural_key(stack.prefix)))


def outermost(name: str) -> tuple[str, int, str] | None:
    """Return prefix, layer and suffix of a name, or None if it is loose."""
    folder, slash, path = name.rpartition("/")
    parts = path.split(".")
    for i, part in enumerate(parts):
        if _NUMBER.fullmatch(part):
            prefix = folder + slash + ".".join(parts[:i])
            return prefix, int(part), ".".join(parts[i + 1 :])
    return None


def split_layer(name: str, stack: Stack) -> tuple[int, str] | None:
    """Return the layer and what follows it in a name of this stack, else None."""
    lead = _lead(stack)
    if not name.startswith(lead):
        return None
    number, _, suffix = name[len(lead) :].partition(".")
    return (int(number), suffix) if _NUMBER.fullmatch(number) else None


def layer_name(stack: Stack, layer: int, suffix: str) -> str:
    """Return the name of a tensor of a layer; the inverse of `split_layer`."""
    return f"{_lead(stack)}{layer}.{suffix}" if suffix else f"{_lead(stack)}{layer}"


def first_layer_extras(layers: Mapping[int, Collection[str]]) -> frozenset[str]:
    """Return the suffixes of what a stack stores in its first layer for all of its layers.

    T5, for one, keeps the table of relative positions there. It is told by its place alone: all
    other layers are alike, and the first has everything that they have and these tensors.

    Args:
        layers: The suffixes in each layer.
    """
    first, other = _first_and_others(layers)
    return first - other if other < first else frozenset()


def first_layer_lacks(layers: Mapping[int, Collection[str]]) -> frozenset[str]:
    """Return the suffixes of what every layer of a stack has but the first.

    ModernBERT, for one, has no norm there: the embeddings end with it. All other layers, two at
    least, are alike, and the first has nothing that they don't have.

    Args:
        layers: The suffixes in each layer.
    """
    first, other = _first_and_others(layers)
    return other - first if first < other and len(layers) > 2 else frozenset()


def _first_and_others(
    layers: Mapping[int, Collection[str]],
) -> tuple[frozenset[str], frozenset[str]]:
    """Return the suffixes of the first layer and of any other; twice the same if these differ."""
    first = frozenset(layers.get(0, ()))
    others = {frozenset(suffixes) for layer, suffixes in layers.items() if layer}
    return first, others.pop() if len(others) == 1 and first else first


def described_stack(config: Mapping[str, Any] | None, stacks: Sequence[Stack]) -> Stack | None:
    """Return the stack whose layer count config.json holds.

    For a multimodal model that is the text decoder's, for an encoder-decoder the decoder's. If
    several stacks would do, the one with the config's count is taken, then the one with the most
    layers. Without a config, or with one that holds no layer count, it is the only stack there is.

    Returns:
        The stack, or None if none or several could be meant.
    """
    if len(stacks) <= 1 or config is None:
        return stacks[0] if len(stacks) == 1 else None
    section = main_section(config)
    if section is None or (not section.path and not section.is_counted):
        return None
    fitting = []
    for stack in stacks:
        own = section_of(config, stack.prefix, stack.count)
        if own is not None and own.path == section.path:
            fitting.append(stack)

    def fit(stack: Stack) -> tuple[bool, bool, bool, int, int]:
        return (
            not _AUXILIARY.search(stack.prefix),
            section.count(stack.prefix, stack.count) == stack.count,
            side_of(stack.prefix) == "decoder",
            len(section.words & path_words(stack.prefix)),
            len(stack.layers),
        )

    return max(fitting, key=fit, default=None)


def same_place(stack: Stack, stacks: Sequence[Stack]) -> Stack | None:
    """Return which of a model's stacks stands where one of another model does, or None.

    That is the one of its name, or else the only one whose name differs by no more than what
    stands in front (`encoder.layers` and `model.encoder.layers`).
    """
    named = next((one for one in stacks if one.prefix == stack.prefix), None)
    ends = [one for one in stacks if _ends(one.prefix, stack.prefix)]
    return named or (ends[0] if len(ends) == 1 else None)


def _ends(one: str, other: str) -> bool:
    """Return whether one of two paths ends the other."""
    short, long = sorted((one, other), key=len)
    return bool(short) and long.endswith(f".{short}")


def _lead(stack: Stack) -> str:
    ends = not stack.prefix or stack.prefix.endswith("/")
    return stack.prefix if ends else stack.prefix + "."
