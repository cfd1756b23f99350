"""Models at hand: the tensors of a checkpoint on disk, of a mapping, or of a module."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from merge_kit.api.forming import formed, is_at_hand
from merge_kit.api.overlays import Composed
from merge_kit.api.places import place_of
from merge_kit.core.names import nearest
from merge_kit.core.tensors import TensorSpec
from merge_kit.errors import UsageError
from merge_kit.io.adapter import is_adapter, open_adapter
from merge_kit.io.checkpoint import open_checkpoint
from merge_kit.io.reader import Reader
from merge_kit.io.values import WeightFile
from merge_kit.plan.models import Held, Model, Part, from_adapter, from_checkpoint

if TYPE_CHECKING:
    from torch import Tensor
    from torch.nn import Module


class HeldModel:
    """A model by its tensors, which are read when they are asked for.

    Args:
        source: A path (that of an adapter too: its tensors are the factors), or a mapping of
            tensors, which is not copied; a module stands for its `state_dict()`; or what a model
            is made of, adapters on top.
        adapter: Whether the adapter is meant where a path holds a model too.

    Attributes:
        path: Where it lies; None in memory, and if it is made of others.
        composed: What it is made of, if it is.

    Raises:
        CheckpointError: If nothing is at the path, or it is broken.
        MismatchError: If an adapter does not fit the model.
        UsageError: If the source is no model.
    """

    def __init__(
        self,
        source: str | os.PathLike[str] | Mapping[str, Tensor] | Module | Composed,
        *,
        adapter: bool = False,
    ) -> None:
        self.path: Path | None = None
        self.composed: Composed | None = None
        self._source = source  # keeps its identity from being given to another object
        if isinstance(source, Composed):
            self.composed, self.model = source, source.model()
            self.key: object = source.key
        elif isinstance(source, str | os.PathLike):
            self.path = place_of(source)
            self.model = _from_path(self.path, adapter or is_adapter(self.path))
            self.key = self.path.resolve()
        else:
            self.model, self.key = _from_tensors(_state_dict(source)), id(source)

    @property
    def name(self) -> str:
        """Name of the folder or file, never its path; with those of adapters on top."""
        if self.composed is not None:
            return self.composed.name
        checkpoint = self.model.checkpoint
        return str(self) if checkpoint is None else checkpoint.name

    @property
    def roots(self) -> tuple[Path, ...]:
        """Where it lies, with adapters on top; nothing for what is in memory."""
        if self.composed is not None:
            return self.composed.roots
        return () if self.path is None else (self.path,)

    @property
    def reference(self) -> str | dict[str, Any] | None:
        """How a recipe names it, None if it is not on disk."""
        if self.composed is not None:
            return self.composed.reference
        return None if self.path is None else str(self.path)

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the tensors; in a checkpoint of components with their folder in front."""
        return tuple(self.model.tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        """Return a tensor's shape, from its file's header."""
        return self._held(name).spec.shape

    def dtype(self, name: str) -> str:
        """Return a tensor's dtype as headers of safetensors files name it, for example "BF16"."""
        return self._held(name).spec.dtype

    def tensor(self, name: str) -> Tensor:
        """Return a tensor: read from its file, or the memory that the model was made of.

        What adapters on top change is formed, with the bits that a merge writes.

        Raises:
            CheckpointError: If the file cannot be read or has changed since it was opened.
        """
        return self._fetch([self._held(name)])[0]

    def state_dict(self) -> dict[str, Tensor]:
        """Return all tensors by name."""
        fetched = self._fetch(list(self.model.tensors.values()))
        return dict(zip(self.model.tensors, fetched, strict=True))

    @property
    def files(self) -> tuple[WeightFile, ...]:
        """The weight files, as they were when the model was opened; none in memory."""
        if self.composed is not None:
            return self.composed.files
        checkpoint = self.model.checkpoint
        components = checkpoint.components if checkpoint is not None else ()
        return tuple(file for component in components for file in component.files)

    def _held(self, name: str) -> Held:
        if name not in self.model.tensors:
            hint = nearest(name, self.model.tensors)
            hint = hint if hint.startswith("did") else "`names` lists the tensors"
            raise UsageError(f"no tensor {name!r}", where=str(self), hint=hint)
        return self.model.tensors[name]

    def _fetch(self, tensors: list[Held]) -> list[Tensor]:
        from merge_kit.engine.in_memory import fetch  # noqa: PLC0415  (torch, when it is needed)

        changed = formed([one for one in tensors if not is_at_hand(one.source)], self.files)
        rest = iter(changed)
        with Reader(self.files) as reader:
            found = [
                fetch(reader, one.source) if is_at_hand(one.source) else next(rest)
                for one in tensors
            ]
            reader.check_all()
        return found

    def __contains__(self, name: object) -> bool:
        return name in self.model.tensors

    def __iter__(self) -> Iterator[str]:
        return iter(self.model.tensors)

    def __len__(self) -> int:
        return len(self.model.tensors)

    def __str__(self) -> str:
        if self.composed is not None:
            return str(self.composed)
        return str(self.path) if self.path is not None else "tensors in memory"

    def __repr__(self) -> str:
        return f"<{type(self).__name__}: {self}, {len(self)} tensors>"


def _from_path(path: Path, adapter: bool) -> Model:
    if adapter:
        return from_adapter("input", open_adapter(path))
    return from_checkpoint("input", open_checkpoint(path))


def _state_dict(source: object) -> Mapping[str, Tensor]:
    if isinstance(source, Mapping):
        return source
    state_dict: Callable[[], Mapping[str, Tensor]] | None = getattr(source, "state_dict", None)
    if callable(state_dict):
        return state_dict()
    problem = f"found a value of type {type(source).__name__}, expected a model"
    raise UsageError(problem, hint="pass a path, a mapping of tensors by name, or a module")


def _from_tensors(tensors: Mapping[str, Tensor]) -> Model:
    """Return tensors in memory as a model, in the order in which safetensors files hold them."""
    from merge_kit.engine.in_memory import in_memory  # noqa: PLC0415  (torch, when it is needed)

    if not tensors:
        raise UsageError("found a mapping without tensors, expected at least one")
    for name in tensors:
        if not isinstance(name, str) or not name.isprintable() or name == "__metadata__":
            problem = f"found the key {name!r}, expected the name of a tensor"
            raise UsageError(problem, hint="names are text without control characters")
    rows = sorted((in_memory(n, t) for n, t in tensors.items()), key=lambda row: _place(row[0]))
    held = {spec.name: Held("", spec, source) for spec, source in rows}
    return Model("input", "input", (Part("", "model", None),), held)


_WRITTEN = (
    *("U64", "I64", "F64", "C64", "F32", "U32", "I32", "BF16", "F16", "U16", "I16"),
    *("F8_E5M2FNUZ", "F8_E4M3FNUZ", "F8_E8M0", "F8_E4M3", "F8_E5M2", "I8", "U8", "BOOL"),
)
"""Dtypes in the order in which the safetensors library writes them to a file."""


def _place(spec: TensorSpec) -> tuple[int, str]:
    return _WRITTEN.index(spec.dtype), spec.name
