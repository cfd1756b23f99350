"""Small models of real architectures with random weights, saved and loaded by transformers."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import safe_open
from torch import Tensor

from merge_kit.api import Merge
from merge_kit.api import merge as run

transformers.utils.logging.disable_progress_bar()

SHARD_BYTES = 12_000
"""Size of shards, in inputs and outputs, that splits every one of these models."""

VOCAB = 64
IMAGE_TOKEN = VOCAB - 1
_SMALL: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 4,
}
DECODER: dict[str, Any] = {
    **_SMALL,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "vocab_size": VOCAB,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
    "max_position_embeddings": 128,
}
VISION: dict[str, Any] = {**_SMALL, "num_hidden_layers": 3, "image_size": 8, "patch_size": 4}
MIXED = ["sliding_attention", "full_attention", "sliding_attention", "full_attention"]


def _llama() -> Any:
    return transformers.LlamaConfig(**DECODER, num_hidden_layers=4, tie_word_embeddings=False)


def _qwen3() -> Any:
    sliding = {"layer_types": MIXED, "use_sliding_window": True, "sliding_window": 4}
    return transformers.Qwen3Config(**DECODER, num_hidden_layers=4, **sliding)


def _gemma3_text(layers: int = 7) -> Any:
    more = {"sliding_window": 4, "query_pre_attn_scalar": 8}
    return transformers.Gemma3TextConfig(**DECODER, num_hidden_layers=layers, **more)


def _gemma3() -> Any:
    vision = transformers.SiglipVisionConfig(**{**VISION, "num_hidden_layers": 2})
    return transformers.Gemma3Config(
        vision_config=vision,
        text_config=_gemma3_text(layers=6),
        mm_tokens_per_image=4,
        image_token_id=IMAGE_TOKEN,
        eos_token_id=None,
    )


def _gpt2() -> Any:
    more = {"bos_token_id": 1, "eos_token_id": None}
    return transformers.GPT2Config(
        n_embd=32, n_head=4, n_layer=4, vocab_size=VOCAB, n_positions=64, **more
    )


def _mixtral() -> Any:
    return transformers.MixtralConfig(**DECODER, num_hidden_layers=4, num_local_experts=3)


def _gpt_oss() -> Any:
    experts = {"num_local_experts": 3, "num_experts_per_tok": 2}
    rope = {"rope_type": "default", "rope_theta": 10000.0}
    more = {"layer_types": MIXED, "sliding_window": 4, "rope_parameters": rope}
    return transformers.GptOssConfig(**DECODER, **experts, **more, num_hidden_layers=4)


def _whisper() -> Any:
    return transformers.WhisperConfig(
        d_model=32,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=48,
        decoder_ffn_dim=48,
        encoder_layers=3,
        decoder_layers=2,
        vocab_size=VOCAB,
        num_mel_bins=8,
        max_source_positions=16,
        max_target_positions=32,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        decoder_start_token_id=3,
    )


def _t5() -> Any:
    sizes = {"d_model": 32, "d_ff": 48, "d_kv": 8, "num_heads": 4, "num_layers": 3}
    return transformers.T5Config(**sizes, vocab_size=VOCAB, decoder_start_token_id=0)


def _vit() -> Any:
    return transformers.ViTConfig(**VISION, num_labels=5)


def _llava() -> Any:
    return transformers.LlavaConfig(
        vision_config=transformers.CLIPVisionConfig(**VISION),
        text_config=_llama(),
        image_token_index=IMAGE_TOKEN,
        vision_feature_layer=-1,
    )


def _tokens(length: int = 9) -> Tensor:
    generator = torch.Generator().manual_seed(7)
    return torch.randint(4, IMAGE_TOKEN, (2, length), generator=generator)


def _picture(*shape: int) -> Tensor:
    return torch.rand(2, *shape, generator=torch.Generator().manual_seed(8))


def _text_inputs() -> dict[str, Tensor]:
    return {"input_ids": _tokens()}


def _image_inputs() -> dict[str, Tensor]:
    images = torch.full((2, 4), IMAGE_TOKEN)  # 8 x 8 pixels are four patches
    ids = torch.cat([images, _tokens()], dim=1)
    return {"input_ids": ids, "pixel_values": _picture(3, 8, 8)}


@dataclass(frozen=True, slots=True)
class Kind:
    """One architecture.

    Attributes:
        model: The class of transformers.
        config: Makes its small config.
        inputs: Makes what the model reads, in float32 where it is float.
        dtype: Of the saved weights.
        layers: Path of the decoder's layers in a loaded model, "" if it is not stacked here.
        text: Keys that lead to the decoder's part of config.json.
    """

    model: Any
    config: Callable[[], Any]
    inputs: Callable[[], dict[str, Tensor]] = _text_inputs
    dtype: torch.dtype = torch.bfloat16
    layers: str = ""
    text: tuple[str, ...] = ()


KINDS = {
    "llama": Kind(transformers.LlamaForCausalLM, _llama, layers="model.layers"),
    "qwen3": Kind(transformers.Qwen3ForCausalLM, _qwen3, layers="model.layers"),
    "gemma3_text": Kind(transformers.Gemma3ForCausalLM, _gemma3_text, layers="model.layers"),
    "gemma3": Kind(
        transformers.Gemma3ForConditionalGeneration,
        _gemma3,
        inputs=lambda: _image_inputs() | {"token_type_ids": _image_types()},
        layers="model.language_model.layers",
        text=("text_config",),
    ),
    "gpt2": Kind(transformers.GPT2LMHeadModel, _gpt2, dtype=torch.float16, layers="transformer.h"),
    "mixtral": Kind(transformers.MixtralForCausalLM, _mixtral, layers="model.layers"),
    "gpt_oss": Kind(transformers.GptOssForCausalLM, _gpt_oss, layers="model.layers"),
    "whisper": Kind(
        transformers.WhisperForConditionalGeneration,
        _whisper,
        inputs=lambda: {"input_features": _picture(8, 32), "decoder_input_ids": _tokens(5)},
    ),
    "t5": Kind(
        transformers.T5ForConditionalGeneration,
        _t5,
        inputs=lambda: {"input_ids": _tokens(), "decoder_input_ids": _tokens(5)},
    ),
    "vit": Kind(
        transformers.ViTForImageClassification,
        _vit,
        inputs=lambda: {"pixel_values": _picture(3, 8, 8)},
        dtype=torch.float32,
    ),
    "llava": Kind(
        transformers.LlavaForConditionalGeneration,
        _llava,
        inputs=_image_inputs,
        layers="model.language_model.layers",
        text=("text_config",),
    ),
}
"""Every architecture by its name in the tests."""

STACKED = [kind for kind, made in KINDS.items() if made.layers]
"""Those whose decoder is also stacked to another depth."""


def _image_types() -> Tensor:
    return (_image_inputs()["input_ids"] == IMAGE_TOKEN).long()


def build(kind: str, seed: int, **changes: Any) -> Any:
    """Return a model in which every weight is random: gains near 1, all else far from 0.

    Args:
        changes: Values of the config of the decoder.
    """
    made = KINDS[kind]
    config = made.config()
    for key, value in changes.items():
        setattr(config.get_text_config(), key, value)
    generator = torch.Generator().manual_seed(seed)
    model = made.model(config)
    for weight in model.parameters():
        noise = torch.randn(weight.shape, generator=generator)
        with torch.no_grad():
            weight.copy_(weight + 0.1 * noise if weight.ndim < 2 else 0.2 * noise)
    return model.to(made.dtype).eval()


def save(kind: str, folder: Path, seed: int, **changes: Any) -> Path:
    """Save a random model in several files, and return its folder."""
    build(kind, seed, **changes).save_pretrained(folder, max_shard_size=SHARD_BYTES)
    assert len(list(folder.glob("*.safetensors"))) > 1
    return folder


@cache
def pair(kind: str, folder: Path) -> tuple[Path, Path]:
    """Return two saved models of one architecture, made once for each folder."""
    return save(kind, folder / kind / "a", 1), save(kind, folder / kind / "b", 2)


def load(kind: str, folder: Path, dtype: torch.dtype | None = None) -> Any:
    """Load a model as transformers does, and hold it to its files: no key missing or left over."""
    model, found = KINDS[kind].model.from_pretrained(
        folder, output_loading_info=True, dtype=dtype or "auto"
    )
    assert not any(found.values()), found
    return model.eval()


def merge(recipe: dict[str, Any], output: Path, **options: Any) -> Merge:
    """Run a recipe; the output is in shards as small as the inputs."""
    return run(recipe, output, shard_size=SHARD_BYTES, **options)


def logits(kind: str, model: Any, **options: Any) -> Tensor:
    """Return what a model answers to the inputs of its kind."""
    inputs = {
        name: value.to(model.dtype) if value.is_floating_point() else value
        for name, value in KINDS[kind].inputs().items()
    }
    with torch.inference_mode():
        return model(**inputs, **options).logits


def averaged(states: Sequence[dict[str, Tensor]], shares: Sequence[float]) -> dict[str, Tensor]:
    """Return the float32 sums of share times tensor, rounded once to the tensors' own dtype."""
    merged = {}
    for name, first in states[0].items():
        assert first.is_floating_point(), name
        total = torch.zeros(first.shape)
        for state, share in zip(states, shares, strict=True):
            total = total + state[name].float() * share
        merged[name] = total.to(first.dtype)
    return merged


def assert_same_tensors(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    """Hold two sets of tensors to the same names, dtypes and bytes."""
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert found[name].dtype == tensor.dtype, name
        assert torch.equal(found[name], tensor), name


def stored(folder: Path) -> dict[str, Tensor]:
    """Return the tensors of all weight files of a folder and of those inside it, by name."""
    found = {}
    for path in sorted(folder.rglob("*.safetensors")):
        inside = path.parent.relative_to(folder).as_posix()
        lead = "" if inside == "." else f"{inside}/"
        with safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118  (no mapping)
                assert lead + name not in found
                found[lead + name] = file.get_tensor(name)
    return found


def config(folder: Path, *keys: str) -> dict[str, Any]:
    """Return the config.json of a folder, or an object within it."""
    found = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    for key in keys:
        found = found[key]
    return found


def files(folder: Path) -> set[str]:
    """Return the files of a folder, relative with forward slashes."""
    return {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()}


def contents(folder: Path) -> dict[str, bytes]:
    """Return every file of a folder with its bytes."""
    return {name: (folder / name).read_bytes() for name in sorted(files(folder))}
