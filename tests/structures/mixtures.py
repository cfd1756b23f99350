"""Small mixtures of experts with random weights, saved by transformers, and what they answer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import save_file
from torch import Tensor

from tests.models import stored
from tests.toys import config as toy_config
from tests.toys import write

EXPERTS = 3
VOCAB = 64
SMALL: dict[str, Any] = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": VOCAB,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
}
_MOE: dict[str, Any] = {
    **SMALL,
    "num_experts_per_tok": 2,
    "num_experts": EXPERTS,
    "intermediate_size": 40,
    "moe_intermediate_size": 24,
    "norm_topk_prob": True,
}


def config(kind: str, **changes: Any) -> Any:
    """Return the config of a small mixture: mixtral, qwen2_moe, qwen3_moe."""
    if kind == "mixtral":
        own = {**_MOE, "num_local_experts": EXPERTS, "intermediate_size": 24}
        for key in ("num_experts", "moe_intermediate_size", "norm_topk_prob"):
            del own[key]
        return transformers.MixtralConfig(**{**own, **changes})
    if kind == "qwen2_moe":
        own = {**_MOE, "shared_expert_intermediate_size": 24}
        return transformers.Qwen2MoeConfig(**{**own, **changes})
    return transformers.Qwen3MoeConfig(**{**_MOE, "head_dim": 8, **changes})


def build(kind: str, seed: int = 0, **changes: Any) -> Any:
    """Return a mixture all of whose weights are random and far from 0."""
    made = config(kind, **changes)
    model = transformers.AutoModelForCausalLM.from_config(made)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in model.parameters():
            noise = torch.randn(weight.shape, generator=generator)
            weight.copy_(1 + 0.1 * noise if weight.ndim < 2 else 0.3 * noise)
    return model.float().eval()


def alike(model: Any) -> Any:
    """Make all experts of a layer copies of its first one, and return the model."""
    with torch.no_grad():
        for layer in model.model.layers:
            experts = getattr(layer.mlp, "experts", None)
            for weight in () if experts is None else experts.parameters():
                weight.copy_(weight[:1].expand_as(weight))
    return model


def save(model: Any, folder: Path, dtype: torch.dtype = torch.float32) -> Path:
    """Save a model, and return its folder."""
    model.to(dtype).save_pretrained(folder)
    model.float()
    return folder


def load(folder: Path) -> Any:
    """Load a model as transformers does, and hold it to its files: no key missing or left over."""
    model, found = transformers.AutoModelForCausalLM.from_pretrained(
        folder, output_loading_info=True, dtype=torch.float32
    )
    assert not any(found.values()), found
    return model.eval()


def logits(model: Any) -> Tensor:
    """Return what a model answers to some tokens."""
    ids = torch.randint(2, VOCAB, (2, 9), generator=torch.Generator().manual_seed(5))
    with torch.inference_mode():
        return model(ids).logits


def bare(folder: Path, tensors: dict[str, Tensor], **settings: Any) -> Path:
    """Write tensors as a model, with a config if settings are given."""
    return write(folder, tensors, toy_config(2, **settings) if settings else None)


def split_experts(
    seed: int, count: int, names: tuple[str, ...], shape: tuple[int, int], lead: str
) -> dict[str, Tensor]:
    """Return random experts with tensors of their own: `lead`.N.`name`.weight."""
    generator = torch.Generator().manual_seed(seed)
    return {
        f"{lead}.{e}.{name}.weight": torch.randn(shape, generator=generator)
        for e in range(count)
        for name in names
    }


def fused(folder: Path, out: Path) -> Path:
    """Write a Qwen-like model once more, its experts fused as mergekit-moe writes them."""
    tensors, made = stored(folder), {}
    lead = ".experts."
    for name, tensor in tensors.items():
        if lead not in name:
            made[name] = tensor
            continue
        block = name.partition(lead)[0] + ".experts"
        count = sum(n.startswith(f"{block}.") and n.endswith(".down_proj.weight") for n in tensors)
        rows = {
            part: torch.stack([tensors[f"{block}.{e}.{part}.weight"] for e in range(count)])
            for part in ("gate_proj", "up_proj", "down_proj")
        }
        made[f"{block}.gate_up_proj"] = torch.cat([rows["gate_proj"], rows["up_proj"]], dim=1)
        made[f"{block}.down_proj"] = rows["down_proj"]
    out.mkdir(parents=True)
    save_file({k: v.contiguous() for k, v in made.items()}, out / "model.safetensors")
    (out / "config.json").write_text((folder / "config.json").read_text())
    return out
