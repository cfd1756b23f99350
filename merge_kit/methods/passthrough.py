"""One model as it is, or scaled."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from merge_kit.methods.base import Law, MergeMethod, PerModel, Scans, Slab, per_model
from merge_kit.methods.registry import register

if TYPE_CHECKING:
    from torch import Tensor


@register("passthrough")
@dataclass(frozen=True, kw_only=True)
class Passthrough(MergeMethod):
    """Take one model unchanged: the method of layer stacks ("frankenmerges").

    out = x, or scale * x

    Without a scale the bytes are copied, whatever their dtype.

    Attributes:
        scale: Factor on the tensor, any finite number; not given means an exact copy. Conditions
            give it to kinds of tensors: [{filter: o_proj, value: 0.7}].

    Cost: a copy of the files' bytes.
    Source: layer stacking as in Goliath-120B, https://huggingface.co/alpindale/goliath-120b
    """

    max_inputs: ClassVar[int | None] = 1
    by_name: ClassVar[bool] = False
    laws: ClassVar[Mapping[Law, float]] = {"single": 0.0, "permute_rows": 0.0}

    scale: PerModel[float | None] = per_model(None)

    def copies(self) -> bool:
        """Return whether no scale is given."""
        return not self.scale or self.scale[0] is None

    def merge(self, slab: Slab, scans: Scans) -> Tensor:
        """Return the scaled tensor."""
        del scans
        factor = self.scale[0] if self.scale else None
        return slab.tensors[0] if factor is None else slab.tensors[0].mul_(factor)
