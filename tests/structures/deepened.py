"""Tiny random models, deeper ones made of their layers by hand, and what they all compute.

The deeper model knows nothing of files or of recipes: layer modules of loaded models are copied
into a new list, numbered anew, and the config is written by hand.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
import transformers
from families import IMAGE, WINDOW, Family
from torch import Tensor
from torch.nn import ModuleList

Layer = tuple[str, int]
Order = Sequence[Layer]
Sources = Mapping[str, Any]


def build(family: Family, name: str, seed: int) -> Any:
    """Return a model in which every weight is random: gains near 1, all else far from 0."""
    model = family.model(family.config(family.depth(name)))
    generator = torch.Generator().manual_seed(seed)
    for weight in model.parameters():
        noise = torch.randn(weight.shape, generator=generator)
        with torch.no_grad():
            weight.copy_(weight + 0.1 * noise if weight.ndim < 2 else 0.25 * noise)
    return model.eval()


def load(family: Family, folder: Path) -> Any:
    """Load a model as transformers does; no key may be missing, left over or of another shape."""
    model, found = family.model.from_pretrained(folder, output_loading_info=True)
    assert not any(found.values()), found
    return model.eval()


def text_of(config: Any) -> Any:
    """Return the part of a config that describes the decoder."""
    return config.text_config if hasattr(config, "text_config") else config


def deeper(
    family: Family, sources: Sources, order: Order, *, types: Sequence[str] | None = None
) -> Any:
    """Return the model of these layers, made of copies of the modules of loaded models.

    Args:
        types: Types of the layers in place of those that they have in their own models.
    """
    first, last = sources[order[0][0]], sources[order[-1][0]]
    config = deepcopy(first.config)
    text = text_of(config)
    setattr(text, family.counted, len(order))
    if family.types:
        own = [family.types(family.depth(name))[layer] for name, layer in order]
        text.layer_types = list(types or own)
    family.per_layer(text, [(text_of(sources[name].config), layer) for name, layer in order])
    model = family.model(config)
    parent, _, listed = family.layers.rpartition(".")
    text = model.get_submodule(parent).config
    copies = []
    for number, (name, layer) in enumerate(order):
        copies.append(deepcopy(sources[name].get_submodule(family.layers)[layer]))
        _renumber(copies[-1], number, text, types[number] if types else None)
    setattr(model.get_submodule(parent), listed, ModuleList(copies))
    for source, paths in ((first, family.embed), (last, family.after)):
        for path in paths:
            if path == "lm_head" and text_of(first.config).tie_word_embeddings:
                continue  # is the embedding that leads in
            model.get_submodule(path).load_state_dict(source.get_submodule(path).state_dict())
    model.tie_weights()
    return model.eval()


def _renumber(layer: torch.nn.Module, number: int, config: Any, kind: str | None) -> None:
    for module in layer.modules():
        if hasattr(module, "layer_idx"):
            module.layer_idx = number
        if hasattr(module, "config"):
            module.config = config
        if kind and hasattr(module, "sliding_window"):
            module.sliding_window = WINDOW if kind == "sliding_attention" else None
            module.layer_type = kind


def tokens(length: int, seed: int = 7) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(4, IMAGE, (2, length), generator=generator)


def _sound() -> Tensor:
    return torch.rand(2, 8, 32, generator=torch.Generator().manual_seed(8))


def inputs(family: Family, ids: Tensor) -> dict[str, Tensor]:
    """Return what a forward pass reads, with these tokens for the decoder."""
    if family.counted == "num_decoder_layers":
        return {"input_ids": tokens(6, seed=9), "decoder_input_ids": ids}
    if family.counted == "decoder_layers":
        return {"input_features": _sound(), "decoder_input_ids": ids}
    return {"input_ids": ids}


@torch.inference_mode()
def forward(family: Family, model: Any, ids: Tensor) -> Tensor:
    """Return the logits of a whole sequence, without a cache."""
    return model(**inputs(family, ids), use_cache=False).logits


@torch.inference_mode()
def step_by_step(family: Family, model: Any, ids: Tensor) -> Tensor:
    """Return the same from a cache that is given one token at a time."""
    past, found = None, []
    for i in range(ids.shape[1]):
        out = model(**inputs(family, ids[:, i : i + 1]), past_key_values=past, use_cache=True)
        past = out.past_key_values
        found.append(out.logits)
    return torch.cat(found, dim=1)


def generated(family: Family, model: Any, prompt: Tensor, new: int, *, cache: bool) -> Tensor:
    """Return a prompt (T5 puts a token before it) and the greedy choice of what follows."""
    ids = transformers.GenerationMixin.generate(  # not Whisper's own, which wants sentences
        model, **inputs(family, prompt), max_new_tokens=new, do_sample=False, use_cache=cache
    )
    assert torch.equal(ids[:, -new - prompt.shape[1] : -new], prompt)
    return ids


NEW = WINDOW + 8
"""Tokens generated after a prompt, which may be shorter than the window."""


def assert_generates(family: Family, made: Any) -> None:
    """Hold what a model generates with its cache to what it generates without, and to its steps."""
    for prompt in (tokens(WINDOW - 1), tokens(WINDOW + 3)):
        cached = generated(family, made, prompt, NEW, cache=True)
        assert torch.equal(cached, generated(family, made, prompt, NEW, cache=False))
    ids = tokens(WINDOW + 10)
    whole, stepped = forward(family, made, ids), step_by_step(family, made, ids)
    torch.testing.assert_close(stepped, whole, rtol=1e-4, atol=1e-4)  # other shapes of products


def differences(family: Family, made: Any, dense: Any) -> float:
    """Return the largest difference of two models' logits on a sequence."""
    ids = tokens(WINDOW + 10)
    found = forward(family, made, ids) - forward(family, dense, ids)
    return float(found.abs().max())
