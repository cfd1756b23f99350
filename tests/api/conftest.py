from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from merge_kit.core.tensors import BLOCK
from merge_kit.methods import registry
from tests.api import low_rank
from tests.toys import write

SHAPES = {
    "model.layers.0.w": (3, BLOCK // 2),  # more than one block
    "model.layers.1.w": (5, 7),
    "model.norm.weight": (7,),
    "scale": (),
    "nothing": (0, 4),
}
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def tensors(number: int) -> dict[str, torch.Tensor]:
    """Return tensors of several dtypes, and one of integers that is the same for every number."""
    draw = torch.Generator().manual_seed(number)
    found = {
        name: torch.randn(shape, generator=draw).to(DTYPES[i % 3])
        for i, (name, shape) in enumerate(SHAPES.items())
    }
    return {**found, "ids": torch.arange(5)}


@dataclass(frozen=True, slots=True)
class Family:
    """Three models, each as a folder and as tensors by name."""

    folder: Path
    base: dict[str, torch.Tensor]
    code: dict[str, torch.Tensor]
    math: dict[str, torch.Tensor]

    def path(self, name: str) -> Path:
        return self.folder / name


@pytest.fixture(scope="session")
def family(tmp_path_factory) -> Family:
    made = Family(tmp_path_factory.mktemp("family"), tensors(0), tensors(1), tensors(2))
    for name in ("base", "code", "math"):
        write(made.path(name), getattr(made, name), {"model_type": "toy"})
    return made


def assert_same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    """Check that two mappings hold the same names, shapes, dtypes and bits."""
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert tensor.dtype == other[name].dtype, name
        assert torch.equal(tensor, other[name]), name


@pytest.fixture(scope="session")
def made(tmp_path_factory) -> low_rank.Made:
    """Return a model, a fine-tune, and adapters of it."""
    return low_rank.make(tmp_path_factory.mktemp("adapters"))


@pytest.fixture
def registered():
    """Let a test register methods, and forget them afterwards."""
    before = set(registry.names())
    yield
    for name in set(registry.names()) - before:
        del registry._METHODS[name]
    registry.every_parameter.cache_clear()
