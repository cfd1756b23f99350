"""Adapters of several kinds, made once."""

from __future__ import annotations

import pytest
import torch

from tests.adapters.claims import FAMILIES
from tests.adapters.makers import KINDS, make_adapter, make_base


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def zoo(tmp_path_factory):
    """Return a base and three adapters of other ranks, targets, dtypes, scales and patterns."""
    folder = tmp_path_factory.mktemp("zoo")
    base = make_base("llama", folder / "base")
    plain = {"r": 4, "lora_alpha": 6, "target_modules": ["q_proj", "v_proj", "up_proj"]}
    scaled = {"r": 3, "lora_alpha": 5, "use_rslora": True, "target_modules": ["q_proj", "k_proj"]}
    patterned = KINDS["both_patterns"].config
    half = torch.bfloat16
    adapters = [
        make_adapter("llama", base, folder / "plain", seed=21, **plain),
        make_adapter("llama", base, folder / "rslora", seed=22, dtype=half, **scaled),
        make_adapter("llama", base, folder / "patterns", seed=23, **patterned),
    ]
    return base, adapters


@pytest.fixture(scope="module")
def families(tmp_path_factory):
    made = {}
    for name, configs in FAMILIES.items():
        folder = tmp_path_factory.mktemp(name)
        base = make_base(name, folder / "base")
        adapters = [
            make_adapter(name, base, folder / f"a{i}", seed=30 + i, **config)
            for i, config in enumerate(configs)
        ]
        made[name] = (base, adapters)
    return made
