"""Numbers of a config.json whose meaning depends on a layer's position: thresholds and periods.

A rule says what such keys mean for each layer. When layers are put in another order, the keys are
kept if every output layer keeps the meaning that it had in its own model, adjusted if other values
do that, and refused otherwise.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

from merge_kit.architecture.config import Config
from merge_kit.architecture.sections import is_int

Values = Mapping[str, Any]
Label = Callable[[Values, int, int], Hashable]
"""(values, layer, number of layers) -> what the layer is."""
Solve = Callable[[Values, Sequence[Hashable]], Iterator[Values]]
"""(values, wanted labels) -> values worth trying, the nearest first."""


def _always(config: Config) -> bool:
    del config
    return True


@dataclass(frozen=True, slots=True)
class Rule:
    """Keys that together give each layer a meaning.

    Attributes:
        keys: Names and the values that they have when others of them are given.
        label: The meaning of one layer.
        solve: Values worth trying.
        lists: Lists that, where a config has them, are read in place of these keys.
        applies: Whether the keys mean anything in a config.
        off: The label of all layers where they do not.
    """

    keys: Mapping[str, Any]
    label: Label
    solve: Solve
    lists: tuple[str, ...] = ()
    applies: Callable[[Config], bool] = _always
    off: Hashable = False

    def values(self, config: Config) -> Values | None:
        """Return the values in a config, defaults filled in, or None if it has none of the keys."""
        implied = IMPLIED.get(str(config.get("model_type")), {})
        held = {key: config.get(key, implied.get(key)) for key in self.keys}
        if all(value is None for value in held.values()) or not self.applies(config):
            return None
        return {key: self.keys[key] if value is None else value for key, value in held.items()}

    def first_break(self, values: Values, wanted: Sequence[Hashable]) -> int | None:
        """Return the first layer that these values give another meaning than the wanted one."""
        layers = len(wanted)
        breaks = (i for i, kind in enumerate(wanted) if self.label(values, i, layers) != kind)
        return next(breaks, None)


def _threshold(key: str, **kwargs: Any) -> Rule:
    """Layers from the number on are of one kind, those before of another."""

    def label(values: Values, layer: int, layers: int) -> bool:
        del layers
        return bool(is_int(values[key]) and layer >= values[key])

    def solve(values: Values, wanted: Sequence[Hashable]) -> Iterator[Values]:
        del values
        yield {key: next((i for i, kind in enumerate(wanted) if kind), len(wanted))}

    return Rule({key: None}, label, solve, **kwargs)


def _every(key: str, shifts: tuple[int, ...] = (1,), **kwargs: Any) -> Rule:
    """One layer in so many is of another kind.

    Readers differ in which layer of a period it is; with several shifts, each reading must keep
    its meaning.
    """

    def label(values: Values, layer: int, layers: int) -> Hashable:
        del layers
        period = values[key]
        sound = is_int(period) and period > 0
        return tuple(sound and (layer + shift) % period == 0 for shift in shifts)

    def solve(values: Values, wanted: Sequence[Hashable]) -> Iterator[Values]:
        del values
        yield from ({key: period} for period in range(1, len(wanted) + 2))

    return Rule({key: None}, label, solve, off=(False,) * len(shifts), **kwargs)


def _offset(period: str, offset: str, periods: int, first: int) -> Rule:
    """The layer at an offset of each period is of another kind."""

    def label(values: Values, layer: int, layers: int) -> bool:
        del layers
        sound = is_int(values[period]) and values[period] > 0
        return bool(sound and layer % values[period] == values[offset])

    def solve(values: Values, wanted: Sequence[Hashable]) -> Iterator[Values]:
        widths = (values[period] if is_int(values[period]) else 1, *range(1, len(wanted) + 2))
        yield from ({period: p, offset: o} for p in widths for o in range(min(p, len(wanted) + 1)))

    return Rule({period: periods, offset: first}, label, solve)


def _first_dense_label(values: Values, layer: int, layers: int) -> Hashable:
    """Whether a layer has experts: by both keys, and for programs that know only the first."""
    del layers
    step = values["moe_layer_freq"] if is_int(values["moe_layer_freq"]) else 1  # a list: per layer
    first = values["first_k_dense_replace"]
    sparse = is_int(first) and layer >= first
    return sparse, sparse and (step <= 0 or layer % step == 0)


def _first_dense_solve(values: Values, wanted: Sequence[Hashable]) -> Iterator[Values]:
    step = values["moe_layer_freq"]
    steps = (step, *range(1, len(wanted) + 1)) if is_int(step) else (step,)
    for first, every in product(range(len(wanted) + 1), steps):
        yield {"first_k_dense_replace": first, "moe_layer_freq": every}


def _span_label(values: Values, layer: int, layers: int) -> Hashable:
    """Ernie: experts every so many layers between two layers; lists hold one value a modality."""
    first, last = _listed(values["moe_layer_start_index"]), _listed(values["moe_layer_end_index"])
    every = values["moe_layer_interval"]
    last = last * len(first) if len(last) == 1 else last
    ends = [layers - 1 if stop == -1 else stop for stop in last]
    hit = is_int(every) and every > 0 and (layer + 1) % every == 0
    inside = tuple(hit and a <= layer <= b for a, b in zip(first, ends, strict=False))
    return inside[0] if len(inside) == 1 else inside


def _span_solve(values: Values, wanted: Sequence[Hashable]) -> Iterator[Values]:
    first, last, every = (f"moe_layer_{name}" for name in ("start_index", "end_index", "interval"))
    hits = [i for i, kind in enumerate(wanted) if kind is True]
    start, stop = (hits[0], hits[-1]) if hits else (len(wanted), -1)
    for step in (values[every], *range(1, len(wanted) + 1)):
        for end in (values[last], -1, stop):
            for begin in (values[first], start):
                yield {first: begin, last: end, every: step}


def _unwritten_label(values: Values, layer: int, layers: int) -> bool:
    """Whether a layer is the one of its period that programs know of without a config's help."""
    del layers
    held = values["layer_types"]
    if isinstance(held, list):
        return layer < len(held) and "full" in str(held[layer])
    period, place = held
    return bool(layer % period == place)


def _listed(value: Any) -> list[int]:
    return [v for v in (value if isinstance(value, list) else [value]) if is_int(v)]


def _window_label(values: Values, layer: int, layers: int) -> Hashable:
    """Whether a layer has a window: by period, by letters (the last layer never), by a list."""
    pattern: Any = next((value for value in values.values() if value is not None), None)
    if isinstance(pattern, str) and pattern:
        return layer != layers - 1 and pattern[layer % len(pattern)] == "L"
    if isinstance(pattern, list) and pattern:
        return bool(pattern[layer % len(pattern)])
    return bool(is_int(pattern) and pattern > 0 and (layer + 1) % pattern != 0)


def _window_solve(values: Values, wanted: Sequence[Hashable]) -> Iterator[Values]:
    held = {key: value for key, value in values.items() if value is not None}
    for period in range(1, len(wanted) + 2):
        letters = "".join("L" if kind else "G" for kind in wanted[:period])
        pattern = letters if any(isinstance(value, str) for value in held.values()) else period
        yield dict.fromkeys(held, pattern)


def _index_label(key: str) -> Rule:
    """Every layer is computed or stored by its own number: no other order keeps the meaning."""

    def label(values: Values, layer: int, layers: int) -> Hashable:
        return (layer, layers) if values[key] else False

    return Rule({key: None}, label, lambda values, wanted: iter(()))  # noqa: ARG005


def _has_window(config: Config) -> bool:
    used = config.get("use_sliding_window", True)
    return config.get("sliding_window", 1) is not None and bool(used)


def _has_unwritten_kinds(config: Config) -> bool:
    kind = str(config.get("model_type"))
    unused = kind == "qwen2_moe" and not config.get("use_sliding_window")
    return kind in UNWRITTEN and _has_window(config) and not unused


RULES: tuple[Rule, ...] = (
    _threshold("max_window_layers", lists=("layer_types",), applies=_has_window),
    Rule(
        {"first_k_dense_replace": 0, "moe_layer_freq": 1},
        _first_dense_label,
        _first_dense_solve,
        lists=("mlp_layer_types",),
        off=(False, False),
    ),
    Rule(
        {"layer_types": None},
        _unwritten_label,
        lambda values, wanted: iter(()),  # noqa: ARG005
        lists=("layer_types",),
        applies=_has_unwritten_kinds,
    ),
    _threshold("num_dense_layers", lists=("mlp_layer_types",)),
    _every("decoder_sparse_step", shifts=(1, -1)),
    _every("encoder_sparse_step", shifts=(1, -1)),
    _every("no_rope_layer_interval", lists=("no_rope_layers",)),
    _every("interleave_moe_layer_step", lists=("moe_layers",)),
    _every("full_attention_interval", lists=("layer_types",)),
    _every("global_attn_every_n_layers", shifts=(0, 1), lists=("layer_types",)),
    _every("cross_layer_interval", shifts=(0,)),
    _every("cross_attention_frequency", shifts=(0,)),
    _offset("attn_layer_period", "attn_layer_offset", 8, 4),
    _offset("expert_layer_period", "expert_layer_offset", 2, 1),
    Rule(
        {"moe_layer_start_index": 0, "moe_layer_end_index": -1, "moe_layer_interval": 1},
        _span_label,
        _span_solve,
    ),
    Rule(
        {"sliding_window_pattern": None, "_sliding_window_pattern": None},
        _window_label,
        _window_solve,
        lists=("layer_types",),
        applies=_has_window,
    ),
    _index_label("scale_attn_by_inverse_layer_idx"),
    _index_label("hidden_size_per_layer_input"),
)

UNWRITTEN: Mapping[str, tuple[int, int]] = {
    "gemma2": (2, 1),
    "gpt_oss": (2, 1),
    "minimax": (2, 1),
    "qwen2_moe": (2, 1),
    "t5_gemma_module": (2, 1),
    "vaultgemma": (2, 1),
    "olmo3": (4, 3),
    "olmo_hybrid": (4, 3),
    "cwm": (4, 0),
    "granite_swa": (4, 0),
    "granitemoe_swa": (4, 0),
    "gemma3n_text": (5, 4),
    "gemma4_text": (6, 5),
}
"""Period, and the layer of it that is of another kind, in model types that have no key for it:
programs go by it where a config has no `layer_types`."""

IMPLIED: Mapping[str, Mapping[str, Any]] = {
    **{kind: {"layer_types": place} for kind, place in UNWRITTEN.items()},
    "gemma3_text": {"sliding_window_pattern": 6},
    "cohere2": {"sliding_window_pattern": 4},
    "qwen3_next": {"full_attention_interval": 4},
    "llama4_text": {"no_rope_layer_interval": 4, "interleave_moe_layer_step": 1},
    "smollm3": {"no_rope_layer_interval": 4},
    "modernbert": {"global_attn_every_n_layers": 3},
}
"""Values that configs of some model types leave out, because they are the default."""
