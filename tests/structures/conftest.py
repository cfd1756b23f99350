"""Models that several modules of tests share; transformers is loaded by those only."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch


@pytest.fixture(scope="module")
def single_thread():
    """Let torch use one thread, which is the fastest for models as small as these."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def pair(tmp_path_factory):
    """Save two models of a family, once, and return their folders and the models as loaded."""
    import deepened  # noqa: PLC0415
    from families import FAMILIES  # noqa: PLC0415

    from tests.models import SHARD_BYTES  # noqa: PLC0415

    made: dict[str, tuple[dict[str, Path], dict[str, Any]]] = {}

    def of(kind: str):
        if kind not in made:
            root, family = tmp_path_factory.mktemp(kind), FAMILIES[kind]
            for seed, name in enumerate("ab"):
                model = deepened.build(family, name, seed)
                model.save_pretrained(root / name, max_shard_size=SHARD_BYTES)
            folders = {name: root / name for name in "ab"}
            made[kind] = folders, {n: deepened.load(family, f) for n, f in folders.items()}
        return made[kind]

    return of
