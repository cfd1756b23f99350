"""Dtypes of the format as torch dtypes."""

from __future__ import annotations

import torch

from merge_kit.core.dtypes import DTYPES


def torch_dtype(dtype: str) -> torch.dtype:
    """Return the torch dtype of a dtype with arithmetic or an integer dtype."""
    found = getattr(torch, DTYPES[dtype].torch_name)
    assert isinstance(found, torch.dtype)
    return found
