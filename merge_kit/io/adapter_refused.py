"""What is not supported in adapters, by the name that people know it by."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from merge_kit.core.names import nearest
from merge_kit.errors import CheckpointError
from merge_kit.io.strict_json import shown

_MERGE = "merge it into its base with the library that made it, and name the merged model"
_RESIDUAL = (
    "save it once more with peft's save_pretrained(..., path_initial_model_for_weight_conversion="
    "...), which makes it a plain LoRA"
)
_HARMLESS_INITS = {"true", "false", "gaussian", "eva", "orthogonal", "mica"}
_CHANGING_INITS = ("pissa", "olora", "corda", "lora_ga", "loraga", "loftq")
_FAMILIES = {
    "ADALORA": "AdaLoRA",
    "IA3": "IA3",
    "LOHA": "LoHa",
    "LOKR": "LoKr",
    "OFT": "OFT",
    "BOFT": "BOFT",
    "VERA": "VeRA",
    "PREFIX_TUNING": "prefix tuning",
    "P_TUNING": "p-tuning",
    "PROMPT_TUNING": "prompt tuning",
    "XLORA": "X-LoRA",
}
_NOT_MERGEABLE = {"PREFIX_TUNING", "P_TUNING", "PROMPT_TUNING", "MULTITASK_PROMPT_TUNING"}
_CHANGES: Mapping[str, str] = {
    "alora_invocation_tokens": "activated LoRA, which is off until certain tokens appear",
    "arrow_config": "Arrow, which chooses among adapters for every token",
    "enable_lora": "the merged linear layers of an early peft",
    "kasa_config": "KaSA, which truncates the base and scales each rank",
    "layer_replication": "replicated layers",
    "megatron_config": "the parallel layers of Megatron",
    "monteclora_config": "MonteCLoRA, which draws random weights",
    "use_bdlora": "BD-LoRA, whose factors are blocks",
    "use_qalora": "QA-LoRA, which pools the inputs of quantised layers",
    "velora_config": "VeLoRA",
}
_HARMLESS = frozenset(
    (
        *("peft_type", "peft_version", "task_type", "auto_mapping", "inference_mode", "revision"),
        *("base_model_name_or_path", "r", "lora_alpha", "lora_dropout", "rank_pattern", "bias"),
        *("alpha_pattern", "use_rslora", "use_dora", "fan_in_fan_out", "target_modules"),
        *("exclude_modules", "layers_to_transform", "layers_pattern", "modules_to_save"),
        *("trainable_token_indices", "target_parameters", "lora_bias", "init_lora_weights"),
        *("loftq_config", "eva_config", "corda_config", "lora_ga_config", "megatron_core"),
        *("qalora_group_size", "ensure_weight_tying", "runtime_config", "merge_weights"),
        *("lora_dtype", "lorap_lr_ratio", "lorap_emb_lr", "loraplus_lr_ratio"),
    )
)
"""Keys that are read elsewhere, or say how the adapter was trained or is found."""

_TENSORS: tuple[tuple[re.Pattern[str], str], ...] = tuple(
    (re.compile(pattern), what)
    for pattern, what in (
        (r"(^|[._])hada_[wt]", "LoHa"),
        (r"(^|[._])lokr_[wt]", "LoKr"),
        (r"\.lora_(down|up)\.\d+\.", "a split change (split_dims)"),
        (r"\.lora_[ab]$", "MLX's LoRA"),
        (r"\.lora_mid\.", "LoCon with a core tensor (lora_mid)"),
        (r"(^|[._])(oft_|boft_)|\.oft_?(R|blocks|diag)", "OFT"),
        (r"(^|[._])(ia3_l|on_input$)", "IA3"),
        (r"(^|\.)vera_lambda_", "VeRA"),
        (r"\.lora_E(\.|$)|\.ranknum(\.|$)", "AdaLoRA"),
        (r"\.lora_diag(\.|$)", "KaSA"),
        (r"\.lora_monteclora_", "MonteCLoRA"),
        (r"\.lora_velora_", "VeLoRA"),
        (r"(^|\.)prompt_embeddings$", "prompt tuning"),
        (r"\.(qweight|qzeros|g_idx|scales|SCB|absmax|quant_map|quant_state\.\S+)$", "quantisation"),
        (r"\.(diff|diff_b|set_weight|reshape_weight)$", "whole differences beside low ranks"),
        (r"\.(w_norm|b_norm)$", "differences of norms"),
        (r"(^|\.)(bundle_emb|emb_params|string_to_param)\b", "a textual inversion"),
    )
)


def check_supported(config: Mapping[str, Any], *, where: str) -> None:
    """Refuse a config that asks for what is not supported.

    Raises:
        CheckpointError: It names the key and what it means.
    """
    kind = config.get("peft_type", "LORA")
    if not isinstance(kind, str) or kind.upper() != "LORA":
        raise _other_type(kind, where)
    _check_init(config.get("init_lora_weights", True), where)
    for key, value in config.items():
        if key in _HARMLESS or value is None or value is False or value in ([], {}, ""):
            continue
        if key in _CHANGES:
            problem = f"{key} is set: {_CHANGES[key]}, is not supported"
            raise CheckpointError(problem, where=where, hint=_MERGE)
        problem = f"{shown(key)} is {shown(value)}, and what it changes is not known"
        hint = f"remove it if it changes nothing; {nearest(key[:80], _HARMLESS)}"
        raise CheckpointError(problem, where=where, hint=hint)


def _other_type(kind: object, where: str) -> CheckpointError:
    name = str(kind).upper()
    shown_name = _FAMILIES.get(name, shown(kind)) if isinstance(kind, str) else shown(kind)
    problem = f"peft_type is {shown_name}, expected LORA"
    if name in _NOT_MERGEABLE:
        hint = "it changes the input, not the weights: nothing can be merged"
    elif name in _FAMILIES:
        hint = _MERGE
    else:
        hint = nearest(name[:80], ["LORA", *_FAMILIES])
    return CheckpointError(problem, where=where, hint=hint)


def _check_init(value: object, where: str) -> None:
    name = str(value).lower()
    if value is None or isinstance(value, bool) or name in _HARMLESS_INITS:
        return
    if isinstance(value, str) and name.startswith(_CHANGING_INITS):
        problem = f"init_lora_weights is {shown(value)}: the base was changed when it was made"
        hint = _MERGE if name.startswith("loftq") else _RESIDUAL
        raise CheckpointError(problem, where=where, hint=hint)
    problem = f"init_lora_weights is {shown(value)}, and whether it changes the base is not known"
    raise CheckpointError(problem, where=where, hint=nearest(name[:80], _HARMLESS_INITS))


_OTHER_FAMILIES = {"LoHa", "LoKr", "OFT", "IA3", "VeRA", "AdaLoRA"}


def is_other_family(name: str) -> bool:
    """Return whether a tensor belongs to an adapter that is no LoRA."""
    return refused_tensor(name) in _OTHER_FAMILIES


def refused_tensor(name: str) -> str:
    """Return what a tensor belongs to that is not supported, or ""."""
    return next((what for pattern, what in _TENSORS if pattern.search(name)), "")


def refusal(name: str, what: str, where: str) -> CheckpointError:
    """Return the error for a tensor of an adapter that is not supported."""
    problem = f"tensor {shown(name)} belongs to {what}, which is not supported"
    return CheckpointError(problem, where=where, hint=_MERGE)
