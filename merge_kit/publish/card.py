"""README.md: the model card of a merge."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator, Mapping, Sequence

import yaml

from merge_kit.core.names import HUB_ID
from merge_kit.core.sizes import format_count, format_size
from merge_kit.methods.registry import find
from merge_kit.plan.describe import counts_line, dropped_by_reason, merged_by_method, plural
from merge_kit.plan.describe_orders import Orders
from merge_kit.plan.values import Plan, PlanInput
from merge_kit.publish.adapter_card import adapter_bases, is_adapter, rank_lines
from merge_kit.publish.built_card import (
    built_by,
    built_lines,
    built_tags,
    layer_map,
    order_table,
)
from merge_kit.publish.markdown import code, fence, plain, prose, table
from merge_kit.publish.recipes import portable_recipe
from merge_kit.publish.references import without_homes
from merge_kit.publish.staging import MANIFEST

_SHOWN = 5
"""Names that are listed before `and 12 more`."""

_SOURCE = re.compile(r"^Source:(.*(?:\n[ \t]+\S.*)*)", re.MULTILINE)


def model_card(
    plan: Plan,
    *,
    recipe_text: str,
    nonfinite: Mapping[str, int],
    facts: Mapping[str, Mapping[str, float]] | None = None,
    orders: Orders | None = None,
) -> str:
    """Return the text of the card: front matter, then what was merged and how.

    Args:
        recipe_text: The recipe as YAML; paths in it are replaced.
        nonfinite: NaN and infinities that were written, by the tensor's key.
        facts: See `Report.facts`.
        orders: See `Report.orders`.
    """
    built = built_by(plan, recipe_text)
    noun = "adapter" if is_adapter(plan) and not _has_base(plan) else "model"
    lines = [
        *_front_matter(plan, built_tags(built, plan)),
        "",
        f"# Merge of {_listed([_name(model) for model in plan.inputs])}",
        "",
        f"Made by merge_kit from {plural(len(plan.inputs), noun)}, without training.",
        *built_lines(built, plan),
        *_section("Method", _method(plan)),
        *_section("Models", _models(plan)),
        *_section("Layers", layer_map(plan)),
        *_section("Experts", order_table(orders or {})),
        *_section("Recipe", _recipe(plan, recipe_text)),
        *_section("Ranks", rank_lines(plan, facts or {}) if is_adapter(plan) else []),
        *_section("Result", [f"- {line}" for line in _result(plan, nonfinite)]),
    ]
    return "\n".join(lines) + "\n"


def _front_matter(plan: Plan, more: Sequence[str]) -> list[str]:
    bases = [m.hub_id for m in plan.inputs if m.hub_id and HUB_ID.fullmatch(m.hub_id)]
    adapter = is_adapter(plan)
    if adapter:
        bases = adapter_bases(plan)
    entries: dict[str, str | list[str]] = {}
    if bases:
        entries["base_model"] = list(dict.fromkeys(bases))
    if bases or not adapter:
        entries["base_model_relation"] = "adapter" if adapter else "merge"
    if adapter:
        entries["library_name"] = "peft"
    elif plan.architecture:  # `model_type` of config.json, which transformers goes by
        entries["library_name"] = "transformers"
    tags = ["lora"] if adapter else []
    entries["tags"] = list(dict.fromkeys([*tags, "merge", "merge_kit", plan.method, *more]))
    text: str = yaml.safe_dump(entries, sort_keys=False, allow_unicode=True)
    return ["---", *text.rstrip("\n").split("\n"), "---"]


def _has_base(plan: Plan) -> bool:
    return any(model.is_base for model in plan.inputs)


def _section(title: str, lines: Sequence[str]) -> list[str]:
    return ["", f"## {title}", "", *lines] if lines else []


def _name(model: PlanInput) -> str:
    return model.hub_id or model.name


def _method(plan: Plan) -> list[str]:
    text = inspect.cleandoc(find(plan.method).__doc__ or "")
    summary, source = text.partition("\n")[0], _SOURCE.search(text)
    lines = [f"{code(plan.method)}: {prose(summary)} Seed {plan.seed}."]
    return [*lines, "", f"Source: {prose(source[1])}"] if source else lines


def _models(plan: Plan) -> list[str]:
    rows = [
        [
            code(model.key),
            _linked(model),
            code(model.revision) if model.revision else "",
            "base" if model.is_base else "",
            format_size(sum(file.nbytes for file in model.files)),
        ]
        for model in plan.inputs
    ]
    return table(["key", "model", "revision", "role", "weights"], rows)


def _linked(model: PlanInput) -> str:
    if model.hub_id and HUB_ID.fullmatch(model.hub_id):
        return f"[{plain(model.hub_id)}](https://huggingface.co/{model.hub_id})"
    return code(_name(model))


def _recipe(plan: Plan, recipe_text: str) -> list[str]:
    lines = fence(portable_recipe(recipe_text, plan.read), "yaml")
    if all(model.hub_id for model in plan.inputs):
        return lines
    return [*lines, "", "Models that lay on a disk stand there as `key:name`, without their path."]


def _result(plan: Plan, nonfinite: Mapping[str, int]) -> Iterator[str]:
    known = [plain(plan.architecture)] if plan.architecture else []
    if plan.layers is not None:
        known.append(plural(plan.layers, "layer"))
    yield ", ".join([*known, f"{format_count(plan.parameters)} parameters"])
    yield f"dtypes: {', '.join(f'{name} {count:,}' for name, count in plan.dtypes) or 'none'}"
    yield counts_line(plan)
    for method, count in merged_by_method(plan).items():
        yield f"merged by {code(method)}: {count:,}"
    for why, names in dropped_by_reason(plan).items():
        reason = f" ({plain(without_homes(why))})" if why else ""
        yield f"left out{reason}: {_listed(names)}"
    if nonfinite:
        total = sum(nonfinite.values())
        yield f"**{total:,} values are NaN or infinite**, in {_listed(sorted(nonfinite))}"
    yield f"the hash of every tensor is in {code(MANIFEST)}; `mergekit verify` compares"


def _listed(names: Sequence[str]) -> str:
    """Return the first names as code, and how many more there are."""
    items = [code(name) for name in names[:_SHOWN]]
    if len(names) > _SHOWN:
        items.append(f"{len(names) - _SHOWN:,} more")
    return " and ".join([", ".join(items[:-1]), items[-1]] if len(items) > 1 else items)
