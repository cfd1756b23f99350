"""Output tensors of a built model: copies under another name, and tensors of any source."""

from __future__ import annotations

from merge_kit.plan.building.built import Site
from merge_kit.plan.items import Item, Part
from merge_kit.plan.models import Model
from merge_kit.plan.sources import Source
from merge_kit.plan.steps import Made
from merge_kit.recipe.values import NO_PARAMETERS, Entry, ModelRef


def part_of(model: Model, tensor: str, ref: ModelRef, *, is_base: bool = False) -> Part:
    """Return a tensor of a model as a part of an output tensor.

    Args:
        ref: How the recipe refers to the model.
    """
    return Part(Entry(ref, NO_PARAMETERS, ref.mark), model, tensor, is_base)


def copied(site: Site, name: str, part: Part, *, component: str = "", note: str = "") -> Made:
    """Return an output tensor that is one of a model, in the stage's dtype if it names one."""
    return site.maker.make(_item(site, name, (part,), component, note))


def made_of(
    site: Site,
    name: str,
    source: Source,
    dtype: str,
    parts: tuple[Part, ...] = (),
    *,
    component: str = "",
    note: str = "",
) -> Made:
    """Return an output tensor that is read from a source, in the stage's dtype or else in `dtype`.

    Args:
        parts: The tensors of models that become part of it, for the accounting.
    """
    return site.maker.of_source(_item(site, name, parts, component, note), source, dtype)


def _item(site: Site, name: str, parts: tuple[Part, ...], component: str, note: str) -> Item:
    mark = site.stage.mark
    return Item(name, component, parts, (), 0.0, "passthrough", mark, "merge", note)
