"""What the card of a model of another structure says beside that of a merge."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence

from merge_kit.methods.registry import find, names
from merge_kit.plan.describe import plural
from merge_kit.plan.describe_orders import Orders, apart_line
from merge_kit.plan.describe_steps import layer_lines
from merge_kit.plan.values import Plan
from merge_kit.publish.markdown import code, table
from merge_kit.publish.recipes import recipe_methods

_RUNS = 40
"""Lines of the map of layers; the published stacks have up to 20."""

_BLOCKS = 24
"""Rows of the table of experts."""

_EXPERTS = 16
"""Experts of one row of it."""

_COUNTS = ("num_local_experts", "num_experts")
_TOP_K = "num_experts_per_tok"
_SIZES = ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads")
_WIDTHS = {"pad", "crop", "project"}
_MIXTURES = {"sparse_upcycle", "match_experts"}
_TRAINING = (
    "It was not trained after it was built. Such a model usually wants further training before it "
    "is better than what it was made of, even where it computes the same at first; what training "
    "brings is measured in docs/after_stacking.md of merge_kit."
)


def built_by(plan: Plan, recipe_text: str) -> tuple[str, ...]:
    """Return the methods of a recipe that build another structure, `slices` for a stack."""
    known = set(names())
    methods = [one for one in recipe_methods(recipe_text) if one in known]
    built = [one for one in methods if find(one).makes == "structure"]
    stacked = ["slices"] if not built and _is_stacked(plan) else []
    return tuple(dict.fromkeys([*built, *stacked]))


def _is_stacked(plan: Plan) -> bool:
    """Return whether layers were moved, repeated or left out, not only merged in their places."""
    moved = any(layer != one.layer for one in plan.layer_map for _, layer in one.sources)
    depths = _depths(plan)
    used = {key for one in plan.layer_map for key, _ in one.sources}
    return moved or any(depths.get(key, plan.layers) != plan.layers for key in used)


def built_tags(built: Sequence[str], plan: Plan) -> list[str]:
    """Return the tags by which such models are looked for."""
    tags = ["frankenmerge"] if "slices" in built else []
    return [*tags, "moe"] if _MIXTURES & set(built) and _config(plan, _COUNTS) else tags


def built_lines(built: Sequence[str], plan: Plan) -> list[str]:
    """Return what was built, and that it wants training; nothing of a model that was not built."""
    found = list(_built(set(built), plan)) if built else []
    return ["", f"{' '.join(found)} {_TRAINING}"] if found else []


def _built(built: set[str], plan: Plan) -> Iterator[str]:
    if built & {"slices", "depth_upscale"} and plan.layers is not None:
        yield _layers(plan)
    if built & _MIXTURES and (count := _config(plan, _COUNTS)):
        top_k = _config(plan, (_TOP_K,)).get(_TOP_K)
        share = f"{top_k} of " if top_k is not None else ""
        experts = next(iter(count.values()))
        yield f"In its layers of experts, a router sends each token through {share}{experts} MLPs."
    if "moe_to_dense" in built:
        yield "Its MLPs are experts of a mixture, or means of them."
    if built & _WIDTHS and (sizes := _config(plan, _SIZES)):
        named = ", ".join(f"{key} {size}" for key, size in sizes.items())
        methods = " and ".join(sorted(built & _WIDTHS))
        yield f"Sizes of what it was made of were changed by {methods}: it has {named}."


def _layers(plan: Plan) -> str:
    """Return how many layers were built of models of how many."""
    used = {key for one in plan.layer_map for key, _ in one.sources}
    known = [depth for key, depth in _depths(plan).items() if key in used]
    depths = " and ".join(f"{depth:,}" for depth in dict.fromkeys(known))
    noun = "a model" if len(used) == 1 else "models"
    of = f" come from {noun} of {depths}" if depths else " were built of other models"
    return f"Its {plural(plan.layers or 0, 'layer')}{of}; the map below says which from where."


def _depths(plan: Plan) -> dict[str, int]:
    """Return how many layers each input has in the first stack that was built."""
    lead = f"{plan.layer_map[0].stack}." if plan.layer_map else ""
    depths: dict[str, int] = {}
    for fate in plan.fates if lead else ():
        number = fate.tensor.removeprefix(lead).partition(".")[0]
        if fate.tensor.startswith(lead) and number.isdecimal():
            depths[fate.model] = max(depths.get(fate.model, 0), int(number) + 1)
    return depths


def _config(plan: Plan, keys: Sequence[str]) -> dict[str, int]:
    """Return whole numbers of the config.json that is written."""
    text = next((f.text for f in plan.side_files if f.name == "config.json" and f.text), "{}")
    values = json.loads(text)
    inner = values.get("text_config")
    values |= inner if isinstance(inner, dict) else {}
    return {key: values[key] for key in keys if isinstance(values.get(key), int)}


def _is_fed(plan: Plan) -> bool:
    """Return whether a stage that feeds the output moves layers."""
    return any(stage.origins for stage in plan.stage_layers)


def layer_map(plan: Plan) -> list[str]:
    """Return the layers' origins in ranges, where layers were built, the first of many."""
    lines = layer_lines(plan) if plan.layer_map or _is_fed(plan) else []
    more = len(lines) - _RUNS
    shown = [f"- {code(line)}" for line in lines[:_RUNS]]
    return [*shown, *([f"- and {more:,} more; the recipe has them all"] if more > 0 else [])]


def order_table(orders: Orders) -> list[str]:
    """Return which expert was matched with which, one row a block, the first of many."""
    if not orders:
        return []
    rows = [
        [code(where), _experts([e for e, _ in pairs]), apart_line([apart for _, apart in pairs])]
        for where, pairs in list(orders.items())[:_BLOCKS]
    ]
    more = len(orders) - _BLOCKS
    said = (
        "Experts were put in another order: the first number is that of the expert that fits the "
        "reference's expert 0 best, and so on. Apart is how far matched experts differ, by their "
        "length."
    )
    return [
        said,
        "",
        *table(["experts of", "in the order", "apart"], rows),
        *(["", f"And {more:,} more, in the record beside this card."] if more > 0 else []),
    ]


def _experts(order: Sequence[int]) -> str:
    shown = ", ".join(map(str, order[:_EXPERTS]))
    more = len(order) - _EXPERTS
    return f"{shown} and {more:,} more" if more > 0 else shown
