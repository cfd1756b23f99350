"""Small dense models with a tokenizer beside them, and recipes that give their experts prompts."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer
from tokenizers.models import BPE, WordLevel
from tokenizers.pre_tokenizers import ByteLevel, Whitespace
from torch import Tensor, nn

from merge_kit.engine.in_memory import find_each
from merge_kit.engine.kernel import Kernel
from merge_kit.engine.workspace import Workspace
from merge_kit.io.reader import Reader
from merge_kit.plan.building.built import Site
from merge_kit.plan.building.routers import Routers, plan_routers
from merge_kit.plan.building.settings import structure_method
from merge_kit.plan.findings import Findings
from merge_kit.plan.inputs import Inputs
from merge_kit.plan.sources import Source
from merge_kit.plan.steps import StepMaker
from merge_kit.recipe.parse import recipe_from_mapping
from merge_kit.recipe.values import Prompts

HIDDEN, VOCAB, LAYERS = 16, 32, 4
SPECIAL = ("<pad>", "<s>", "</s>", "<unk>")
LETTERS = "Ġabcdefghijklmnopqrstuvwxyz"  # the first stands for a space
WORDS = ("sun", "rain", "wind", "snow", "add", "sum", "times", "root", "code", "loop", "call", "if")
SMALL: dict[str, Any] = {
    "hidden_size": HIDDEN,
    "intermediate_size": 24,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "vocab_size": VOCAB,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
MIXED = ["sliding_attention", "full_attention"] * (LAYERS // 2)
OWN: dict[str, dict[str, Any]] = {
    "llama": {"tie_word_embeddings": False},
    "mistral": {"sliding_window": 3},
    "qwen2": {},
    "qwen3": {"use_sliding_window": True, "sliding_window": 3, "layer_types": MIXED},
}
EVEN: dict[str, Any] = {"use_sliding_window": False, "sliding_window": None, "layer_types": None}
"""What makes the layers of a Qwen alike, as those of a mixture are."""

WEATHER = Prompts(("sun rain wind", "snow wind rain sun snow"))
SUMS = Prompts(("add sum times root", "sum"), ("code loop",))
CODE = Prompts(("loop call if code loop call",))
PROMPTS = (WEATHER, SUMS, CODE)


def tokenizer(kind: str) -> Any:
    """Return a tokenizer of words; for qwen2 one of letters, which its class in transformers is."""
    if kind == "qwen2":
        made = Tokenizer(BPE({name: i for i, name in enumerate((*SPECIAL, *LETTERS))}, []))
        made.pre_tokenizer = ByteLevel(add_prefix_space=False)
    else:
        numbers = {name: i for i, name in enumerate((*SPECIAL, *WORDS))}
        made = Tokenizer(WordLevel(numbers, unk_token="<unk>"))
        made.pre_tokenizer = Whitespace()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=made, bos_token="<s>", pad_token="<pad>", unk_token="<unk>"
    )


def tokenizer_of(normalizer: Any) -> Any:
    """Return a tokenizer of words that changes texts first."""
    made = tokenizer("llama")
    made.backend_tokenizer.normalizer = normalizer
    return made


def ids(kind: str, text: str) -> list[int]:
    """Return the tokens of a prompt, worked out by hand."""
    if kind == "qwen2":
        return [1, *(4 + LETTERS.index(letter) for letter in text.replace(" ", "Ġ"))]
    return [1, *(4 + WORDS.index(word) for word in text.split())]


def build(kind: str, seed: int = 0, **changes: Any) -> Any:
    """Return a dense model all of whose weights are random and far from 0, in float32."""
    config = transformers.CONFIG_MAPPING[kind](**{**SMALL, **OWN[kind], **changes})
    model = transformers.AutoModelForCausalLM.from_config(config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in model.parameters():
            noise = torch.randn(weight.shape, generator=generator)
            weight.copy_(1 + 0.1 * noise if weight.ndim < 2 else 0.3 * noise)
    return model.float().eval()


def save(kind: str, folder: Path, seed: int = 0, **changes: Any) -> Path:
    """Save a dense model with its tokenizer, and return its folder."""
    build(kind, seed, **changes).save_pretrained(folder)
    tokenizer(kind).save_pretrained(folder)
    return folder


def entering(model: Any, tokens: list[int]) -> list[Tensor]:
    """Return what enters each layer's MLP or mixture for a prompt, (tokens, hidden) each."""
    seen: dict[int, Tensor] = {}
    hooks = [
        layer.mlp.register_forward_pre_hook(
            lambda _, given, i=i: seen.__setitem__(i, given[0][0].clone())
        )
        for i, layer in enumerate(model.model.layers)
    ]
    with torch.no_grad():
        model(torch.tensor([tokens]))
    for hook in hooks:
        hook.remove()
    return [seen[i] for i in range(len(hooks))]


def gates(model: Any) -> list[nn.Module]:
    """Return the routers of a loaded mixture."""
    return [layer.mlp.gate for layer in model.model.layers]


def planned(
    base: Path | str,
    router: str,
    prompts: Sequence[Prompts | None] = PROMPTS,
    *,
    shared: Prompts | None = None,
    layers: Sequence[int] = range(LAYERS),
    with_shared: bool = False,
    scale: float | None = None,
    seed: int = 0,
) -> tuple[Site, Routers]:
    """Return the routers of a mixture, and the place of its findings; nothing else is planned."""
    parameters = {"router": router} | ({} if scale is None else {"router_scale": scale})
    recipe = recipe_from_mapping(
        {"merge_method": "sparse_upcycle", "base_model": str(base), "parameters": parameters},
        seed=seed,
    )
    (stage,), findings = recipe.stages, Findings()
    site = Site(stage, Inputs(recipe), findings, StepMaker(stage, recipe.seed, 0), 0)
    method: Any = structure_method(stage)
    assert stage.base_model is not None
    model = site.inputs.find(stage.base_model)
    made = plan_routers(
        site, method, model, prompts, shared, layers, HIDDEN, with_shared=with_shared
    )
    return site, made


def read(site: Site, made: Routers) -> tuple[dict[int, Tensor], dict[int, Tensor]]:
    """Return what the engine finds and reads: routers, and gates of the shared expert."""
    site.findings.raise_any()
    checkpoints = [model.checkpoint for model in site.inputs.models]
    files = [file for c in checkpoints if c is not None for o in c.components for file in o.files]
    found = find_each(made.artefacts, files, {})
    with Reader(files) as reader:
        operands = Kernel(reader, found=found).operands

        def whole(source: Source) -> Tensor:
            return operands.whole(source, torch.float32, Workspace())

        return (
            {layer: whole(source) for layer, source in made.rows.items()},
            {layer: whole(source) for layer, source in made.shared.items()},
        )
