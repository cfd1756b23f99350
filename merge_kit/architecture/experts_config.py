"""The config.json of a mixture of experts, made of a dense model's by single edits."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from merge_kit.architecture.config import Config, Edit, edit_config, read_config
from merge_kit.architecture.experts import Layout
from merge_kit.architecture.experts_windows import (
    attention_kinds,
    window_problem,
    window_values,
)

WHERE = "config.json"
_THETA = "rope_theta"

DEFAULTS: Mapping[str, Mapping[str, Any]] = {
    "llama": {
        "vocab_size": 32000,
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": None,
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-6,
        "bos_token_id": 1,
        "eos_token_id": 2,
        _THETA: 10000.0,
    },
    "mistral": {
        "vocab_size": 32000,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-6,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "sliding_window": 4096,
        _THETA: 10000.0,
    },
    "qwen2": {
        "hidden_size": 4096,
        "intermediate_size": 22016,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
    },
    "qwen3": {
        "hidden_size": 4096,
        "intermediate_size": 22016,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "head_dim": 128,
    },
}
"""What a key means that a dense model's config leaves out, where a sparse one's would differ."""

DENSE_ONLY = ("pretraining_tp", "mlp_bias", "auto_map")
"""Keys that say nothing of a sparse model: `pretraining_tp` is how a product is cut in pieces,
`mlp_bias` is false where a model is taken at all, and `auto_map` names the dense model's code."""

HEADS = (
    "ForCausalLM",
    "ForSequenceClassification",
    "ForTokenClassification",
    "ForQuestionAnswering",
    "Model",
)
"""What follows the beginning of a class's name, alike in dense models and their sparse twins."""


@dataclass(frozen=True, slots=True)
class Sparsity:
    """What a config says of experts.

    Attributes:
        experts: In each sparse layer.
        top_k: Of which a token passes.
        expert_width: Elements between the projections of an expert.
        shared_width: The same of the expert that every token passes, 0 where there is none.
        layers: Of the whole model.
        dense_layers: Those without experts.
    """

    experts: int
    top_k: int
    expert_width: int
    shared_width: int
    layers: int
    dense_layers: tuple[int, ...]


def sparse_config(text: str, layout: Layout, sparsity: Sparsity) -> str:
    """Return a dense model's config as that of a mixture of experts.

    Keys that both know stay as they are; those that the dense model leaves to its class are
    written where the sparse class has another default.

    Args:
        text: Of a config that has no `config_problem`.

    Raises:
        CheckpointError: If the text is no valid config.
    """
    config = read_config(text, WHERE)
    values = {
        **_implied(config, layout),
        **_classes(config, layout),
        "model_type": layout.model_type,
        **_widths(layout, sparsity),
        layout.count_key: sparsity.experts,
        "num_experts_per_tok": sparsity.top_k,
        **window_values(config, layout, sparsity.layers),
        "output_router_logits": False,
        "router_aux_loss_coef": 0.001,
    }
    removed = [key for key in DENSE_ONLY if key in config]
    if "attention_bias" in config and layout.model_type != "qwen3_moe":
        removed.append("attention_bias")
    if config.get("head_dim", 0) is None and layout.model_type != "mixtral":
        removed.append("head_dim")
    if layout.model_type == "qwen3_moe" and "layer_types" in config:
        removed.append("layer_types")
    edits = [Edit((key,), value) for key, value in values.items() if _differs(config, key, value)]
    return edit_config(text, [*(Edit((key,), remove=True) for key in removed), *edits], WHERE)


def config_problem(config: Config, layout: Layout, layers: int) -> str:
    """Return what a dense config says that the layout cannot, "" if there is nothing."""
    if config.get("mlp_bias"):
        return f"mlp_bias is true, and experts of a {layout.model_type} have no biases"
    if config.get("attention_bias") and layout.model_type != "qwen3_moe":
        return f"attention_bias is true, and a {layout.model_type} has no bias after its attention"
    problem = window_problem(config, layers)
    if problem:
        return problem
    if layout.model_type == "qwen3_moe" and len(set(attention_kinds(config, layers))) > 1:
        return (
            "some layers have a sliding window (layer_types, max_window_layers), and a qwen3_moe "
            "has one in all layers or in none"
        )
    names = config.get("architectures")
    for name in names if isinstance(names, list) else ():
        if _twin(str(name), layout) is None:
            return f"the class {name} has no sparse twin"
    return ""


def _differs(config: Config, key: str, value: Any) -> bool:
    """Return whether a key must be written; 1 and true are not the same in JSON."""
    return key not in config or repr(config[key]) != repr(value)


def _implied(config: Config, layout: Layout) -> dict[str, Any]:
    """Return what the dense class has where its config is silent."""
    defaults = dict(DEFAULTS[str(config["model_type"])])
    theta = defaults.pop(_THETA, None)
    found = {key: value for key, value in defaults.items() if key not in config}
    heads = config.get("num_attention_heads", found.get("num_attention_heads"))
    if config.get("num_key_value_heads", found.get("num_key_value_heads")) is None:
        found["num_key_value_heads"] = heads
    scaling = (config.get(key) for key in ("rope_parameters", "rope_scaling"))
    holders = [config, *(held for held in scaling if isinstance(held, dict))]
    wanted = theta is not None and layout.model_type == "mixtral"
    if wanted and not any(_THETA in holder for holder in holders):
        found[_THETA] = theta
    return found


def _classes(config: Config, layout: Layout) -> dict[str, Any]:
    names = config.get("architectures")
    listed = [str(name) for name in names] if isinstance(names, list) and names else [""]
    twins = [_twin(name, layout) or f"{layout.class_prefix}ForCausalLM" for name in listed]
    return {"architectures": twins}


def _twin(name: str, layout: Layout) -> str | None:
    """Return the sparse class that does what a dense one does, or None."""
    for prefix in layout.sources.values():
        head = name.removeprefix(prefix)
        if head != name and head in HEADS:
            return layout.class_prefix + head
    return None


def _widths(layout: Layout, sparsity: Sparsity) -> dict[str, Any]:
    if layout.model_type == "mixtral":
        return {"intermediate_size": sparsity.expert_width}
    found: dict[str, Any] = {"moe_intermediate_size": sparsity.expert_width}
    if layout.shared:
        found["shared_expert_intermediate_size"] = sparsity.shared_width
    return {
        **found,
        "decoder_sparse_step": 1,
        "mlp_only_layers": list(sparsity.dense_layers),
        "norm_topk_prob": True,
    }
