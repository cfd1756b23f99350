"""The demo models without transformers: checkpoint folders, their tokens, one forward pass."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from demo_text import Example
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from torch.nn.functional import cross_entropy, scaled_dot_product_attention, silu

IGNORED = -100
"""The label of a token that is not scored."""

LAYER = (
    "input_layernorm",
    *(f"self_attn.{name}_proj" for name in "qkvo"),
    "post_attention_layernorm",
    *(f"mlp.{name}_proj" for name in ("gate", "up", "down")),
)
"""The tensors of one layer."""


class DemoError(Exception):
    """A checkpoint folder that cannot be evaluated, and why."""


@dataclass(frozen=True, slots=True)
class Tokens:
    """The ids of single characters, and of the special tokens."""

    ids: Mapping[str, int]
    pad: int = 0
    bos: int = 1
    eos: int = 2


@dataclass(frozen=True, slots=True)
class Batch:
    """Token ids and labels, both (examples, longest); padding and prompts have ignored labels."""

    ids: Tensor
    labels: Tensor


@dataclass(frozen=True, slots=True)
class Llama:
    """A checkpoint in float32: config.json, tensors by name, tokens."""

    config: Mapping[str, Any]
    weights: Mapping[str, Tensor]
    tokens: Tokens


@dataclass(frozen=True, slots=True)
class Score:
    """Mean loss in nats per token of the answers, and the share of answers that are right."""

    loss: float
    right: float


def encode(examples: Sequence[Example], tokens: Tokens) -> Batch:
    """Return a batch in which the answers and the ends of the lines are scored.

    Raises:
        DemoError: If the tokens lack a character of the text.
    """
    lines = [example.prompt + example.answer for example in examples]
    missing = sorted(set("".join(lines)) - tokens.ids.keys())
    if missing:
        raise DemoError(f"tokenizer.json has no token for the characters {''.join(missing)!r}")
    ids = torch.full((len(lines), 2 + max(map(len, lines))), tokens.pad)
    labels = torch.full_like(ids, IGNORED)
    for row, (example, line) in enumerate(zip(examples, lines, strict=True)):
        line_ids = [tokens.bos, *(tokens.ids[character] for character in line), tokens.eos]
        ids[row, : len(line_ids)] = torch.tensor(line_ids)
        scored = slice(1 + len(example.prompt), len(line_ids))
        labels[row, scored] = ids[row, scored]
    return Batch(ids, labels)


def load(folder: Path) -> Llama:
    """Return the checkpoint in a folder; an adapter is added to the base that it names.

    Raises:
        DemoError: If a file is missing or is not what its name says.
    """
    try:
        if (folder / "adapter_config.json").exists():
            return _load_adapter(folder)
        config = _json(folder / "config.json")
        vocabulary = _json(folder / "tokenizer.json")["model"]["vocab"]
        tokens = Tokens(vocabulary, bos=config["bos_token_id"], eos=config["eos_token_id"])
        return _complete(Llama(config, _tensors(folder), tokens))
    except FileNotFoundError as exc:
        name = Path(exc.filename or str(exc).rpartition(": ")[2]).name
        raise DemoError(f"{folder}: {name} is missing") from exc
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as exc:
        raise DemoError(f"{folder}: no readable checkpoint of a demo model: {exc!r}") from exc


def _complete(model: Llama) -> Llama:
    """Return the model, or raise KeyError with the name of a tensor that it lacks."""
    layers = range(model.config["num_hidden_layers"])
    names = [f"model.layers.{layer}.{part}.weight" for layer in layers for part in LAYER]
    for name in ("model.embed_tokens.weight", *names, "model.norm.weight"):
        model.weights[name]
    return model


def _json(path: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return content


def _tensors(folder: Path) -> dict[str, Tensor]:
    index = folder / "model.safetensors.index.json"
    names = sorted(set(_json(index)["weight_map"].values())) if index.exists() else None
    tensors: dict[str, Tensor] = {}
    for name in names or ["model.safetensors"]:
        tensors |= {key: value.float() for key, value in load_file(folder / name).items()}
    return tensors


def _load_adapter(folder: Path) -> Llama:
    config = _json(folder / "adapter_config.json")
    if config.get("use_dora") or config.get("alpha_pattern"):
        raise DemoError(f"{folder}: only plain LoRA adapters are evaluated here")
    base = load(folder.parent / config["base_model_name_or_path"])
    adapter = load_file(folder / "adapter_model.safetensors")
    weights = dict(base.weights)
    for name in (name for name in adapter if name.endswith("lora_A.weight")):
        a, b = adapter[name].float(), adapter[name.replace("lora_A", "lora_B")].float()
        rank = math.sqrt(len(a)) if config.get("use_rslora") else len(a)
        target = name.removeprefix("base_model.model.").replace("lora_A.weight", "weight")
        weights[target] = weights[target] + config["lora_alpha"] / rank * (b @ a)
    return replace(base, weights=weights)


def score(model: Llama, examples: Sequence[Example]) -> Score:
    """Return how well a model knows the answers."""
    batch = encode(examples, model.tokens)
    logits, labels = forward(model, batch.ids)[:, :-1], batch.labels[:, 1:]
    loss = cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORED)
    right = (logits.argmax(-1) == labels) | (labels == IGNORED)
    return Score(float(loss), float(right.all(dim=1).float().mean()))


def answer(model: Llama, prompt: str, longest: int = 32) -> str:
    """Return the most likely continuation, character by character, to the end of the line."""
    characters = {index: character for character, index in model.tokens.ids.items()}
    ids = encode([Example(prompt, "")], model.tokens).ids[:, :-1]
    for _ in range(longest):
        following = forward(model, ids)[:, -1:].argmax(-1)
        if int(following) == model.tokens.eos:
            break
        ids = torch.cat([ids, following], dim=1)
    return "".join(characters[int(index)] for index in ids[0, 1 + len(prompt) :])


@torch.inference_mode()
def forward(model: Llama, ids: Tensor) -> Tensor:
    """Return the logits, (examples, tokens, vocabulary), of a Llama decoder."""
    weights, config = model.weights, model.config
    x = weights["model.embed_tokens.weight"][ids]
    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}."
        names = (name for name in weights if name.startswith(prefix))
        own = {name.removeprefix(prefix).removesuffix(".weight"): weights[name] for name in names}
        x = x + _attention(_norm(x, own["input_layernorm"], config), own, config)
        x = x + _mlp(_norm(x, own["post_attention_layernorm"], config), own)
    head = weights.get("lm_head.weight", weights["model.embed_tokens.weight"])
    return _norm(x, weights["model.norm.weight"], config) @ head.T


def _norm(x: Tensor, scale: Tensor, config: Mapping[str, Any]) -> Tensor:
    mean_square = x.square().mean(-1, keepdim=True)
    return x * torch.rsqrt(mean_square + config["rms_norm_eps"]) * scale


def _mlp(x: Tensor, own: Mapping[str, Tensor]) -> Tensor:
    gate = silu(x @ own["mlp.gate_proj"].T)
    return (gate * (x @ own["mlp.up_proj"].T)) @ own["mlp.down_proj"].T


def _attention(x: Tensor, own: Mapping[str, Tensor], config: Mapping[str, Any]) -> Tensor:
    heads, shared = config["num_attention_heads"], config["num_key_value_heads"]
    q, k, v = (
        (x @ own[f"self_attn.{name}_proj"].T).view(*x.shape[:2], count, -1).transpose(1, 2)
        for name, count in (("q", heads), ("k", shared), ("v", shared))
    )
    q, k = _rotate(q, config), _rotate(k, config)
    k, v = (each.repeat_interleave(heads // shared, dim=1) for each in (k, v))
    mixed = scaled_dot_product_attention(q, k, v, is_causal=True)
    return mixed.transpose(1, 2).flatten(2) @ own["self_attn.o_proj"].T


def _rotate(x: Tensor, config: Mapping[str, Any]) -> Tensor:
    """Return queries or keys, (examples, heads, tokens, head), turned by their positions."""
    theta = config["rope_theta"] if "rope_theta" in config else _theta(config)
    half = x.shape[-1] // 2
    speeds = theta ** (-torch.arange(half) / half)
    angles = torch.outer(torch.arange(x.shape[-2]), speeds).repeat(1, 2)
    turned = torch.cat([-x[..., half:], x[..., :half]], dim=-1)
    return x * angles.cos() + turned * angles.sin()


def _theta(config: Mapping[str, Any]) -> float:
    return float(config["rope_parameters"]["rope_theta"])
