"""A stacked config loads in transformers with the new depth and with layers of the right kind."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from tiny_architectures import config_text, loaded, names

from merge_kit.architecture.stacking import stacked_config
from merge_kit.architecture.stacks import Stack, find_stacks, split_layer

CASES = [
    ("llama", "model.layers", [0, 1, 2, 1, 2, 3, 4]),
    ("qwen3", "model.layers", [0, 1, 1, 2, 3]),
    ("gemma3_text", "model.layers", [0, 5, 6, 5, 6]),
    ("gemma3", "language_model.model.layers", [0, 5, 6, 5, 6]),
    ("gemma3", "vision_tower.encoder.layers", [0, 3]),
    ("gpt2", "transformer.h", [0, 1, 2, 1, 2, 3]),
    ("mixtral", "model.layers", [0, 0, 1, 2, 3]),
    ("whisper", "model.encoder.layers", [0, 1, 2, 1, 2, 3]),
    ("whisper", "model.decoder.layers", [0, 0, 1, 1]),
    ("t5", "encoder.block", [0, 1]),
    ("t5", "decoder.block", [0, 1, 1, 2, 3]),
    ("vit", "vit.encoder.layer", [0, 1, 1, 2, 3]),
    ("llava", "language_model.model.layers", [0, 4]),
    ("llava", "vision_tower.encoder.layers", [0, 1, 2, 3, 3]),
]


def found_stack(kind: str, prefix: str) -> Stack:
    return next(stack for stack in find_stacks(names(kind)) if stack.prefix == prefix)


def depth(model: Any, prefix: str) -> int:
    """Return the length of the outermost module list that has the stack's words in its path."""
    lists = {
        name: len(module)
        for name, module in model.named_modules()
        if type(module).__name__ == "ModuleList" and not any(p.isdecimal() for p in name.split("."))
    }
    if len(lists) > 1:
        words = ("vision",) if "vision" in str(lists) else ("encoder", "decoder")
        same = [name for name in lists if all((w in name) == (w in prefix) for w in words)]
        lists = {name: lists[name] for name in same}
    (found,) = lists.values()
    return found


@pytest.mark.parametrize(("kind", "prefix", "layers"), CASES)
def test_the_model_has_the_new_depth_and_every_other_stack_its_old_one(kind, prefix, layers):
    text, stack = config_text(kind), found_stack(kind, prefix)
    after = stacked_config(text, stack, [(text, layer) for layer in layers])
    model = loaded(kind, after)
    assert depth(model, prefix) == len(layers)
    for other in find_stacks(names(kind)):
        if other != stack:
            assert depth(model, other.prefix) == other.count


@pytest.mark.parametrize(("kind", "prefix", "layers"), CASES)
def test_the_files_text_changes_only_where_layers_are_described(kind, prefix, layers):
    text = config_text(kind)
    after = stacked_config(text, found_stack(kind, prefix), [(text, layer) for layer in layers])
    kept = [line for line in text.splitlines() if line not in after.splitlines()]
    assert all("layer" in line for line in kept)
    before, now = json.loads(text), json.loads(after)
    assert before.keys() == now.keys()


def test_the_attention_of_a_stacked_qwen3_follows_its_layers():
    text = config_text("qwen3")
    after = stacked_config(
        text, found_stack("qwen3", "model.layers"), [(text, i) for i in (0, 1, 1, 2)]
    )
    model = loaded("qwen3", after)
    kinds = [layer.self_attn.sliding_window for layer in model.model.layers]
    assert kinds == [None, 4, 4, None]


def test_the_attention_of_a_stacked_gemma3_follows_its_layers():
    text = config_text("gemma3_text")
    stack = found_stack("gemma3_text", "model.layers")
    model = loaded("gemma3_text", stacked_config(text, stack, [(text, i) for i in (5, 6, 5)]))
    assert [layer.self_attn.sliding_window for layer in model.model.layers] == [None, 4, None]


@pytest.mark.parametrize("kind", ["llama", "qwen3", "gemma3_text", "gpt2"])
def test_a_stacked_model_generates_with_its_cache(kind):
    text = config_text(kind)
    (stack,) = find_stacks(names(kind))
    layers = [0, 1, 1, 2]
    after = stacked_config(text, stack, [(text, layer) for layer in layers])
    model = loaded(kind, after).to_empty(device="cpu")
    for parameter in model.parameters():
        torch.nn.init.zeros_(parameter)
    ids = torch.tensor([[1, 2, 3]])
    model.generation_config.eos_token_id = None
    made = model.generate(ids, max_new_tokens=3, do_sample=False)
    assert made.shape == (1, 6)


def test_the_names_of_a_stacked_model_are_those_of_its_config():
    text = config_text("llama")
    (stack,) = find_stacks(names("llama"))
    model = loaded("llama", stacked_config(text, stack, [(text, 0), (text, 4)]))
    expected = {name for name in names("llama") if (split_layer(name, stack) or (0, ""))[0] < 2}
    assert set(model.state_dict()) == expected
