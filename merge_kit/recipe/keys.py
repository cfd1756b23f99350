"""The keys of the recipe language, each with one line for messages, editors and documentation."""

from __future__ import annotations

from typing import Literal

RECIPE_KEYS = {
    "merge_method": "the method's name, for example linear",
    "base_model": "reference to the base model",
    "models": "list of models, merged layer by layer over the whole stack",
    "shared_experts": "list of one model whose MLPs every token passes, of sparse_upcycle",
    "slices": "list of runs of layers that are stacked in this order",
    "modules": "mapping of a component's name to its own models or slices",
    "tensors": "ordered rules for single tensors, the first that matches wins",
    "parameters": "parameters of the method, for every model and layer",
    "dtype": "dtype of the output",
    "out_dtype": "dtype of what is stored, where it differs from dtype",
    "tokenizer_source": "whose tokenizer files the output takes: base, union or a model",
    "tokenizer": "whose tokenizer files the output takes, as a mapping with the key source",
    "chat_template": "not supported yet",
    "name": "name of a document that other documents refer to",
    "on_conflict": "what to do with integer and bool tensors that differ between models",
    "uses": "adapters to make at once: a folder's name, and the weights of the models in it",
    "seed": "seed of everything random, 0 by default",
    "shard_size": "largest size of an output file, for example 5GB or 2GiB",
    "output": "output folder, relative to the working directory",
}
OUTPUT_KEYS = ("seed", "shard_size", "output")
"""Keys that only the document that is written out may have."""

ENTRY_KEYS = {
    "model": "reference to a model",
    "parameters": "parameters of this model",
}
PROMPT_KEYS = {
    "positive_prompts": "texts that a router is to send to this expert",
    "negative_prompts": "texts that a router is not to send to this expert",
}
EXPERT_KEYS = {**ENTRY_KEYS, **PROMPT_KEYS}
"""Of a model that becomes an expert."""

SOURCE_KEYS = {
    "model": "reference to a model",
    "layer_range": "[first, last + 1] of the source model's layers",
    "layers": "list of the source model's layers in any order, instead of layer_range",
    "parameters": "parameters of this model in this slice",
}
SLICE_KEYS = {
    "sources": "list of models with their layers",
    "merge_method": "method of this slice, instead of the recipe's",
    "base_model": "base of this slice, instead of the recipe's",
    "parameters": "parameters of this slice",
}
MODULE_KEYS = {
    "models": "list of models of this component",
    "slices": "list of runs of layers of this component",
    "parameters": "parameters of this component",
}
RULE_KEYS = {
    "match": "glob over whole tensor names, * also crosses dots",
    "merge_method": "method of these tensors, instead of the recipe's",
    "parameters": "parameters of these tensors, before the recipe's",
    "models": "models of these tensors, instead of the recipe's",
    "copy": "reference to the model whose tensors are taken unchanged",
    "drop": "true: the tensors are left out of the output",
}
SETTING_KEYS = {
    "value": "a value, or a list of values that spans the layers",
    "filter": "part of the tensor names that this value is for; left out, it is for all",
}
REFERENCE_KEYS = {
    "model": "path or Hub id, or a mapping with the keys path and revision",
    "lora": "adapter, or list of adapters, to apply to the model; each may have a weight",
    "override_architecture": "accepted without effect",
}
PATH_KEYS = {
    "path": "path or Hub id, taken literally",
    "revision": "branch, tag or commit on the Hub",
}
ADAPTER_KEYS = {
    **PATH_KEYS,
    "weight": "number that the adapter's change is multiplied by, 1 by default",
}
TOKENIZER_KEYS = {
    "source": "base, union (the default) or a model",
    "tokens": "not supported yet",
    "pad_to_multiple_of": "not supported yet",
}

MOE_KEYS = {
    "base_model": "reference to the model that all but the experts is taken from",
    "experts": "list of models, one expert each",
    "gate_mode": "what the router is made of, hidden by default",
    "experts_per_token": "how many experts a token passes, 2 by default",
    "shared_experts": "list of one model whose MLPs every token passes, of Qwen MoE",
    "architecture": "layout of the output: Mixtral, Qwen MoE or Qwen3 MoE, or how one begins",
    **{key: RECIPE_KEYS[key] for key in ("dtype", "name", "seed", "shard_size", "output")},
}
"""Of a document as mergekit-moe reads it, and beside them what says where the output goes."""

MOE_EXPERT_KEYS = {
    "source_model": "reference to a model",
    **PROMPT_KEYS,
    "noise_scale": "standard deviation of what is added to the expert's matrices, 0 by default",
    "residual_scale": "factor on the expert's down projection, 1 by default",
}

DEAD_KEYS = {
    "int8_mask": "it changes how masks are stored elsewhere, never the result",
    "residual_weight": "the dialect reads it and does nothing with it",
    "consensus_method": "no method reads it",
}
"""Keys and parameters of the dialect that change nothing, and why; accepted at every level."""

DIALECT_PARAMETERS = frozenset(
    {
        *("alpha", "density", "eps", "epsilon", "filter_wise", "gamma", "lambda", "max_iter"),
        *("normalize", "normalize_weights", "nuslerp_flatten", "nuslerp_row_wise", "r"),
        *("rescale", "scale", "select_topk", "t", "tol", "weight"),
    }
)
"""Parameters of the dialect's methods; each is accepted under a method that does not know it."""

CONFLICT_POLICIES: tuple[Literal["error", "base", "first"], ...] = ("error", "base", "first")
