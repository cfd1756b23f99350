"""Models of real architectures, merged and stacked, load in transformers and compute the same."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests import models
from tests.models import KINDS, MIXED, STACKED, load, logits, merge, pair

HALVES = (0.5, 0.5)  # exact in every dtype
QUARTERS = (0.25, 0.75)  # exact products of 8 and 11 bits in float32

GEMMA = ["sliding_attention"] * 5 + ["full_attention"]
LAYER_TYPES = {"qwen3": MIXED, "gemma3_text": [*GEMMA, GEMMA[0]], "gemma3": GEMMA}
"""Of the inputs; other kinds have layers of one type."""

AFTER = ("lm_head.weight", "model.norm.weight", "model.language_model.norm.weight")
AFTER += ("transformer.ln_f.weight", "transformer.ln_f.bias")

Layer = tuple[str, int]


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Let torch use one thread, which is the fastest for models as small as these."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    return tmp_path_factory.mktemp("saved")


def linear(folders: Sequence[Path], shares: Sequence[float]) -> dict[str, Any]:
    entries = zip(folders, shares, strict=True)
    listed = [{"model": str(path), "parameters": {"weight": share}} for path, share in entries]
    return {"merge_method": "linear", "models": listed}


@pytest.mark.parametrize("kind", KINDS)
def test_an_average_loads_with_no_key_missing_and_equals_one_made_by_torch(kind, saved, tmp_path):
    folders = pair(kind, saved)
    shares = HALVES if KINDS[kind].dtype == torch.float32 else QUARTERS
    done = merge(linear(folders, shares), tmp_path / "out")
    assert len(done.plan.shards) > 1
    one, other = (load(kind, folder) for folder in folders)
    merged = load(kind, tmp_path / "out")
    wanted = models.averaged([one.state_dict(), other.state_dict()], shares)
    models.assert_same_tensors(merged.state_dict(), wanted)
    assert not torch.equal(logits(kind, merged), logits(kind, one))
    one.load_state_dict(wanted)
    assert torch.equal(logits(kind, merged), logits(kind, one))


def sources(kind: str, *, deeper: bool) -> list[list[Any]]:
    """Return slices as [model, first, last + 1]: two more layers than the inputs have, or three."""
    depth = KINDS[kind].config().get_text_config().num_hidden_layers
    if deeper:
        return [["a", 0, depth - 1], ["b", depth - 3, depth]]
    return [["a", 0, 1], ["b", depth - 2, depth]]


def stacked(saved: dict[str, Path], slices: Sequence[Sequence[Any]]) -> dict[str, Any]:
    listed = [
        {"sources": [{"model": str(saved[name]), "layer_range": [start, stop]}]}
        for name, start, stop in slices
    ]
    return {"merge_method": "passthrough", "slices": listed}


def stack_by_torch(
    kind: str, states: dict[str, dict[str, Tensor]], layers: Sequence[Layer]
) -> dict[str, Tensor]:
    """Return the state of a model of these layers: what leads in is a's, what leads out b's."""
    path = KINDS[kind].layers
    tied = KINDS[kind].config().get_text_config().tie_word_embeddings
    after = [name for name in AFTER if not (tied and name == "lm_head.weight")]
    state = {
        name: states["b" if name in after else "a"][name]
        for name in states["a"]
        if not name.startswith(f"{path}.")
    }
    for new, (model, layer) in enumerate(layers):
        lead = f"{path}.{layer}."
        for name, tensor in states[model].items():
            if name.startswith(lead):
                state[f"{path}.{new}.{name.removeprefix(lead)}"] = tensor
    return state


@pytest.mark.parametrize("deeper", [True, False], ids=["deeper", "shallower"])
@pytest.mark.parametrize("kind", STACKED)
def test_a_stack_of_layers_of_two_models_loads_and_generates_with_its_cache(
    kind, deeper, saved, tmp_path
):
    folders = dict(zip("ab", pair(kind, saved), strict=True))
    slices = sources(kind, deeper=deeper)
    merge(stacked(folders, slices), tmp_path / "out")
    layers = [(name, i) for name, start, stop in slices for i in range(start, stop)]
    made = load(kind, tmp_path / "out", torch.float32)
    states = {
        name: load(kind, folder, torch.float32).state_dict() for name, folder in folders.items()
    }
    wanted = stack_by_torch(kind, states, layers)
    models.assert_same_tensors(made.state_dict(), wanted)
    by_torch = model_of(kind, layers)
    by_torch.load_state_dict(wanted)
    assert torch.equal(logits(kind, made), logits(kind, by_torch))
    assert torch.equal(generated(kind, made, cache=True), generated(kind, made, cache=False))


def model_of(kind: str, layers: Sequence[Layer]) -> Any:
    """Return a model of so many layers, of the types that they have in the inputs."""
    config = KINDS[kind].config()
    text = config.get_text_config()
    text.num_hidden_layers = len(layers)
    if kind in LAYER_TYPES:
        text.layer_types = [LAYER_TYPES[kind][layer] for _, layer in layers]
    return KINDS[kind].model(config).eval()


def generated(kind: str, model: Any, *, cache: bool) -> Tensor:
    """Return the tokens that a model goes on with, greedily."""
    ids = model.generate(**KINDS[kind].inputs(), max_new_tokens=8, do_sample=False, use_cache=cache)
    assert ids.shape[1] == KINDS[kind].inputs()["input_ids"].shape[1] + 8
    return ids
