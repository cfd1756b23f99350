"""Opens what a recipe refers to: each model once, every problem in one list."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from merge_kit.core.names import nearest
from merge_kit.errors import CheckpointError, MergeKitError, PlanError
from merge_kit.io.checkpoint import open_checkpoint
from merge_kit.io.strict_json import shown
from merge_kit.plan.models import Model, from_checkpoint
from merge_kit.plan.values import PlanInput
from merge_kit.recipe.stages import entries, references
from merge_kit.recipe.values import ModelRef, Recipe, Stage

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?", re.ASCII)


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
    if _HUB_ID.fullmatch(ref.path):
        hint += "; a model of the Hub must be downloaded first: "
        hint += f"hf download {ref.path} --local-dir DIR"
    problem = f"no folder or file {shown(ref.path)}"
    raise CheckpointError(problem, where=str(ref.mark), hint=hint)


class Inputs:
    """The models of a recipe: checkpoints by path, stages by name.

    Attributes:
        errors: What could not be opened.
        refs: How the recipe refers to each checkpoint first, by key.
        donors: The model whose files the result of a stage takes, by the stage's name.
    """

    def __init__(self, recipe: Recipe) -> None:
        self.errors: list[MergeKitError] = []
        self._folder = recipe.folder
        self._stages = {stage.name for stage in recipe.stages[:-1] if stage.name}
        self._by_path: dict[Path, Model] = {}
        self._by_ref: dict[tuple[str, str | None, tuple[str, ...]], Model] = {}
        self._made: dict[str, Model] = {}
        self._broken: set[str] = set()
        self.refs: dict[str, ModelRef] = {}
        self.donors: dict[str, Model] = {}
        for stage in recipe.stages:
            for ref in listed(stage):
                self._open(ref)

    @property
    def models(self) -> list[Model]:
        """The checkpoints, in the order of the recipe."""
        return list(self._by_path.values())

    def _open(self, ref: ModelRef) -> None:
        if ref.path in self._stages or ref.path in self._broken or self._key(ref) in self._by_ref:
            return
        try:
            if ref.adapters:
                raise PlanError(
                    f"{ref.text!r} names an adapter, and adapters cannot be applied yet",
                    where=str(ref.mark),
                    hint="merge it into its base with peft's merge_and_unload first",
                )
            path = locate(ref, self._folder)
            real = path.resolve()
            if real not in self._by_path:
                key = f"input-{len(self._by_path) + 1}"
                self._by_path[real] = from_checkpoint(key, open_checkpoint(path))
                self.refs[key] = ref
            self._by_ref[self._key(ref)] = self._by_path[real]
        except MergeKitError as error:
            self._broken.add(ref.path)
            self.errors.append(error)

    @staticmethod
    def _key(ref: ModelRef) -> tuple[str, str | None, tuple[str, ...]]:
        return ref.path, ref.revision, ref.adapters

    def add_stage(self, model: Model) -> None:
        """Make a stage's result known under its name."""
        self._made[model.key] = model

    def find(self, ref: ModelRef) -> Model:
        """Return the model of a reference.

        Raises:
            PlanError: If a stage is referred to that could not be planned.
        """
        if ref.path in self._made:
            return self._made[ref.path]
        found = self._by_ref.get(self._key(ref))
        if found is None:
            hint = nearest(ref.path, [*self._stages, *self._made])
            raise PlanError(f"no model {ref.text!r}", where=str(ref.mark), hint=hint)
        return found

    def as_values(self, base: Model | None) -> tuple[PlanInput, ...]:
        """Return the inputs as the plan shows them."""
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
