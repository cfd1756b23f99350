"""Each method as a function: models on disk, in memory and mixed give the same bytes."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file

import merge_kit as mk
from merge_kit.methods.registry import find, parameters
from tests.api.conftest import assert_same
from tests.toys import write
from tests.variants import MODEL_METHODS

SHAPES = {
    "model.layers.0.w": (33, 40),
    "model.layers.1.w": (40, 33),
    "model.norm.weight": (40,),
    "scale": (),
    "nothing": (0, 4),
}
REQUIRED = {"t": 0.3}


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> dict[str, tuple]:
    """Return models by name, each as a folder and as tensors."""
    found, root = {}, tmp_path_factory.mktemp("models")
    draw = torch.Generator().manual_seed(0)
    for name in ("base", "code", "math", "law"):
        tensors = {n: torch.randn(s, generator=draw).bfloat16() for n, s in SHAPES.items()}
        tensors["ids"] = torch.arange(5)
        write(root / name, tensors, {"model_type": "toy"})
        found[name] = (root / name, tensors)
    return found


def statistics(of: str, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    floats = {n: t.float() for n, t in tensors.items() if t.is_floating_point()}
    if of == "elements":
        return {name: tensor**2 for name, tensor in floats.items()}
    matrices = {n: t for n, t in floats.items() if t.dim() == 2 and t.numel()}
    return {name: tensor.T @ tensor for name, tensor in matrices.items()}


@pytest.mark.parametrize("name", MODEL_METHODS)
def test_files_and_tensors_in_memory_give_the_same_bytes(models, tmp_path, name):
    kind = find(name)
    chosen = ["code", "math", "law"][: kind.max_inputs or 3]
    told = {p.field: REQUIRED[p.name] for p in parameters(kind) if p.name in REQUIRED}
    has_base = kind.needs_base or kind.takes_base
    saved = []
    for i, places in enumerate(((0, 0), (1, 1), (0, 1))):  # on disk, in memory, mixed
        sources = [models[one][places[k % 2]] for k, one in enumerate(chosen)]
        if kind.statistics_of:
            told["statistics"] = [statistics(kind.statistics_of, models[n][1]) for n in chosen]
        merge = getattr(mk, name)(
            sources, base=models["base"][places[0]] if has_base else None, **told
        )
        saved.append(merge.save(tmp_path / str(i)) / "model.safetensors")
        assert_same(merge.state_dict(), load_file(saved[-1]))
    assert saved[0].read_bytes() == saved[1].read_bytes() == saved[2].read_bytes()
    assert all(t.isfinite().all() for t in load_file(saved[0]).values())
