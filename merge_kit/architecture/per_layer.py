"""Values of a config.json that follow the layers one by one: lists, masks, index lists."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from merge_kit.architecture.config import Config, Edit
from merge_kit.architecture.per_layer_forms import (
    ABSENT,
    FORM_BY_NAME,
    NAMES_LAYERS,
    Form,
    expanded,
    form_of,
    is_absent,
    is_nested_part,
)
from merge_kit.errors import PlanError


@dataclass(frozen=True, slots=True)
class Place:
    """Where an output layer comes from.

    Attributes:
        config: The object of its model's config that describes the stack.
        layer: Its number there.
        layers: How many layers that config counts.
        extra: How many more it says are stored after those (multi-token prediction).
    """

    config: Config
    layer: int
    layers: int
    extra: int = 0

    @property
    def lengths(self) -> tuple[int, int]:
        """Lengths that a list with one entry a layer may have."""
        return self.layers, self.layers + self.extra


def layer_edits(
    donor: Place, places: Sequence[Place], path: tuple[str, ...], other_side: str
) -> Iterator[Edit]:
    """Yield the edits that make everything per layer in a config follow the output's layers.

    Args:
        donor: The object to edit; its layer does not matter.
        places: Origin of each output layer, extra ones last.
        path: Keys that lead to the object.
        other_side: Keys that begin with this word describe another stack; "" for none.

    Raises:
        PlanError: If a model that gives layers does not say what a key needs.
    """
    yield from _edits(donor, places, path, other_side)
    for key, value in donor.config.items():
        if is_nested_part(key, value):
            inner = [replace(place, config=_object(place.config.get(key))) for place in places]
            part = replace(donor, config=value)
            yield from _edits(part, inner, (*path, key), other_side, nested=True)


def _edits(
    donor: Place,
    places: Sequence[Place],
    path: tuple[str, ...],
    other_side: str,
    *,
    nested: bool = False,
) -> Iterator[Edit]:
    configs = [donor, *{id(place.config): place for place in places}.values()]
    for key in dict.fromkeys(key for place in configs for key in place.config):
        form = _agreed_form(key, configs, nested=nested)
        if form is None or (other_side and key.startswith(other_side)):
            continue
        old = donor.config.get(key)
        longer = isinstance(old, list) and len(old) > donor.layers
        chosen = places if longer else [p for p in places if p.layer < p.layers]
        new = _followed(key, form, old, chosen)
        if new is not ABSENT and new != old:
            yield Edit((*path, key), new)


def _agreed_form(key: str, configs: Sequence[Place], *, nested: bool) -> Form | None:
    """Return how a key follows the layers in every config that holds a list under it."""
    forms: set[Form | None] = set()
    for place in configs:
        value = place.config.get(key)
        form = form_of(key, value, place.lengths, nested=nested)
        if form is not None or (isinstance(value, list) and not is_absent(key, value)):
            forms.add(form)
    if len(forms) == 1 and (key in configs[0].config or NAMES_LAYERS.search(key)):
        return forms.pop()
    if len(forms) > 1 and FORM_BY_NAME.search(key):
        raise PlanError(
            f"{key} holds something else for the layers in one model than in another",
            where="config.json",
            hint=f"write {key} in the same way in the config.json of every model",
        )
    return None  # a list that has as many entries as one of the models has layers, by chance


def _followed(key: str, form: Form, old: Any, places: Sequence[Place]) -> Any:
    """Return what the key must hold for the output's layers, ABSENT to leave the donor alone."""
    held = old is not None and not is_absent(key, old)
    if form == "objects":
        objects = [_object(place.config.get(key)).get(str(place.layer), ABSENT) for place in places]
        found = {str(i): value for i, value in enumerate(objects) if value is not ABSENT}
        return found if found or held else ABSENT
    if form in ("indices", "numbers"):
        first = 1 if form == "numbers" else 0
        flags = _filled(key, [_flag(key, p, first) for p in places], [bool(old)] * held, held=held)
        new = [i + first for i, inside in enumerate(flags or ()) if inside]
        return ABSENT if flags is None or not (new or held) else new
    whole = (expanded(old) if form == "runs" else old) if isinstance(old, list | str) else []
    values = _filled(key, [_entry(key, form, p) for p in places], list(whole), held=held)
    if values is None:
        return ABSENT
    if form == "runs":
        return ABSENT if values == whole else [[values, 1]]
    if form == "text":
        return "".join(values)
    return ABSENT if held and all(value == old for value in values) else values


def _filled(key: str, values: list[Any], donor: list[Any], *, held: bool) -> list[Any] | None:
    """Return the values with none absent, or None where the donor need not hold the key.

    A model whose config lacks the key is taken to have the one value that all layers of the
    others and of the donor have; if those differ, nobody knows.
    """
    if ABSENT not in values:
        return values
    known = {repr(value): value for value in (*values, *donor) if value is not ABSENT}
    if len(known) == 1:
        (only,) = known.values()
        return [only if value is ABSENT else value for value in values] if held else None
    raise PlanError(
        f"{key} is missing in the model that output layer {values.index(ABSENT)} comes from, "
        f"and the other models give it different values for different layers",
        where="config.json",
        hint=f"write {key} into that model's config.json",
    )


def _entry(key: str, form: Form, place: Place) -> Any:
    value: Any = place.config.get(key)
    if is_absent(key, value):
        return ABSENT
    if form == "runs":
        value = expanded(value)
    elif form == "values" and not isinstance(value, list):
        return value  # one value for all layers
    if place.layer >= len(value):
        problem = f"{key} has {len(value)} entries, none for layer {place.layer}"
        raise PlanError(problem, where="config.json", hint="repair that model's config.json")
    return value[place.layer]


def _flag(key: str, place: Place, first: int) -> Any:
    value = place.config.get(key)
    return place.layer + first in value if isinstance(value, list) else ABSENT


def _object(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, dict) else {}
