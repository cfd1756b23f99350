"""How programs that load a base name its modules, and which of its tensors are factored."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from merge_kit.architecture.config import class_of
from merge_kit.architecture.ties import is_head
from merge_kit.core.dtypes import is_float
from merge_kit.core.tensors import TensorSpec
from merge_kit.io.adapter_values import Kind

_CORES = {
    "gpt2": "transformer",
    "gpt_neo": "transformer",
    "gptj": "transformer",
    "gpt_bigcode": "transformer",
    "bloom": "transformer",
    "falcon": "transformer",
    "codegen": "transformer",
    "mpt": "transformer",
    "ctrl": "transformer",
    "xlnet": "transformer",
    "openai-gpt": "transformer",
    "gpt_neox": "gpt_neox",
    "bert": "bert",
    "roberta": "roberta",
    "xlm-roberta": "roberta",
    "distilbert": "distilbert",
    "electra": "electra",
    "albert": "albert",
    "deberta": "deberta",
    "deberta-v2": "deberta",
    "vit": "vit",
}
"""Where models with a head keep the model without one, by model_type; "model" for all others."""

_BARE = ("layers.", "embed_tokens.", "decoder.layers.", "decoder.embed_tokens.")
"""How names begin that lack "model."."""

_COMPOSED = (
    *("aria", "aya_vision", "gemma3", "got_ocr2", "internvl", "llava", "llava_next"),
    *("llava_next_video", "llava_onevision", "mistral3", "mllama", "paligemma", "vipllava"),
)
_OF_COMPOSED = (
    ("language_model.lm_head.", "lm_head."),
    ("language_model.model.", "model.language_model."),
    ("vision_tower.", "model.vision_tower."),
    ("vision_model.", "model.vision_model."),
    ("multi_modal_projector.", "model.multi_modal_projector."),
)
_VISUAL = ("qwen2_vl", "qwen2_5_vl")
_OF_VISUAL = (("visual.", "model.visual."), ("model.", "model.language_model."))
"""How files of models with pictures begin names, by model_type, and how programs do today."""

_OF_NEOX = (("embed_out.", "lm_head."),)
"""What files of GPT-NeoX call the head, and what programs do today."""

_TABLE = re.compile(r"embed|^wte$|^wpe$|^shared$|position|token_type|attention_bias$")
_ROUTERS = ("gate", "router", "shared_expert_gate")
_EXPERT = re.compile(r"\.experts\.\d+\.")
_CONV_AXES = (3, 4, 5)

TASKS = {
    "ForCausalLM": "CAUSAL_LM",
    "LMHeadModel": "CAUSAL_LM",
}
"""Ends of an architecture's name, and what peft calls its task."""


def task_type(config: Mapping[str, Any] | None) -> str | None:
    """Return what peft calls the task of a model; None where it needs no name."""
    name = class_of(config)
    return next((task for end, task in TASKS.items() if name.endswith(end)), None)


@dataclass(frozen=True, slots=True)
class Naming:
    """How programs name the modules of a model that has files of these names.

    Attributes:
        prefix: What stands before names of files that a model without a head has written: what is
            "h.0.attn.c_attn.weight" there is "transformer.h.0.attn.c_attn.weight" for GPT-2.
        renamed: How names begin, and how they begin today; the first that fits counts.
    """

    prefix: str = ""
    renamed: tuple[tuple[str, str], ...] = ()

    def module(self, name: str) -> str:
        """Return the path of the module that has a tensor."""
        for old, new in self.renamed:
            if name.startswith(old):
                name = new + name.removeprefix(old)
                break
        whole = name if not self.prefix or is_head(name) else self.prefix + name
        return whole.rpartition(".")[0]


def naming(config: Mapping[str, Any] | None, names: Iterable[str]) -> Naming:
    """Return how programs name the modules of a model."""
    names, kind = list(names), str((config or {}).get("model_type", ""))
    if kind in _COMPOSED and any(name.startswith("language_model.") for name in names):
        return Naming(renamed=_OF_COMPOSED)
    if kind in _VISUAL and any(name.startswith("visual.") for name in names):
        return Naming(renamed=_OF_VISUAL)
    renamed = _OF_NEOX if kind == "gpt_neox" else ()
    name = class_of(config)
    bare = name.endswith(("Model", "Encoder")) and not name.endswith("LMHeadModel")
    core = _CORES.get(kind)
    if not name or bare or any(name.startswith(f"{core or 'model'}.") for name in names):
        return Naming(renamed=renamed)
    cut = any(name.startswith(_BARE) for name in names)
    return Naming(f"{core}." if core is not None else "model." if cut else "", renamed)


def is_expert(module: str) -> bool:
    """Return whether a module is one expert of several that files store apart.

    Programs lay them together as they load: their factors must all have one rank, and none may be
    left out if one is there.
    """
    return _EXPERT.search(module) is not None


def module_now(module: str) -> str:
    """Return the path that a module has today, where programs have renamed it since files had it.

    For what is stored whole: peft translates the names of factors by itself.
    """
    return module.replace(".block_sparse_moe.", ".mlp.")


def factored_kind(name: str, spec: TensorSpec) -> Kind | None:
    """Return as what a tensor is factored; None for what has no low rank by its nature.

    Weights of embeddings, heads and routers of experts have two axes too; depthwise convolutions
    have one input each.
    """
    path, _, last = name.rpartition(".")
    leaf = path.rpartition(".")[2]
    if last != "weight" or not is_float(spec.dtype) or not spec.numel:
        return None
    if _TABLE.search(leaf) or leaf in _ROUTERS or is_head(name):
        return None
    if len(spec.shape) == 2:
        return "linear"
    return "convolution" if len(spec.shape) in _CONV_AXES and spec.shape[1] > 1 else None


def short_targets(chosen: Collection[str], modules: Iterable[str]) -> list[str] | None:
    """Return the ends of names that choose modules and nothing else of the model.

    The last part of a name where that is enough, else the whole name: peft takes every module that
    ends with it, one that only has others inside as well ("blocks.0" for "0").

    Args:
        chosen: Modules to choose.
        modules: All modules of the model that have tensors.

    Returns:
        None if a whole name is the end of another one.
    """
    every, found = set(modules), set()
    containers = {above for module in every for above in _above(module)}
    others = (every | containers) - set(chosen)
    taken = {module.rpartition(".")[2] for module in others}
    taken |= {part for module in every for part in module.split(".")[:-1]}
    for module in chosen:
        leaf = module.rpartition(".")[2]
        found.add(module if leaf in taken or leaf.isdecimal() else leaf)
    ends = tuple(f".{name}" for name in found)
    return None if any(module.endswith(ends) for module in others) else sorted(found)


def _above(module: str) -> Iterator[str]:
    """Yield the modules that a module is inside of."""
    while "." in module:
        module = module.rpartition(".")[0]
        yield module
