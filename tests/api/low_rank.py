"""A model, a fine-tune and adapters of it by hand, with what the adapters change, dense."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from tests.toys import write

SHAPES = {
    "model.embed_tokens.weight": (9, 4),  # (tokens, width)
    "model.layers.0.self_attn.q_proj.weight": (6, 4),
    "model.layers.0.mlp.up_proj.weight": (8, 4),
    "model.layers.1.self_attn.q_proj.weight": (6, 4),
    "model.layers.1.mlp.up_proj.weight": (8, 4),
    "model.norm.weight": (4,),
    "lm_head.weight": (9, 4),
}
Q = ("model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.q_proj")
UP = ("model.layers.0.mlp.up_proj", "model.layers.1.mlp.up_proj")
EMBED = "model.embed_tokens"
SETTINGS = {
    "peft_type": "LORA",
    "base_model_name_or_path": "org/base",
    "r": 2,
    "lora_alpha": 3,
    "fan_in_fan_out": False,
}
SCALE = 1.5
FLOAT32 = 2.0**-22  # of the sum of magnitudes


def draw(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def model(seed: int, dtype=torch.float32) -> dict[str, Tensor]:
    """Return a model's tensors; those of integers are the same for every seed."""
    found = {n: draw(seed + i, *s).to(dtype) for i, (n, s) in enumerate(SHAPES.items())}
    return {**found, "model.ids": torch.arange(4)}


def factors(seed: int, modules: tuple[str, ...]) -> dict[str, Tensor]:
    """Return peft's tensors of an adapter of rank 2."""
    found = {}
    for i, module in enumerate(modules):
        outputs, inputs = SHAPES[f"{module}.weight"]
        at = seed + 2 * i
        if module == EMBED:  # the rows of the weight are the inputs
            names, outputs, inputs = ("lora_embedding_A", "lora_embedding_B"), inputs, outputs
        else:
            names = ("lora_A.weight", "lora_B.weight")
        found[f"base_model.model.{module}.{names[0]}"] = draw(at, 2, inputs)
        found[f"base_model.model.{module}.{names[1]}"] = draw(at + 1, outputs, 2)
    return found


def deltas(tensors: dict[str, Tensor], scale: float = SCALE) -> dict[str, Tensor]:
    """Return what an adapter changes, by weight, dense in float64."""
    found = {}
    for name, a in tensors.items():
        module = name.removeprefix("base_model.model.").rpartition(".lora_")[0]
        if "lora_embedding_A" in name:
            b = tensors[name.replace("lora_embedding_A", "lora_embedding_B")]
            found[f"{module}.weight"] = scale * (b.double() @ a.double()).T
        elif "lora_A" in name:
            b = tensors[name.replace("lora_A", "lora_B")]
            found[f"{module}.weight"] = scale * b.double() @ a.double()
    return found


def write_adapter(folder: Path, tensors: dict[str, Tensor], **more: object) -> Path:
    folder.mkdir(parents=True)
    save_file(tensors, folder / "adapter_model.safetensors")
    targets = sorted({n.split(".lora_")[0].rpartition(".")[2] for n in tensors if ".lora_" in n})
    settings = {**SETTINGS, "target_modules": targets, **more}
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    return folder


@dataclass(frozen=True, slots=True)
class Made:
    """A base, a fine-tune, and two adapters: sort of q_proj and the embedding, add of all linear.

    Attributes:
        sort: What the adapter of this name changes, dense.
    """

    folder: Path
    base: dict[str, Tensor]
    code: dict[str, Tensor]
    sort: dict[str, Tensor]
    add: dict[str, Tensor]

    def path(self, name: str) -> Path:
        return self.folder / name

    def on_base(self, name: str) -> str:
        return f"{self.folder / 'base'}+{self.folder / name}"


def make(folder: Path) -> Made:
    """Write everything into a folder."""
    sort, add = factors(100, (*Q, EMBED)), factors(200, (*Q, *UP))
    found = Made(folder, model(0), model(50), deltas(sort), deltas(add))
    for name in ("base", "code"):
        write(folder / name, getattr(found, name), {"model_type": "toy"})
    write_adapter(folder / "sort", sort)
    write_adapter(folder / "add", add)
    return found


def assert_near(found: dict[str, Tensor], wanted: dict[str, Tensor], *parts: dict) -> None:
    """Check float32 tensors against float64 ones, within what a sum of `parts` may be off."""
    assert found.keys() == wanted.keys()
    for name, tensor in found.items():
        if not tensor.is_floating_point():
            assert torch.equal(tensor, wanted[name]), name
            continue
        size = sum(part[name].double().abs() for part in parts if name in part)
        assert torch.all((tensor.double() - wanted[name]).abs() <= FLOAT32 * size + 1e-12), name


def added(base: dict[str, Tensor], *changes: tuple[float, dict[str, Tensor]]) -> dict[str, Tensor]:
    """Return a model plus weighted changes, in float64."""
    found = {n: t.double() if t.is_floating_point() else t for n, t in base.items()}
    for weight, change in changes:
        found |= {name: found[name] + weight * delta for name, delta in change.items()}
    return found


def weights(folder: Path) -> dict[str, bytes]:
    """Return the bytes of the weight files of a folder."""
    return {path.name: path.read_bytes() for path in sorted(folder.glob("*.safetensors"))}


def size(changes: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the largest that a product of factors of this size may be, element by element."""
    return {name: delta.abs() + delta.abs().max() for name, delta in changes.items()}
