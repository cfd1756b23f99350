"""Sizes of layers in a config: which keys give them, and whether each layer has its own."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from merge_kit.architecture.per_layer_forms import form_of, is_nested_part
from merge_kit.architecture.sections import COUNT_KEYS, is_int


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
