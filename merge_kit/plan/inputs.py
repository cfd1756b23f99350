"""Opens what a recipe refers to: each model once, every problem in one list."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from merge_kit.core.names import HUB_ID, nearest
from merge_kit.errors import CheckpointError, MergeKitError, PlanError
from merge_kit.io.adapter import is_adapter, open_adapter
from merge_kit.io.checkpoint import open_checkpoint
from merge_kit.io.strict_json import shown
from merge_kit.methods.registry import find as find_method
from merge_kit.plan.applying.applied import apply_adapters
from merge_kit.plan.models import Model, from_adapter, from_checkpoint
from merge_kit.plan.values import PlanInput
from merge_kit.recipe.references import adapter_reference
from merge_kit.recipe.stages import entries, references
from merge_kit.recipe.values import ModelRef, Recipe, Stage


def listed(stage: Stage) -> Iterator[ModelRef]:
    """Yield every model that a stage names, those in lists first; repeats included."""
    yield from (entry.model for entry in entries(stage))
    yield from references(stage)


def locate(ref: ModelRef, folder: Path | None) -> Path:
    """Return the path that a reference means: beside the recipe, then in the working directory.

    Raises:
        MergeKitError: If there is none.
    """
    try:
        for base in (folder, Path()):
            if base is not None and (base / ref.path).expanduser().exists():
                return (base / ref.path).expanduser()
    except (OSError, RuntimeError) as exc:  # too long, not readable, the home of nobody
        reason = exc.strerror if isinstance(exc, OSError) else exc
        problem = f"cannot look up {shown(ref.path)}: {reason}"
        raise CheckpointError(problem, where=str(ref.mark), hint="check the path") from exc
    looked = f"beside the recipe ({folder}) and " if folder is not None else ""
    hint = f"looked {looked}in the working directory"
    close = _close(ref.path, folder)
    if close:
        hint = f"{close} ({hint})"
    elif HUB_ID.fullmatch(ref.path):
        hint += "; a model of the Hub must be downloaded first: "
        hint += f"hf download {ref.path} --local-dir DIR"
    problem = f"no folder or file {shown(ref.path)}"
    raise CheckpointError(problem, where=str(ref.mark), hint=hint)


def _close(path: str, folder: Path | None) -> str:
    """Return `did you mean ...?` if something of nearly this name lies where the path leads."""
    above, name = Path(path).parent, Path(path).name
    for base in (folder, Path()):
        try:
            names = [one.name for one in (base / above).iterdir()] if base is not None else []
        except (OSError, ValueError):
            continue
        found = nearest(name, names)
        if found.startswith("did"):
            near = found.removeprefix("did you mean '").removesuffix("'?")
            return f"did you mean {str(above / near)!r}?"
    return ""


def _text(ref: ModelRef) -> str:
    """Return a reference as it was written, without its adapters."""
    if not ref.adapters:
        return ref.text
    return f"{ref.path}@{ref.revision}" if ref.revision else ref.path


class Inputs:
    """The models and adapters of a recipe by path, stages by name.

    Attributes:
        errors: What could not be opened or applied.
        refs: How the recipe refers to each checkpoint first, by key, without adapters.
        donors: The model whose files the result of a stage takes, by the stage's name.
    """

    def __init__(self, recipe: Recipe) -> None:
        self.errors: list[MergeKitError] = []
        self._folder = recipe.folder
        self._stages = {stage.name for stage in recipe.stages[:-1] if stage.name}
        self._by_path: dict[tuple[Path, bool], Model] = {}
        self._by_ref: dict[tuple[str, str | None, bool], Model] = {}
        self._made: dict[str, Model] = {}
        self._broken: set[tuple[str, str | None, bool]] = set()
        self.refs: dict[str, ModelRef] = {}
        self.donors: dict[str, Model] = {}
        for stage in recipe.stages:
            for ref in listed(stage):
                self._open(ref)
        for stage in recipe.stages:
            self._apply(stage)

    @property
    def models(self) -> list[Model]:
        """The checkpoints and adapters, in the order of the recipe."""
        return list(self._by_path.values())

    def _open(self, ref: ModelRef) -> None:
        if ref.path not in self._stages:
            alone = replace(ref, adapters=(), weights=(), text=_text(ref))
            self._open_one(alone, wants_adapter=False)
        for adapter, _ in self._adapters(ref):
            self._open_one(adapter, wants_adapter=True)

    def _adapters(self, ref: ModelRef) -> Iterator[tuple[ModelRef, float]]:
        """Yield the adapters of a reference, each as a reference of its own with its weight."""
        for text, weight in ref.applied():
            yield adapter_reference(text, self._folder, ref.mark), weight

    def _open_one(self, ref: ModelRef, *, wants_adapter: bool) -> None:
        key = ref.path, ref.revision, wants_adapter
        if key in self._by_ref or key in self._broken:
            return
        try:
            path = locate(ref, self._folder)
            adapts = wants_adapter or is_adapter(path)
            real = path.resolve(), adapts
            if real not in self._by_path:
                name = f"input-{len(self._by_path) + 1}"
                self._by_path[real] = (
                    from_adapter(name, open_adapter(path))
                    if adapts
                    else from_checkpoint(name, open_checkpoint(path))
                )
                self.refs[name] = ref
            self._by_ref[key] = self._by_path[real]
        except MergeKitError as error:
            self._broken.add(key)
            self.errors.append(error)

    def _is_at_hand(self, ref: ModelRef) -> bool:
        """Return whether a model and its adapters could be opened."""
        adapters = [adapter for adapter, _ in self._adapters(ref)]
        keys = [(ref.path, ref.revision, False), *((a.path, a.revision, True) for a in adapters)]
        return all(key in self._by_ref for key in keys)

    def _apply(self, stage: Stage) -> None:
        """Apply adapters to models that are there already, to find everything that is wrong."""
        base, merges = stage.base_model, find_method(stage.merge_method).makes == "model"
        for ref in listed(stage):
            if not self._is_at_hand(ref):
                continue
            try:
                if ref.adapters:
                    self.find(ref)
                elif merges and base is not None and self._is_at_hand(base):
                    self.under(ref, base)
            except MergeKitError as error:
                if str(error) not in map(str, self.errors):
                    self.errors.append(error)

    def add_stage(self, model: Model) -> None:
        """Make a stage's result known under its name."""
        self._made[model.key] = model

    def find(self, ref: ModelRef) -> Model:
        """Return the model of a reference, with its adapters applied; or an adapter alone.

        Raises:
            MergeKitError: If a stage is referred to that could not be planned, or an adapter does
                not fit.
        """
        model = self._made.get(ref.path) or self._by_ref.get((ref.path, ref.revision, False))
        if model is None:
            hint = nearest(ref.path, [*self._stages, *self._made])
            raise PlanError(f"no model {ref.text!r}", where=str(ref.mark), hint=hint)
        if not ref.adapters:
            return model
        if model.adapter is not None:
            raise PlanError(
                f"{ref.text!r} begins with an adapter",
                where=str(ref.mark),
                hint=f"write MODEL+{ref.text}",
            )
        return apply_adapters(model, [(self._adapter(r), w) for r, w in self._adapters(ref)])

    def _adapter(self, ref: ModelRef) -> Model:
        found = self._by_ref.get((ref.path, ref.revision, True))
        if found is None:
            raise PlanError(f"no adapter {ref.text!r}", where=str(ref.mark))
        return found

    def under(self, ref: ModelRef, base: ModelRef) -> Model:
        """Return the model of a reference; of an adapter alone, the base with it applied.

        Raises:
            MergeKitError: If it does not fit, or the base is an adapter too.
        """
        found = self.find(ref)
        if found.adapter is None:
            return found
        model = self.find(base)
        if model.adapter is not None:
            raise PlanError(
                f"the base model {model.label} is an adapter",
                where=str(base.mark),
                hint=f"write MODEL+{base.text}, with the model that it was made for",
            )
        return apply_adapters(model, [(found, 1.0)])

    def as_values(self, base: Model | None) -> tuple[PlanInput, ...]:
        """Return the inputs as the plan shows them."""
        if base is not None and base.overlay is not None:
            base = base.overlay.under
        rows = []
        for model in self.models:
            checkpoint = model.checkpoint
            assert checkpoint is not None
            rows.append(
                PlanInput(
                    key=model.key,
                    name=checkpoint.name,
                    text=self.refs[model.key].text,
                    root=checkpoint.root,
                    files=tuple(f for c in checkpoint.components for f in c.files),
                    is_base=model is base,
                )
            )
        return tuple(rows)
