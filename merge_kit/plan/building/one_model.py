"""The one model of a stage that builds another structure of it."""

from __future__ import annotations

from merge_kit.errors import PlanError
from merge_kit.plan.building.built import Site
from merge_kit.plan.models import Model
from merge_kit.recipe.values import ModelRef


def only_model(site: Site) -> tuple[ModelRef, Model]:
    """Return the one model of a stage, under `models:` or as base_model.

    Raises:
        PlanError: If there is none, if there are several, or if it is an adapter alone.
    """
    stage = site.stage
    refs = [entry.model for entry in stage.models]
    if not refs and stage.base_model is not None:
        refs = [stage.base_model]
    elif stage.base_model is not None and stage.base_model not in refs:
        refs.append(stage.base_model)
    if len(refs) != 1:
        shown = f": {', '.join(ref.text for ref in refs)}" if refs else ""
        raise PlanError(
            f"{stage.merge_method} takes one model, found {len(refs)}{shown}",
            where=str(stage.mark),
            hint="name it under models:; base_model is not needed",
        )
    return refs[0], whole_model(site, refs[0])


def whole_model(site: Site, ref: ModelRef) -> Model:
    """Return the model of a reference.

    Raises:
        PlanError: If it is an adapter alone.
    """
    model = site.inputs.find(ref)
    if model.adapter is not None:
        raise PlanError(
            f"{model.label} is an adapter, and {site.stage.merge_method} takes models",
            where=str(ref.mark),
            hint=f"write MODEL+{ref.text}, with the model that it was made for",
        )
    for note in model.overlay.notes if model.overlay is not None else ():
        site.findings.note(note)
    return model
