"""The card of a built model says what was built, of what, and that it wants training."""

from __future__ import annotations

import re

import plain_models
import pytest
import torch
from huggingface_hub import ModelCard

from merge_kit.publish.card import model_card
from tests.toys import plan

TRAINING = "Such a model usually wants further training"
SLICE = "  - sources: [{model: %s, layer_range: [%d, %d]}]\n"
STACK = "merge_method: passthrough\nslices:\n"
UPCYCLE = "merge_method: sparse_upcycle\nbase_model: a\n"
RECIPES = {
    "stack": (
        STACK + SLICE % ("a", 0, 3) + SLICE % ("deep", 2, 5),
        "Its 6 layers come from models of 4 and 6; the map below says which from where.",
        ["merge", "merge_kit", "passthrough", "frankenmerge"],
    ),
    "part of a stack": (
        STACK + SLICE % ("a", 0, 2),
        "Its 2 layers come from a model of 4; the map below says which from where.",
        ["merge", "merge_kit", "passthrough", "frankenmerge"],
    ),
    "depth": (
        "merge_method: depth_upscale\nmodels: [{model: a}]\nparameters: {target_layers: 6}\n",
        "Its 6 layers come from a model of 4; the map below says which from where.",
        ["merge", "merge_kit", "depth_upscale"],
    ),
    "experts": (
        UPCYCLE + "parameters: {num_experts: 3, experts_per_token: 2, architecture: mixtral}\n",
        "In its layers of experts, a router sends each token through 2 of 3 MLPs.",
        ["merge", "merge_kit", "sparse_upcycle", "moe"],
    ),
    "mergekit-moe": (
        "base_model: a\ngate_mode: random\nexperts: [{source_model: a}, {source_model: b}]\n",
        "In its layers of experts, a router sends each token through 2 of 2 MLPs.",
        ["merge", "merge_kit", "sparse_upcycle", "moe"],
    ),
    "a merge of mixtures": (
        (
            f"name: m\n{UPCYCLE}parameters: {{num_experts: 2, architecture: mixtral}}\n---\n"
            "merge_method: linear\nparameters: {weight: 1}\nmodels: [{model: m}]\n"
        ),
        "In its layers of experts, a router sends each token through 2 of 2 MLPs.",
        ["merge", "merge_kit", "linear", "moe"],
    ),
    "back": (
        (
            f"name: m\n{UPCYCLE}parameters: {{num_experts: 2, architecture: mixtral}}\n---\n"
            "merge_method: moe_to_dense\nmodels: [{model: m}]\nparameters: {architecture: llama}\n"
        ),
        "Its MLPs are experts of a mixture, or means of them.",
        ["merge", "merge_kit", "moe_to_dense"],
    ),
    "width": (
        "merge_method: pad\nmodels: [{model: a}]\nparameters: {intermediate_size: 16}\n",
        (
            "Sizes of what it was made of were changed by pad: it has hidden_size 8, "
            "intermediate_size 16, num_attention_heads 2, num_key_value_heads 2."
        ),
        ["merge", "merge_kit", "pad"],
    ),
}
MERGES = {
    "models": "merge_method: slerp\nbase_model: a\nmodels: [{model: b}]\nparameters: {t: 0.5}\n",
    "slices in their places": "merge_method: linear\nparameters: {weight: 1}\nslices:\n"
    "  - sources: [{model: a, layer_range: [0, 4]}, {model: b, layer_range: [0, 4]}]\n",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("cards")
    for seed, (name, layers) in enumerate({"a": 4, "b": 4, "deep": 6}.items()):
        plain_models.write(root / name, "llama", layers, seed, torch.float32)
    return root


def card(text, folder):
    return ModelCard(model_card(plan(text, folder), recipe_text=text, nonfinite={}))


@pytest.mark.parametrize("name", RECIPES)
def test_the_card_says_what_was_built(folder, name):
    text, sentence, tags = RECIPES[name]
    found = card(text, folder)
    first = found.text.partition("## Method")[0]
    assert sentence in first
    assert TRAINING in first
    assert (found.data.tags, found.data.base_model_relation) == (tags, "merge")


@pytest.mark.parametrize("name", MERGES)
def test_a_merge_is_said_to_be_no_more(folder, name):
    found = card(MERGES[name], folder)
    assert TRAINING not in found.text
    assert not {"frankenmerge", "moe"} & set(found.data.tags)


@pytest.mark.parametrize("name", ["stack", "part of a stack", "depth"])
def test_the_map_is_in_the_card(folder, name):
    text = card(RECIPES[name][0], folder).text
    lines = re.findall(r"^- `model\.layers (\d+)(?:-(\d+))? from ", text, re.MULTILINE)
    numbers = [n for a, b in lines for n in range(int(a), int(b or a) + 1)]
    assert numbers == list(range(len(numbers)))


def test_the_map_of_two_hundred_layers_out_of_order_stays_short(folder):
    text = STACK + "".join(SLICE % ("a", i % 4, i % 4 + 1) for i in reversed(range(252)))
    found = card(text, folder).text
    assert len(re.findall(r"^- `model\.layers ", found, re.MULTILINE)) == 40
    assert "\n- and 212 more; the recipe has them all\n" in found
    assert "Its 252 layers come from a model of 4" in found
