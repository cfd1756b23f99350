"""Llama-shaped checkpoints: their tensors, config, shards and headers, without their numbers."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path

BYTES = 2  # bf16


@dataclass(frozen=True, slots=True)
class Llama:
    """The sizes of a Llama model; the head is a matrix of its own."""

    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    vocab: int

    def tensors(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Yield name and shape of every tensor, in the order of the model."""
        hidden, wide = self.hidden, self.intermediate
        keys = hidden // self.heads * self.kv_heads
        yield "model.embed_tokens.weight", (self.vocab, hidden)
        for i in range(self.layers):
            layer = f"model.layers.{i}"
            yield f"{layer}.self_attn.q_proj.weight", (hidden, hidden)
            yield f"{layer}.self_attn.k_proj.weight", (keys, hidden)
            yield f"{layer}.self_attn.v_proj.weight", (keys, hidden)
            yield f"{layer}.self_attn.o_proj.weight", (hidden, hidden)
            yield f"{layer}.mlp.gate_proj.weight", (wide, hidden)
            yield f"{layer}.mlp.up_proj.weight", (wide, hidden)
            yield f"{layer}.mlp.down_proj.weight", (hidden, wide)
            yield f"{layer}.input_layernorm.weight", (hidden,)
            yield f"{layer}.post_attention_layernorm.weight", (hidden,)
        yield "model.norm.weight", (hidden,)
        yield "lm_head.weight", (self.vocab, hidden)

    @property
    def parameters(self) -> int:
        return sum(prod(shape) for _, shape in self.tensors())

    def config(self) -> dict[str, object]:
        """Return config.json."""
        return {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "hidden_size": self.hidden,
            "intermediate_size": self.intermediate,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "vocab_size": self.vocab,
            "max_position_embeddings": 4096,
            "rms_norm_eps": 1e-5,
            "tie_word_embeddings": False,
            "torch_dtype": "bfloat16",
        }


MODELS = {
    "160M": Llama(12, 768, 3072, 12, 12, 32_000),
    "1.2B": Llama(16, 2048, 8192, 32, 8, 64_000),
    "Mistral-7B": Llama(32, 4096, 14_336, 32, 8, 32_000),
    "Llama-2-70B": Llama(80, 8192, 28_672, 64, 8, 32_000),
    "Llama-3.1-405B": Llama(126, 16_384, 53_248, 128, 8, 128_256),
}


@dataclass(frozen=True, slots=True)
class Shard:
    """One file of a checkpoint: its name and its tensors (name, shape) in order."""

    name: str
    tensors: tuple[tuple[str, tuple[int, ...]], ...]

    @property
    def data_bytes(self) -> int:
        return sum(prod(shape) * BYTES for _, shape in self.tensors)

    def header(self) -> bytes:
        """Return the length prefix and the JSON header, padded to a multiple of 8."""
        entries, at = {}, 0
        for name, shape in self.tensors:
            end = at + prod(shape) * BYTES
            entries[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [at, end]}
            at = end
        text = json.dumps(entries, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        return len(text).to_bytes(8, "little") + text


def shards(model: Llama, shard_bytes: int) -> list[Shard]:
    """Return a model's files, each filled until the next tensor would pass `shard_bytes`."""
    groups: list[list[tuple[str, tuple[int, ...]]]] = [[]]
    filled = 0
    for name, shape in model.tensors():
        nbytes = prod(shape) * BYTES
        if groups[-1] and filled + nbytes > shard_bytes:
            groups.append([])
            filled = 0
        groups[-1].append((name, shape))
        filled += nbytes
    if len(groups) == 1:
        return [Shard("model.safetensors", tuple(groups[0]))]
    names = [f"model-{i:05}-of-{len(groups):05}.safetensors" for i in range(1, len(groups) + 1)]
    return [Shard(name, tuple(group)) for name, group in zip(names, groups, strict=True)]


TOKENIZER = {
    "version": "1.0",
    "added_tokens": [],
    "model": {"type": "WordLevel", "vocab": {"<unk>": 0}, "unk_token": "<unk>"},
}
"""The smallest tokenizer that loads; benchmarks never tokenize."""


def write_side_files(folder: Path, model: Llama, files: Sequence[Shard]) -> None:
    """Write config.json, a tokenizer, and the index if there are several shards."""
    (folder / "config.json").write_text(json.dumps(model.config(), indent=2))
    (folder / "tokenizer.json").write_text(json.dumps(TOKENIZER))
    tokenizer = {"tokenizer_class": "PreTrainedTokenizerFast", "unk_token": "<unk>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    if len(files) > 1:
        index = {
            "metadata": {"total_size": sum(shard.data_bytes for shard in files)},
            "weight_map": {name: shard.name for shard in files for name, _ in shard.tensors},
        }
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
