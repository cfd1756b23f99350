"""The config.json of a model whose layers are taken from others: count, lists, periods follow."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from merge_kit.architecture.config import Config, Edit, edit_config, read_config
from merge_kit.architecture.layer_rules import RULES, Rule, Values
from merge_kit.architecture.per_layer import Place, layer_edits
from merge_kit.architecture.per_layer_forms import FORM_BY_NAME, is_absent
from merge_kit.architecture.sections import Section, is_int, mirrors, section_of, side_of
from merge_kit.architecture.shared_kv import shared_kv_edits
from merge_kit.architecture.stacks import Stack
from merge_kit.errors import PlanError

EXTRA_KEYS = ("num_nextn_predict_layers", "num_mtp_layers")
"""Layers that some checkpoints store behind those that the config counts."""

FULL_AT_THE_END = ("gemma4", "diffusion_gemma", "embedding_gemma2")
"""Beginnings of the model types whose last layer has full attention, whatever the config says."""

WHERE = "config.json"


@dataclass(frozen=True, slots=True)
class _Target:
    """A part of the donor's config, and the output's layers as they stand in their configs."""

    section: Section
    prefix: str
    donor: Place
    places: tuple[Place, ...]

    @property
    def counted(self) -> tuple[Place, ...]:
        """The layers that the config counts, without the extra ones behind them."""
        return tuple(place for place in self.places if place.layer < place.layers)


Origins = Sequence[tuple[str, int]]
"""For each output layer, the config.json of the model that it comes from and its number there."""


def stacked_config(donor_text: str, stack: Stack, origins: Origins) -> str:
    """Return the donor's config for a stack of other layers, everything else byte for byte.

    The layer count is patched under whatever keys hold it; lists with one entry a layer, masks
    and index lists are rebuilt from the configs that the layers come from; numbers that give
    layers a meaning by position are kept or adjusted if each layer keeps its meaning. Where the
    layers are the donor's own in their order, the text is returned unchanged. Extra layers behind
    the counted ones (multi-token prediction) may follow at the end; `num_nextn_predict_layers` is
    then the number of those in the output.

    Args:
        donor_text: config.json of the model that gives the config.
        stack: The stack, as found in the donor's names.
        origins: For each output layer, the config.json of the model that it comes from and its
            number there.

    Raises:
        CheckpointError: If a config cannot be read.
        PlanError: If a config does not describe the stack, or a key cannot follow the layers; it
            names the key and the first layer that breaks.
    """
    return edit_config(donor_text, stack_edits(donor_text, stack, origins))


def stack_edits(donor_text: str, stack: Stack, origins: Origins) -> Sequence[Edit]:
    """Return the edits of `stacked_config`, whose arguments and errors these are."""
    in_order = [layer for _, layer in origins] == list(range(len(origins)))
    if in_order and len(origins) == stack.count and _section(donor_text, stack) is None:
        return ()
    targets = _targets(donor_text, stack, origins)
    own = all(text == donor_text for text, _ in origins)
    if own and in_order and len(origins) in targets[0].donor.lengths:
        return ()
    edits: list[Edit] = []
    for target in targets:
        edits += _count_edits(target, stack)
        follow = list(_layer_edits(target))
        edits += follow
        edits += _rule_edits(target, {edit.path[-1] for edit in follow})
        path = target.section.path
        edits += shared_kv_edits(target.section.config, target.counted, path)
    return edits


def _targets(donor_text: str, stack: Stack, origins: Origins) -> tuple[_Target, ...]:
    """Return the object that describes the stack, and the whole file if that repeats it."""
    section = _section(donor_text, stack)
    if section is None:
        problem = f"no layer count for {stack.prefix or 'the numbered layers'}, expected one"
        hint = "its layers can be merged in their own order, but not rearranged"
        raise PlanError(problem, where=WHERE, hint=hint)
    sources = {text: _own_sections(text, stack) for text in dict.fromkeys(t for t, _ in origins)}
    targets = []
    for part in mirrors(read_config(donor_text, WHERE), section, stack.prefix, stack.count):
        places, keys = [], part.count_keys(stack.prefix, stack.count)
        for text, layer in origins:
            own = next((s for s in sources[text] if s.path == part.path), sources[text][0])
            places.append(_place(own, stack, layer, keys))
        targets.append(_Target(part, stack.prefix, _place(part, stack, 0, keys), tuple(places)))
    counted = targets[0].donor.layers
    if stack.count < counted:
        problem = f"the config counts {counted} layers, {stack.prefix} holds {stack.count}"
        hint = "are files missing? layers that share their weights cannot be rearranged"
        raise PlanError(problem, where=WHERE, hint=hint)
    _check_order(targets[0])
    return tuple(targets)


def _section(text: str, stack: Stack) -> Section | None:
    """Return the object of a config that describes the stack, None where none counts layers."""
    section = section_of(read_config(text, WHERE), stack.prefix, stack.count)
    return section if section is not None and (section.path or section.is_counted) else None


def _own_sections(text: str, stack: Stack) -> tuple[Section, ...]:
    """Return the objects that describe the stack in a model that gives layers, nearest first."""
    section, config = _section(text, stack), read_config(text, WHERE)
    return (
        (Section((), config),)
        if section is None
        else mirrors(config, section, stack.prefix, stack.count)
    )


def _place(section: Section, stack: Stack, layer: int, keys: Sequence[str]) -> Place:
    """Return where a layer comes from; the donor's keys say first how many layers there are."""
    held = next((section.config[key] for key in keys if is_int(section.config.get(key))), None)
    layers = section.count(stack.prefix, stack.count) if held is None else int(held)
    if layers is None:
        return Place(section.config, layer, max(stack.count, layer + 1))
    if layers < 1:
        problem = f"the config counts {layers} layers, expected at least 1"
        raise PlanError(problem, where=WHERE, hint="repair the config by hand")
    extra = max((section.config[k] for k in EXTRA_KEYS if is_int(section.config.get(k))), default=0)
    if not 0 <= layer < layers + extra:
        problem = f"layer {layer} of {stack.prefix} is asked for, the config counts {layers} layers"
        raise PlanError(problem, where=WHERE, hint=f"take layers 0 to {layers - 1}")
    return Place(section.config, layer, layers, extra)


def _check_order(target: _Target) -> None:
    """Refuse extra layers that would stand before ordinary ones."""
    extra = [place.layer >= place.layers for place in target.places]
    if extra != sorted(extra):
        i = extra.index(True)
        problem = (
            f"{_extra_key(target.places[i])} says that layer {target.places[i].layer} of its model "
            f"is an extra one; it becomes output layer {i}, before ordinary ones"
        )
        raise PlanError(problem, where=WHERE, hint="put extra layers last, or leave them out")


def _extra_key(place: Place) -> str:
    return next(key for key in EXTRA_KEYS if is_int(place.config.get(key)))


def _count_edits(target: _Target, stack: Stack) -> Iterator[Edit]:
    """Yield the edits of the layer count, and of the count of extra layers stored behind."""
    section, old, new = target.section, target.donor.layers, len(target.counted)
    held = section.count_keys(target.prefix, stack.count)
    keys = held or ("num_hidden_layers",)
    values: dict[str, int] = dict.fromkeys(keys, new)
    side = side_of(target.prefix)
    if is_paired(section.config, keys) and side == "decoder":
        values = {"num_decoder_layers": new}
    elif is_paired(section.config, keys) and side:
        values["num_decoder_layers"] = old
    if stack.count > old:
        extra = len(target.places) - new
        values |= {key: extra for key in EXTRA_KEYS if is_int(section.config.get(key))}
    for key, value in values.items():
        if section.config.get(key) != value:
            yield Edit((*section.path, key), value)


def is_paired(config: Config, keys: Sequence[str]) -> bool:
    """Return whether the decoder has as many layers as the encoder, for want of its own count."""
    paired = config.get("is_encoder_decoder") is True and keys[0] == "num_layers"
    return paired and not is_int(config.get("num_decoder_layers"))


def _layer_edits(target: _Target) -> Iterator[Edit]:
    section = target.section
    for key, value in section.config.items():
        named = FORM_BY_NAME.search(key) and isinstance(value, list) and "mtp" not in key
        if named and len(value) not in target.donor.lengths:
            problem = f"{key} has {len(value)} entries for {target.donor.layers} layers"
            raise PlanError(problem, where=WHERE, hint="repair the config of the model")
    _check_last(target)
    for rule in RULES:
        _check_written(rule, target)
    other_side = section.other_side(target.prefix)
    yield from layer_edits(target.donor, target.places, section.path, other_side)


def _check_written(rule: Rule, target: _Target) -> None:
    """Refuse layers whose kinds some models list and others give by number."""
    configs = list({id(place.config): place.config for place in target.places}.values())
    for key in rule.lists:
        listed = any(not is_absent(key, c.get(key)) for c in (target.section.config, *configs))
        counted = (c for c in configs if is_absent(key, c.get(key)) and rule.values(c) is not None)
        other = next(counted, None)
        if listed and other is not None:
            held = next((k for k in rule.keys if other.get(k) is not None), "a period of its own")
            problem = f"{key} is written for some of the layers, and others go by {held}"
            hint = f"write {key} into the config.json of every model, or of none"
            raise PlanError(problem, where=WHERE, hint=hint)


def _check_last(target: _Target) -> None:
    """Refuse a last layer that programs would make one of full attention."""
    types = target.counted[-1].config.get("layer_types") if target.counted else None
    forced = str(target.section.config.get("model_type")).startswith(FULL_AT_THE_END)
    layer = target.counted[-1].layer if target.counted else 0
    if (
        forced
        and isinstance(types, list)
        and layer < len(types)
        and "full" not in str(types[layer])
    ):
        problem = (
            f"layer_types says {types[layer]!r} of the last layer (layer {layer} of its model), "
            "and this architecture ends with full attention whatever it says"
        )
        raise PlanError(problem, where=WHERE, hint="end with a layer of full attention")


def _rule_edits(target: _Target, followed: set[str]) -> Iterator[Edit]:
    """Yield edits of the keys that give layers a meaning by position."""
    config, other_side = target.section.config, target.section.other_side(target.prefix)
    for rule in RULES:
        listed = (key in followed or not is_absent(key, config.get(key)) for key in rule.lists)
        elsewhere = other_side and next(iter(rule.keys)).startswith(other_side)
        if any(listed) or elsewhere:
            continue
        new = _kept_or_adjusted(rule, target)
        for key, value in new.items():
            yield Edit((*target.section.path, key), value)


def _kept_or_adjusted(rule: Rule, target: _Target) -> Mapping[str, object]:
    """Return the keys of a rule that must change, with their new values.

    Raises:
        PlanError: If no values give every output layer the meaning that it has in its own model.
    """
    wanted = []
    for place in target.counted:
        held = rule.values(place.config)
        wanted.append(rule.off if held is None else rule.label(held, place.layer, place.layers))
    values = rule.values(target.section.config)
    if values is None:
        broken = next((i for i, kind in enumerate(wanted) if kind != rule.off), None)
        if broken is None:
            return {}
        raise _refusal(rule, target, values, broken)
    broken = rule.first_break(values, wanted)
    if broken is None:
        return {}
    for tried in rule.solve(values, wanted):
        if rule.first_break({**values, **tried}, wanted) is None:
            return {key: value for key, value in tried.items() if value != values[key]}
    raise _refusal(rule, target, values, broken)


def _refusal(rule: Rule, target: _Target, values: Values | None, layer: int) -> PlanError:
    place = target.counted[layer]
    written = target.section.config
    held = {key: value for key, value in (values or {}).items() if written.get(key) is not None}
    says = ", ".join(f"{key} {value!r}" for key, value in held.items()) or "nothing"
    problem = (
        f"{next(iter(held or rule.keys))} cannot follow this order of layers: output layer {layer} "
        f"(layer {place.layer} of its model) would change its kind; the config says {says}"
    )
    hint = "choose layers that keep their place in the pattern"
    if rule.lists:
        hint += f", or write {rule.lists[0]} into the models' config.json, which follows the layers"
    return PlanError(problem, where=WHERE, hint=hint)
