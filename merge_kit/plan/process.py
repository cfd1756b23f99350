"""What the process itself takes, before anything is merged."""

from __future__ import annotations

from functools import cache
from importlib.util import find_spec
from pathlib import Path

CPU_BYTES = 250_000_000
"""Resident memory of Python with a CPU build of torch, with some room."""

CUDA_BYTES = 510_000_000
"""The same with a CUDA build, whose libraries are loaded though nothing here uses them."""


@cache
def process_bytes() -> int:
    """Return the resident memory of Python with the torch that is installed, not importing it."""
    spec = find_spec("torch")
    folders = [] if spec is None else spec.submodule_search_locations or []
    cuda = any(list(Path(folder, "lib").glob("*torch_cuda*")) for folder in folders)
    return CUDA_BYTES if cuda else CPU_BYTES
