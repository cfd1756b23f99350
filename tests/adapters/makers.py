"""Small random bases, and adapters that peft makes for them with every factor random."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

transformers.utils.logging.disable_progress_bar()

VOCAB, HIDDEN = 40, 16
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
MLP = ["gate_proj", "up_proj", "down_proj"]
_TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None, "vocab_size": VOCAB}
_HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 4}
_DECODER = {**_TOKENS, **_HEADS, "hidden_size": HIDDEN, "num_hidden_layers": 2}


class Net(nn.Module):
    """Convolutions of one and two axes (one of them 1 x 1), an embedding, a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(12, 6)
        self.wave = nn.Conv1d(6, 8, 3, padding=1)
        self.point = nn.Conv2d(8, 10, 1)
        self.image = nn.Conv2d(10, 6, (3, 2), bias=False)
        self.wide = nn.Linear(6, 9)
        self.head = nn.Linear(9, 5, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        x = torch.tanh(self.wave(self.embed(tokens).mT))  # (examples, 8, tokens)
        x = torch.tanh(self.point(x.unflatten(-1, (4, -1))))
        x = torch.tanh(self.image(x)).mean(dim=(-1, -2))
        return self.head(torch.tanh(self.wide(x)))


def _llama(**more: Any) -> Any:
    settings = {"tie_word_embeddings": False, "intermediate_size": 24, **more}
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**_DECODER, **settings))


def _gpt2(**more: Any) -> Any:
    sizes = {"n_embd": HIDDEN, "n_head": 4, "n_layer": 2, "n_positions": 32}
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(**_TOKENS, **sizes, **more))


def _experts(kind: str) -> Any:
    if kind == "mixtral":
        settings = {"num_local_experts": 3, "intermediate_size": 24}
        return transformers.MixtralForCausalLM(transformers.MixtralConfig(**_DECODER, **settings))
    if kind == "qwen3_moe":
        sizes = {"num_experts": 3, "num_experts_per_tok": 2, "moe_intermediate_size": 20}
        settings = {**sizes, "intermediate_size": 24, "decoder_sparse_step": 1}
        return transformers.Qwen3MoeForCausalLM(transformers.Qwen3MoeConfig(**_DECODER, **settings))
    sizes = {"num_local_experts": 3, "num_experts_per_tok": 2, "intermediate_size": 24}
    rope = {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}}
    kinds = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 4}
    return transformers.GptOssForCausalLM(
        transformers.GptOssConfig(**_DECODER, **sizes, **rope, **kinds)
    )


BASES: dict[str, Callable[[], Any]] = {
    "llama": _llama,
    "llama_square": partial(_llama, num_key_value_heads=4),
    "llama_biased": partial(_llama, attention_bias=True, mlp_bias=True),
    "llama_tied": partial(_llama, tie_word_embeddings=True),
    "gpt2": _gpt2,
    "gpt2_untied": partial(_gpt2, tie_word_embeddings=False),
    "mixtral": partial(_experts, "mixtral"),
    "qwen3_moe": partial(_experts, "qwen3_moe"),
    "gpt_oss": partial(_experts, "gpt_oss"),
    "net": Net,
}
"""What makes the model of each base."""

EXPERTS = frozenset({"mixtral", "qwen3_moe", "gpt_oss"})
"""Those with experts; only one of the ways to run these takes float64."""


@dataclass(frozen=True, slots=True)
class Kind:
    """One way to adapt a model.

    Attributes:
        base: A key of `BASES`.
        config: Arguments of LoraConfig.
        touched: What must differ from the base in a merge: one part of a tensor's name each.
    """

    base: str
    config: Mapping[str, Any] = field(default_factory=dict)
    touched: tuple[str, ...] = ()


def _kind(base: str, touched: str, **config: Any) -> Kind:
    return Kind(base, {"r": 4, "lora_alpha": 6, **config}, tuple(touched.split()))


_ALL = "q_proj k_proj v_proj o_proj gate_proj up_proj down_proj"
_FUSED = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]

KINDS = {
    "plain": _kind("llama", _ALL, target_modules=[*ATTENTION, *MLP]),
    "all_linear": _kind("llama", _ALL, target_modules="all-linear"),
    "regex_target": _kind(
        "llama", "layers.1.self_attn.q_proj", target_modules=r".*\.1\.self_attn\.q_proj"
    ),
    "rslora": _kind("llama", "q_proj v_proj", target_modules=["q_proj", "v_proj"], use_rslora=True),
    "rank_pattern": _kind(
        "llama",
        _ALL,
        target_modules=[*ATTENTION, *MLP],
        rank_pattern={r"layers\.1\..*": 3, "q_proj": 2, r"self_attn\.(k|v)_proj": 5},
    ),
    "alpha_pattern": _kind(
        "llama",
        _ALL,
        target_modules=[*ATTENTION, *MLP],
        alpha_pattern={
            "down_proj": 1,
            "layers.0.mlp.up_proj": 9,
            r"model\.layers\.\d+\.mlp.*": 20,
        },
    ),
    "both_patterns": _kind(
        "llama",
        _ALL,
        target_modules=[*ATTENTION, *MLP],
        use_rslora=True,
        rank_pattern={r".*\.0\.self_attn\.[qk]_proj": 2, "^up_proj": 1, "o_proj": 7},
        alpha_pattern={r"self_attn\.[qkvo]_proj": 3, "up_proj": 11},
    ),
    "layers_to_transform": _kind(
        "llama",
        "layers.1.self_attn.q_proj",
        target_modules=["q_proj"],
        layers_to_transform=[1],
        layers_pattern="layers",
    ),
    "fan_in_fan_out": _kind(
        "gpt2",
        "c_attn c_proj c_fc",
        target_modules=["c_attn", "c_proj", "c_fc"],
        fan_in_fan_out=True,
    ),
    "fan_in_fan_out_mixed": _kind(
        "gpt2_untied", "c_attn lm_head", target_modules=["c_attn", "lm_head"], fan_in_fan_out=True
    ),
    "embedding": _kind("llama", "embed_tokens q_proj", target_modules=["embed_tokens", "q_proj"]),
    "embedding_rslora": _kind(
        "llama", "embed_tokens", target_modules=["embed_tokens"], use_rslora=True
    ),
    "embedding_alone": _kind("net", "embed", target_modules=["embed"]),
    "conv1d": _kind("net", "wave", target_modules=["wave"]),
    "conv2d": _kind("net", "image", target_modules=["image"]),
    "conv2d_1x1": _kind("net", "point", target_modules=["point"], use_rslora=True),
    "net": _kind(
        "net",
        "embed wave point image wide",
        target_modules=["embed", "wave", "point", "image", "wide"],
        rank_pattern={"image": 3},
        alpha_pattern={"wave": 10},
    ),
    "dora": _kind("llama", _ALL, target_modules=[*ATTENTION, *MLP], use_dora=True),
    "dora_biased": _kind("llama_biased", "q_proj", target_modules=["q_proj"], use_dora=True),
    "dora_rslora": _kind(
        "llama", "q_proj", target_modules=["q_proj"], use_dora=True, use_rslora=True
    ),
    "dora_fan_in_fan_out": _kind(
        "gpt2",
        "c_attn c_proj",
        target_modules=["c_attn", "c_proj"],
        use_dora=True,
        fan_in_fan_out=True,
    ),
    "dora_conv": _kind(
        "net", "wave point image", target_modules=["wave", "point", "image"], use_dora=True
    ),
    "dora_embedding": _kind(
        "llama", "embed_tokens", target_modules=["embed_tokens"], use_dora=True
    ),
    "lora_bias": _kind(
        "llama_biased",
        "q_proj up_proj",
        target_modules=["q_proj", "up_proj"],
        lora_bias=True,
        use_rslora=True,
    ),
    "lora_bias_conv": _kind("net", "wave point", target_modules=["wave", "point"], lora_bias=True),
    "bias_all": _kind(
        "llama_biased",
        "q_proj.weight bias",
        target_modules=["q_proj"],
        bias="all",
    ),
    "bias_lora_only": _kind(
        "llama_biased", "q_proj.weight q_proj.bias", target_modules=["q_proj"], bias="lora_only"
    ),
    "head_saved": _kind(
        "llama", "q_proj lm_head", target_modules=["q_proj"], modules_to_save=["lm_head"]
    ),
    "norms_saved": _kind(
        "llama",
        "norm v_proj",
        target_modules=["v_proj"],
        modules_to_save=["norm", "input_layernorm"],
    ),
    "linear_saved": _kind(
        "llama_biased",
        "q_proj gate_proj.weight gate_proj.bias",
        target_modules=["q_proj"],
        modules_to_save=["gate_proj"],
    ),
    "tokens": _kind(
        "llama",
        "embed_tokens q_proj",
        target_modules=["q_proj"],
        trainable_token_indices=[3, 17, 5],
    ),
    "tokens_of_both": _kind(
        "llama",
        "embed_tokens lm_head q_proj",
        target_modules=["q_proj"],
        trainable_token_indices={"embed_tokens": [3, 39], "lm_head": [2]},
    ),
    "mixtral": _kind(
        "mixtral", "experts q_proj", target_modules=["q_proj"], target_parameters=_FUSED
    ),
    "qwen3_moe": _kind(
        "qwen3_moe", "experts", target_modules=[], target_parameters=_FUSED, use_rslora=True
    ),
    "gpt_oss": _kind(
        "gpt_oss", "experts q_proj", target_modules=["q_proj"], target_parameters=_FUSED
    ),
    "tied_head": _kind("llama_tied", "lm_head q_proj", target_modules=["lm_head", "q_proj"]),
    "tied_embedding": _kind(
        "llama_tied", "embed_tokens q_proj", target_modules=["embed_tokens", "q_proj"]
    ),
    "tied_tokens": _kind(
        "llama_tied", "embed_tokens q_proj", target_modules=["q_proj"], trainable_token_indices=[3]
    ),
}
"""Every way in which peft adapts the weights of a model.

Patterns stand in the order of the alphabet: peft sorts them when it saves, and the first that fits
counts, so that in another order its own files mean something else than what was trained.
"""

DORA = frozenset(name for name, kind in KINDS.items() if kind.config.get("use_dora"))


@contextmanager
def quiet() -> Iterator[None]:
    """Ignore what peft says about settings that are meant here."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def randomise(model: nn.Module, seed: int, scale: float = 0.3) -> None:
    """Fill every parameter: gains near 1, all else far from 0."""
    generator = torch.Generator().manual_seed(seed)
    for weight in model.parameters():
        noise = torch.randn(weight.shape, generator=generator, dtype=torch.float64)
        around = 1.0 if weight.ndim == 1 else 0.0
        with torch.no_grad():
            weight.copy_(around + scale * noise)


def make_base(kind: str, folder: Path, dtype: torch.dtype = torch.float64, seed: int = 1) -> Path:
    """Save a random model and return its folder."""
    model = BASES[kind]().to(torch.float64)
    randomise(model, seed)
    model = model.to(dtype)
    if isinstance(model, Net):
        folder.mkdir(parents=True)
        save_file(model.state_dict(), folder / "model.safetensors")
        (folder / "config.json").write_text('{"model_type": "net", "dtype": "float64"}\n')
    else:
        model.save_pretrained(folder)
    return folder


def load_base(kind: str, folder: Path, dtype: torch.dtype = torch.float64) -> Any:
    """Load a base, or what was merged from it, and hold it to its files."""
    if BASES[kind] is Net:
        model = Net().to(dtype)
        model.load_state_dict(load_file(folder / "model.safetensors"), strict=True)
        return model.eval()
    more = {"experts_implementation": "eager"} if kind in EXPERTS else {}
    model, found = type(BASES[kind]()).from_pretrained(
        folder, output_loading_info=True, dtype=dtype, **more
    )
    assert not any(found.values()), found
    return model.eval()


def make_adapter(
    base: str,
    base_folder: Path,
    folder: Path,
    *,
    seed: int = 11,
    dtype: torch.dtype = torch.float32,
    **config: Any,
) -> Path:
    """Save an adapter of a base, every tensor of it random, and return its folder."""
    with quiet():
        model = peft.get_peft_model(
            load_base(base, base_folder), peft.LoraConfig(**config), autocast_adapter_dtype=False
        )
        fill(model, seed)
        model.save_pretrained(folder)
    _cast(folder, dtype)
    settings = json.loads((folder / "adapter_config.json").read_text())
    settings["base_model_name_or_path"] = base_folder.name
    (folder / "adapter_config.json").write_text(json.dumps(settings, indent=2) + "\n")
    return folder


def fill(model: nn.Module, seed: int) -> None:
    """Make what training would have changed random, and the lengths of DoRA all different."""
    generator = torch.Generator().manual_seed(seed)
    for name, weight in model.named_parameters():
        if not weight.requires_grad:
            continue
        noise = torch.randn(weight.shape, generator=generator, dtype=torch.float64)
        with torch.no_grad():
            if "magnitude" in name:
                weight.mul_(1 + 0.2 * noise.to(weight.dtype))
            else:
                weight.copy_(weight * ("lora_" not in name) + 0.3 * noise)


def _cast(folder: Path, dtype: torch.dtype) -> None:
    """Give an adapter's tensors a dtype, but for weights of the base that peft saves with them."""
    file = folder / "adapter_model.safetensors"
    tensors = {
        name: (tensor if "base_layer.weight" in name else tensor.to(dtype)).contiguous()
        for name, tensor in load_file(file).items()
    }
    save_file(tensors, file, metadata={"format": "pt"})


def make(kind: str, folder: Path, **more: Any) -> tuple[Path, Path]:
    """Return base and adapter of a kind, made in a folder."""
    made = KINDS[kind]
    base = make_base(made.base, folder / "base")
    return base, make_adapter(made.base, base, folder / "adapter", **{**made.config, **more})


def load_adapted(base: str, base_folder: Path, *adapters: Path) -> Any:
    """Return peft's model of a base with adapters, everything in float64.

    Nothing may be missing or left over: peft says so in warnings, which are errors here, and in
    what loading returns.
    """
    model = load_base(base, base_folder)
    with quiet():
        adapted = peft.PeftModel.from_pretrained(
            model, adapters[0], adapter_name="a0", autocast_adapter_dtype=False
        )
    for i, adapter in enumerate(adapters):
        with quiet():
            found = adapted.load_adapter(adapter, f"a{i}", autocast_adapter_dtype=False)
        assert not found.unexpected_keys, found
        missing = [key for key in found.missing_keys if f".a{i}" in key]
        assert not missing, missing
    names = [f"a{i}" for i in range(len(adapters))]
    if len(names) > 1:
        adapted.base_model.set_adapter(names)
    return adapted.to(torch.float64).eval()


def tokens() -> Tensor:
    """Return two runs of tokens that every vocabulary here has."""
    return torch.tensor([[3, 5, 1, 9, 2, 4, 7, 3], [1, 11, 3, 6, 6, 10, 2, 8]])


def answers(model: Any) -> Tensor:
    """Return the logits of a model for the tokens."""
    with torch.inference_mode():
        found = model(tokens())
    return found if isinstance(found, Tensor) else found.logits


def tensors(folder: Path) -> dict[str, Tensor]:
    """Return every tensor of a folder's weight files by name."""
    found: dict[str, Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        found |= load_file(path)
    return found


def scale(model: nn.Module, weights: Sequence[float]) -> nn.Module:
    """Multiply what each adapter of peft's model adds, and return the model."""
    for module in model.modules():
        scaling = getattr(module, "scaling", None)
        for i, weight in enumerate(weights):
            if isinstance(scaling, dict) and f"a{i}" in scaling:
                scaling[f"a{i}"] *= weight
    return model


def changed(base: str, base_folder: Path, changes: Mapping[str, Tensor]) -> Any:
    """Return a base in float64 with something added to its tensors."""
    model = load_base(base, base_folder)
    for name, change in changes.items():
        with torch.no_grad():
            model.get_parameter(name).add_(change)
    return model
