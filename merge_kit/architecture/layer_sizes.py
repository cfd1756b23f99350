"""Sizes of layers in a config: which keys give them, and whether each layer has its own."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from merge_kit.architecture.per_layer_forms import form_of, is_nested_part
from merge_kit.architecture.sections import COUNT_KEYS, is_int

HEADS = (
    *("num_attention_heads", "num_key_value_heads", "head_dim", "n_head", "n_heads", "num_heads"),
    *("encoder_attention_heads", "decoder_attention_heads", "multi_query", "partial_rotary_factor"),
)
"""Keys that say how the rows of one matrix are divided: shapes do not show them."""

SETTINGS = (
    *("rope_theta", "rope_scaling", "rope_parameters", "rope_local_base_freq", "rotary_pct"),
    *("sliding_window", "use_sliding_window", "attn_logit_softcapping", "query_pre_attn_scalar"),
    *("hidden_act", "hidden_activation", "activation_function", "rms_norm_eps", "layer_norm_eps"),
    *("layer_norm_epsilon", "norm_eps", "num_experts_per_tok", "norm_topk_prob"),
    *("attention_multiplier", "residual_multiplier"),
)
"""Further keys that every layer is computed by."""


def sizes_by_layer(config: Mapping[str, Any], layers: int) -> bool:
    """Return whether a config has a list of sizes, or of objects, with one entry a layer.

    Args:
        config: The object that describes the layers.
        layers: How many there are.
    """
    return any(_holds_sizes(value) for value in _by_layer(config, layers))


def _by_layer(config: Mapping[str, Any], layers: int, *, nested: bool = False) -> Iterator[Any]:
    for key, value in config.items():
        form = form_of(key, value, (layers, layers), nested=nested)
        if form == "values":
            yield value
        elif form == "objects":
            yield list(value.values())
        elif not nested and is_nested_part(key, value):
            yield from _by_layer(value, layers, nested=True)


def _holds_sizes(values: Sequence[Any]) -> bool:
    """Return whether these are numbers that are no flags, or objects."""
    numbers = [value for value in values if is_int(value)]
    return any(value > 1 for value in numbers) or any(isinstance(value, dict) for value in values)


def differing_keys(
    one: Mapping[str, Any], other: Mapping[str, Any], shape: Sequence[int], found: Sequence[int]
) -> list[str]:
    """Return the keys whose numbers differ as the axes of two shapes do.

    Args:
        shape: Of a tensor that the first config describes.
        found: Of the tensor of that name that the other one describes.
    """
    pairs = {(a, b) for a, b in zip(shape, found, strict=False) if a != b}
    return [
        key
        for key, value in one.items()
        if is_int(value)
        and is_int(other.get(key))
        and (value, other[key]) in pairs
        and key not in COUNT_KEYS
    ]


def differing_settings(
    one: Mapping[str, Any], other: Mapping[str, Any], keys: Sequence[str]
) -> list[str]:
    """Return which of these keys two configs give other values, each one for all layers."""
    both = [key for key in keys if one.get(key) is not None and other.get(key) is not None]
    return [
        key
        for key in both
        if one[key] != other[key] and not isinstance(one[key], list) | isinstance(other[key], list)
    ]
