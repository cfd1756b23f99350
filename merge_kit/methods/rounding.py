"""One rounding from the dtype of the computation to the dtype of the output."""

from __future__ import annotations

from typing import TYPE_CHECKING

from merge_kit.core.tensors import BLOCK
from merge_kit.methods.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor


ODD = BLOCK // 4
"""Elements that are rounded to odd at once: what that takes stays small."""

ODD_BYTES = 40 * ODD
"""What it takes."""


def round_into(values: Tensor, out: Tensor) -> None:
    """Fill `out` with values rounded once to its dtype, to nearest even."""
    if values.dtype != torch.float64 or out.dtype not in (torch.bfloat16, torch.float16):
        out.copy_(values)
        return
    flat, narrow = values.reshape(-1), out.view(-1)
    for start in range(0, flat.numel(), ODD):  # torch goes through float32: it rounds twice
        narrow[start : start + ODD].copy_(_odd(flat[start : start + ODD]))


def _odd(values: Tensor) -> Tensor:
    """Return float64 as float32 rounded to odd: a second rounding then errs no more.

    Boldo and Melquiond 2008, Emulation of FMA and correctly rounded sums,
    https://doi.org/10.1109/TC.2008.70819
    """
    near = values.float()
    back = near.double()
    bits = near.view(torch.int32)
    bits.sub_((back.abs() > values.abs()).int())  # to zero
    bits.bitwise_or_((back != values).int())
    return near


def nonfinite(values: Tensor) -> int:
    """Return how many values are NaN or infinite."""
    return int(values.numel() - torch.isfinite(values).sum())
