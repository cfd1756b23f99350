"""A model made narrower: the first rows and columns, the inverse of `pad`."""

from __future__ import annotations

from dataclasses import dataclass

from merge_kit.methods.registry import register
from merge_kit.methods.widths import WidthMethod


@register("crop")
@dataclass(frozen=True, kw_only=True)
class Crop(WidthMethod):
    """Make a model narrower: of every axis the first rows and columns, of heads the first groups.

    hidden_size H to H': weights of norms take the factor sqrt(H/H'), and rms_norm_eps H/H'.

    It undoes `pad`: crop(pad(x)) is x, bit for bit where sqrt(H/H') is a power of two, else to
    rounding of the scaled tensors. Of any other model it loses what is cut off, and the result
    needs training: which units come first means nothing in a trained model. `project` to a smaller
    hidden size keeps the directions that matter most.

    The sizes are given, or those of base_model, which lends nothing else; what is not given stays.
    What cannot change is listed under `pad`.

    Attributes:
        hidden_size: At most that of the model.
        intermediate_size: At most that of the model.
        num_attention_heads: At most that of the model, with num_key_value_heads in proportion.
        num_key_value_heads: At most that of the model.

    Cost: one pass.
    Source: the inverse of `pad`.
    """
