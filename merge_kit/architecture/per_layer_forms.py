"""How a key of a config.json holds something for each layer, told from its name and its value."""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import pairwise
from typing import Any, Final, Literal

from merge_kit.architecture.sections import is_int

Form = Literal["values", "indices", "numbers", "text", "objects", "runs"]
"""values: a list with one entry a layer (masks, too). indices: a list of layers, counted from 0.
numbers: of layers counted from 1. text: one character a layer. objects: {"3": ...} by layer.
runs: [[["global", "local"], 12]].
"""

ABSENT: Final = object()
"""Stands for a value that a config does not hold."""

MOST_RUNS = 100_000
"""Entries beyond which `attention_types` is no description of a model."""

LEAST_LAYERS = 3
"""Layers from which on a list of that length is taken to be per layer whatever its name."""

NAMES_LAYERS = re.compile(
    r"layer|attn|attention|block|mixer|expert|ffn|intermediate|heads|sparsity|indexer|rope"
)
"""Names that speak of layers or of what differs between them."""

FORM_BY_NAME = re.compile(r"layer_types$|layers_block_type$|^layer_rope_theta$")
"""Keys that have one entry a layer whatever they hold."""

_INDICES = frozenset({"mlp_only_layers", "moe_layers", "cross_attention_layers"})
_INDICES_NAME = re.compile(
    r"(layer|attn|attention|att_block|moe|dense|sparse|rope|deepstack).*(ids|idxs?|indices|indexes)$"
)
_INDICES_OR_MASK = re.compile(r"_layers$")
_NUMBERS = frozenset({"kda_layers", "full_attn_layers"})
_OBJECTS = frozenset({"per_layer_config", "pruned_heads"})
_RUNS = "attention_types"
_EMPTY_IS_ABSENT = frozenset({"no_rope_layers"})
_TEXT_NAME = re.compile(r"(hybrid|layers?|block)(_override)?_pattern$")
_OTHER_NAME = re.compile(
    r"token|label|architectures|language|mean$|std$|kernel|stride|dilation|padding|mtp|nextn|ignore"
    r"|(image|patch|crop|input|pool|video|tubelet)_?sizes?|_factor$|mrope|betas|grid|feature_layer"
    r"|^(conv|tdnn|mask)_|sliding_window_pattern|moe_layer_(start|end)_index|(?<!layer)_ids$"
)
_OTHER_OBJECT = re.compile(
    r"rope|quant|label|task_specific|generation|auto_map|vision|audio|image|text|mtp"
)


def form_of(key: str, value: Any, lengths: Sequence[int], *, nested: bool = False) -> Form | None:
    """Return how a key of a config follows the layers, or None if it does not.

    Args:
        key: The key.
        value: Its value.
        lengths: Numbers of entries that a list with one for each layer may have, the number of
            layers first.
        nested: Whether it stands in an object of another name (`linear_attn_config`).
    """
    if key in _OBJECTS:
        return "objects" if isinstance(value, dict) and value else None
    if isinstance(value, str):
        return "text" if _TEXT_NAME.search(key) and len(value) in lengths else None
    if not isinstance(value, list) or is_absent(key, value):
        return None
    if key == _RUNS and expanded(value):
        return "runs"
    if key in _NUMBERS and _ascends(value, 1, lengths[0]):
        return "numbers"
    if _holds_indices(key, value, lengths):
        return "indices"
    speaks = NAMES_LAYERS.search(key) or (not nested and lengths[0] >= LEAST_LAYERS)
    follows = bool(value) and len(value) in lengths and speaks and not _OTHER_NAME.search(key)
    return "values" if follows else None


def is_absent(key: str, value: Any) -> bool:
    """Return whether a value says as little as its absence: null, and some empty lists."""
    return value is None or (value == [] and key in _EMPTY_IS_ABSENT)


def is_nested_part(key: str, value: Any) -> bool:
    """Return whether a nested object may hold further values of the same layers."""
    other = key in _OBJECTS or _OTHER_OBJECT.search(key)
    return isinstance(value, dict) and "model_type" not in value and not other


def expanded(runs: Any) -> list[Any]:
    """Return the entries that `[[["global", "local"], 12]]` stands for, [] for another list."""
    if not isinstance(runs, list) or not all(_is_run(run) for run in runs):
        return []
    if sum(len(run[0]) * max(run[1], 0) for run in runs) > MOST_RUNS:
        return []
    return [kind for run in runs for kind in run[0] * run[1]]


def _is_run(run: Any) -> bool:
    match run:
        case [list(), int(count)]:
            return is_int(count)
    return False


def _holds_indices(key: str, value: list[Any], lengths: Sequence[int]) -> bool:
    """Return whether a list names layers; a name in `_layers` may also be a mask of 0 and 1."""
    if not _ascends(value, 0, None):
        return False
    if key in _INDICES or _INDICES_NAME.search(key):
        return True
    mask = len(value) in lengths and all(v in (0, 1) for v in value)
    return _INDICES_OR_MASK.search(key) is not None and not mask


def _ascends(value: Sequence[Any], first: int, last: int | None) -> bool:
    """Return whether these are integers from first to last, each larger than the one before."""
    if not all(is_int(v) and v >= first and (last is None or v <= last) for v in value):
        return False
    return all(a < b for a, b in pairwise(value))
