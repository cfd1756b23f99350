"""Models that are loaded: tensors on demand, arithmetic, adapters on top."""

from __future__ import annotations

from os import PathLike
from typing import TYPE_CHECKING

from merge_kit.api.expressions import ModelArithmetic
from merge_kit.api.held import HeldModel
from merge_kit.api.nodes import applied, content_of
from merge_kit.api.overlays import on_top

if TYPE_CHECKING:
    from merge_kit.api.nodes import Operand
    from merge_kit.api.requests import Node


class LoadedModel(HeldModel, ModelArithmetic):
    """A model whose tensors are read when they are asked for; see `load`."""

    def node(self) -> Node:
        """Return this."""
        return self

    def with_adapter(
        self, adapter: str | PathLike[str] | HeldModel, weight: float = 1.0
    ) -> LoadedModel:
        """Return this model with a LoRA adapter on top; nothing is read but headers.

        Its tensors are formed when they are asked for. Several adapters add up: the change of each
        is that of the weights without any adapter, so their order does not matter.

        Args:
            adapter: Path of a folder or file, or an adapter that is loaded.
            weight: What its change is multiplied by.

        Raises:
            CheckpointError: If the adapter is broken.
            MismatchError: If it does not fit this model.
            UsageError: If it is no adapter, or this model is one itself.
        """
        return LoadedModel(on_top(self, [applied(adapter, weight)]))


def load(source: Operand) -> LoadedModel:
    """Return a model whose tensors are read when they are asked for.

    Of a path only headers and config files are read, and tensors with positioned reads, never
    mapped into memory. Tensors of a mapping or a module are used where they are.

    Args:
        source: Path of a folder or of a safetensors file; `base+adapter` for a model with LoRA
            adapters on top (a path that exists wins over this meaning of `+`); tensors by name; a
            torch module; or a model that is loaded already. The tensors of an adapter alone are
            its factors.

    Raises:
        CheckpointError: If nothing is at the path, or it is broken.
        UsageError: If it is no model.
    """
    return source if isinstance(source, LoadedModel) else LoadedModel(content_of(source))
