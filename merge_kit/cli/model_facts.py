"""What is known of a checkpoint without reading a weight, and how two of them differ."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from merge_kit.architecture.sections import main_section
from merge_kit.architecture.stacks import Stack
from merge_kit.architecture.ties import embedding_for, head_name, is_tied
from merge_kit.core.tensors import TensorSpec
from merge_kit.io.values import Checkpoint
from merge_kit.plan.models import from_checkpoint

Specs = Mapping[str, TensorSpec]


@dataclass(frozen=True, slots=True)
class Facts:
    """What a checkpoint holds.

    Attributes:
        architecture: `model_type` of config.json, or "".
        classes: `architectures` of config.json.
        tensors: By name with the component's folder in front ("unet/conv.weight").
        shards: Component's folder ("" for the root) and names of its weight files.
        described: The stack whose length config.json holds, or None.
        head: The output head that is stored, or None.
        embedding: The embedding that would stand in for a head, or None.
        tied: Whether config.json ties the head to the embedding; None without one.
        vocabulary: `vocab_size` of config.json, or None.
    """

    name: str
    is_file: bool
    architecture: str
    classes: tuple[str, ...]
    tensors: Specs
    shards: tuple[tuple[str, tuple[str, ...]], ...]
    stacks: tuple[Stack, ...]
    described: Stack | None
    head: str | None
    embedding: str | None
    tied: bool | None
    vocabulary: int | None
    side_files: tuple[str, ...]
    left_out: Mapping[str, str]
    warnings: tuple[str, ...]

    @property
    def parameters(self) -> int:
        return sum(spec.numel for spec in self.tensors.values())

    @property
    def nbytes(self) -> int:
        return sum(spec.nbytes for spec in self.tensors.values())

    @property
    def dtypes(self) -> Mapping[str, int]:
        return dict(sorted(Counter(spec.dtype for spec in self.tensors.values()).items()))

    def layer_texts(self) -> list[str]:
        """Return a text for each stack, the described one first."""
        ordered = sorted(self.stacks, key=lambda stack: stack != self.described)
        return [self._stack_text(stack) for stack in ordered] or ["none"]

    def _stack_text(self, stack: Stack) -> str:
        numbered = f" numbered to {stack.count - 1}" if stack.count > len(stack.layers) else ""
        place = f" in {stack.prefix}" if stack.prefix else ""
        own = ", as config.json says" if stack == self.described and self.architecture else ""
        return f"{len(stack.layers):,}{numbered}{place}{own}"

    def head_text(self) -> str:
        """Return what is known of the output head, "" if there is no sign of one."""
        if self.head is not None:
            tied = ", stored although config.json ties it to the embedding" if self.tied else ""
            return self.head + tied
        return f"tied to {self.embedding}" if self.tied and self.embedding else ""

    def as_json(self, *, tensors: bool) -> dict[str, Any]:
        """Return the facts as values that `json.dumps` takes."""
        facts: dict[str, Any] = {
            "name": self.name,
            "is_file": self.is_file,
            "architecture": self.architecture,
            "classes": list(self.classes),
            "tensor_count": len(self.tensors),
            "parameters": self.parameters,
            "nbytes": self.nbytes,
            "dtypes": self.dtypes,
            "components": [{"path": path, "files": list(files)} for path, files in self.shards],
            "stacks": [{"prefix": s.prefix, "layers": list(s.layers)} for s in self.stacks],
            "layers": None if self.described is None else len(self.described.layers),
            "head": self.head,
            "embedding": self.embedding,
            "tied": self.tied,
            "vocabulary": self.vocabulary,
            "side_files": list(self.side_files),
            "left_out": dict(self.left_out),
            "warnings": list(self.warnings),
        }
        listed = [{"name": name} | _spec_json(spec) for name, spec in self.tensors.items()]
        return facts | {"tensors": listed} if tensors else facts


@dataclass(frozen=True, slots=True)
class Difference:
    """How the tensors of two checkpoints differ.

    Attributes:
        changed: Name, and what it is in the first and in the second.
        same: How many have the same name, dtype and shape.
    """

    only_first: tuple[str, ...]
    only_second: tuple[str, ...]
    changed: tuple[tuple[str, TensorSpec, TensorSpec], ...]
    same: int

    def as_json(self) -> dict[str, Any]:
        """Return the difference as values that `json.dumps` takes."""
        changed = [
            {"name": name, "first": _spec_json(first), "second": _spec_json(second)}
            for name, first, second in self.changed
        ]
        return {
            "only_first": list(self.only_first),
            "only_second": list(self.only_second),
            "changed": changed,
            "same": self.same,
        }


def facts_of(checkpoint: Checkpoint) -> Facts:
    """Return what a checkpoint holds.

    Raises:
        CheckpointError: If its config.json is broken.
    """
    model = from_checkpoint("model", checkpoint)
    config = model.config or {}
    section = main_section(config) if config else None
    head = head_name(model.specs)
    vocabulary = (section.config if section else config).get("vocab_size")
    return Facts(
        name=checkpoint.name,
        is_file=checkpoint.is_file,
        architecture=str(config.get("model_type", "")),
        classes=tuple(str(name) for name in _listed(config.get("architectures"))),
        tensors=model.specs,
        shards=tuple((c.path, tuple(f.name for f in c.files)) for c in checkpoint.components),
        stacks=model.stacks,
        described=model.described,
        head=head,
        embedding=embedding_for(head or "lm_head.weight", model.specs),
        tied=is_tied(model.config),
        vocabulary=vocabulary if isinstance(vocabulary, int) else None,
        side_files=checkpoint.side_files,
        left_out=checkpoint.left_out,
        warnings=checkpoint.warnings,
    )


def difference(first: Specs, second: Specs) -> Difference:
    """Return how two sets of tensors differ in names, dtypes and shapes."""
    shared = [name for name in first if name in second]
    changed = tuple(
        (name, first[name], second[name])
        for name in shared
        if (first[name].dtype, first[name].shape) != (second[name].dtype, second[name].shape)
    )
    return Difference(
        only_first=tuple(name for name in first if name not in second),
        only_second=tuple(name for name in second if name not in first),
        changed=changed,
        same=len(shared) - len(changed),
    )


def _listed(value: object) -> list[object]:
    return value if isinstance(value, list) else []


def _spec_json(spec: TensorSpec) -> dict[str, Any]:
    return {"dtype": spec.dtype, "shape": list(spec.shape)}
