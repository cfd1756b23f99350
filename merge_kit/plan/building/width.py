"""pad, crop and project: a model at other sizes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from merge_kit.architecture.config import Edit, edit_config
from merge_kit.errors import PlanError
from merge_kit.methods.project import Project
from merge_kit.methods.structures import StructureMethod
from merge_kit.methods.widths import WidthMethod
from merge_kit.plan.assemble import Assembly
from merge_kit.plan.building.built import Built, Site
from merge_kit.plan.building.one_model import whole_model
from merge_kit.plan.building.width_basis import Basis, given_basis, svd_basis
from merge_kit.plan.building.width_sizes import Widths, check, widths_of
from merge_kit.plan.building.width_sources import Resizer
from merge_kit.plan.building.width_tensors import Maker, below
from merge_kit.plan.configs import result_parts
from merge_kit.plan.models import Model
from merge_kit.recipe.values import ModelRef


def build(site: Site, method: StructureMethod) -> Built:
    """Return a model at other sizes."""
    assert isinstance(method, WidthMethod)
    ref, model, like = _models(site)
    widths = widths_of(site, method, model, like)
    basis = None
    if isinstance(method, Project):
        basis, widths = _basis(site, method, model, widths)
    check(site, method, model, widths)
    site.findings.raise_any()
    maker = Maker(site, ref, model, Resizer(widths, basis))
    made = maker.tensors()
    site.findings.raise_any()
    _note(site, method, widths)
    assembly = Assembly(site.stage, model, None, left_out=maker.left_out)
    assembly.items = [one.item for one in made]
    if like is not None:
        lender = below(like)
        for name in lender.tensors:
            assembly.left_out.setdefault((lender, name), f"{lender.label} lends its sizes only")
    parts = tuple(
        replace(part, config_text=_config(part.config_text, model, widths))
        if part.path == model.main.path and part.config_text is not None
        else part
        for part in result_parts(assembly, made)
    )
    return Built(assembly, tuple(made), parts, () if basis is None else (basis.artefact,))


def _models(site: Site) -> tuple[ModelRef, Model, Model | None]:
    """Return the model, and the one that lends its sizes.

    Raises:
        PlanError: If there is not one model.
    """
    stage = site.stage
    if len(stage.models) != 1:
        raise PlanError(
            f"{stage.merge_method} takes one model under models:, found {len(stage.models)}",
            where=str(stage.mark),
            hint="a base_model only lends the sizes to reach",
        )
    ref = stage.models[0].model
    like = None if stage.base_model is None else whole_model(site, stage.base_model)
    return ref, whole_model(site, ref), like


def _basis(
    site: Site, method: Project, model: Model, widths: Widths
) -> tuple[Basis | None, Widths]:
    """Return the basis, None where the architecture has no use for it, and where it leads."""
    if "hidden_size" in widths.family.refused:
        why = widths.family.refused["hidden_size"]
        problem = f"{model.label} cannot be projected: {why}"
        hint = "pad and crop can change its intermediate_size"
        site.findings.problem(PlanError(problem, where=str(site.stage.mark), hint=hint))
        return None, widths
    old, new = widths.old, widths.new
    if method.basis == "svd":
        return svd_basis(site, model, new.hidden_size), widths
    setting = site.stage.parameters.get("basis")
    mark = site.stage.mark if setting is None else setting.mark
    told = "hidden_size" in widths.asked or new.hidden_size != old.hidden_size
    told = told or site.stage.base_model is not None
    wanted = new.hidden_size if told else None
    basis, hidden = given_basis(site, method.basis, mark, old.hidden_size, wanted)
    return basis, replace(widths, new=replace(new, hidden_size=hidden))


def _config(text: str, model: Model, widths: Widths) -> str:
    """Return the config with its new sizes."""
    return edit_config(text, list(_edits(model, widths)), f"{model.label}/config.json")


def _edits(model: Model, widths: Widths) -> Iterator[Edit]:
    config, family, new = model.config or {}, widths.family, widths.new
    changed = widths.changed()
    for kind in changed:
        yield Edit((family.key(kind),), new.of(kind))
    if "hidden_size" in changed:
        stated_eps = config.get("rms_norm_eps")
        eps = float(stated_eps) if isinstance(stated_eps, int | float) else family.rms_norm_eps
        yield Edit(("rms_norm_eps",), eps * (widths.old.hidden_size / new.hidden_size))
    stated = config.get("head_dim") is not None or not family.implicit_head_dim
    told = new.hidden_size // new.num_attention_heads == new.head_dim
    if {"hidden_size", "num_attention_heads"} & set(changed) and not stated and not told:
        yield Edit(("head_dim",), new.head_dim)


def _note(site: Site, method: WidthMethod, widths: Widths) -> None:
    """Say what is lost, and by which rules sizes change."""
    for kind in widths.changed():
        old, new = widths.old.of(kind), widths.new.of(kind)
        by_basis = isinstance(method, Project) and kind == "hidden_size"
        if by_basis and new < old:
            site.findings.note(
                f"{kind} {old} to {new}: hidden states are projected on {new} directions, and what "
                "lies in the others is lost"
            )
        elif new < old:
            site.findings.note(
                f"{kind} {old} to {new}: the first are kept; unless the others are zeros, as pad "
                "leaves them, the model computes something else"
            )
        elif isinstance(method, Project) and not by_basis:
            site.findings.note(f"{kind} {old} to {new}: padded with zeros, as by pad")
