"""`num_kv_shared_layers`: the last layers of a model that read keys and values of earlier ones."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from merge_kit.architecture.config import Config, Edit
from merge_kit.architecture.per_layer import Place
from merge_kit.architecture.sections import is_int
from merge_kit.errors import PlanError

KEY = "num_kv_shared_layers"


def shared_kv_edits(
    donor: Config, places: Sequence[Place], path: tuple[str, ...]
) -> Iterator[Edit]:
    """Yield the edit that keeps each layer reading from the layer that it read from.

    A layer that shares reads from the last layer before the sharing ones that has its type.

    Raises:
        PlanError: If no number does that.
    """
    wanted = []
    for place in places:
        shared, types = _shared(place.config), _types(place.config, place.layers)
        source = _sources(types, shared)[place.layer]
        wanted.append(None if source is None else (id(place.config), source))
    if not any(wanted) and not _shared(donor):
        return
    types = [_types(place.config, place.layers)[place.layer] for place in places]
    for number in dict.fromkeys((_shared(donor), sum(source is not None for source in wanted))):
        read = [s if s is None else _key(places, s) for s in _sources(types, number)]
        if read == wanted:
            if number != _shared(donor):
                yield Edit((*path, KEY), number)
            return
    layer = next(i for i, (a, b) in enumerate(zip(read, wanted, strict=True)) if a != b)
    raise PlanError(
        f"{KEY} is {_shared(donor)}, and output layer {layer} (layer {places[layer].layer} of its "
        f"model) would read keys and values of another layer than before",
        where="config.json",
        hint="keep the sharing layers at the end, and the last layers of each type before them",
    )


def _key(places: Sequence[Place], source: int) -> tuple[int, int]:
    """Return which layer of which model this is; (0, -1) where there is none to read from."""
    return (id(places[source].config), places[source].layer) if source >= 0 else (0, -1)


def _shared(config: Config) -> int:
    value: Any = config.get(KEY)
    return int(value) if is_int(value) else 0


def _types(config: Config, layers: int) -> list[str]:
    types: Any = config.get("layer_types")
    held = isinstance(types, list) and len(types) >= layers
    return [repr(kind) for kind in types] if held else [""] * layers  # of any JSON type


def _sources(types: Sequence[str], shared: int) -> list[int | None]:
    """Return for each layer the one that it reads from, None if its own, -1 if there is none."""
    first = max(len(types) - shared, 0)
    last = {kind: i for i, kind in enumerate(types[:first])}
    return [None if i < first else last.get(kind, -1) for i, kind in enumerate(types)]
