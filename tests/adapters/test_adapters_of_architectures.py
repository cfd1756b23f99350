"""Adapters of real architectures, whose files name tensors otherwise than modules are called."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor

from merge_kit import MergeKitError, merge
from tests import models
from tests.adapters.makers import fill, quiet, scale

RENAMED = {"vit": "transformers renames the layers of old files when it loads them"}
"""Architectures whose modules nobody can find in the files without knowing their history."""

KINDS = [kind for kind in models.KINDS if kind not in RENAMED]
RANK = 3


def load(kind: str, folder: Path) -> Any:
    more = {"experts_implementation": "eager"} if kind in {"mixtral", "gpt_oss"} else {}
    model = models.KINDS[kind].model.from_pretrained(folder, dtype=torch.float64, **more)
    return model.eval()


def adapted(kind: str, base: Path, adapter: Path) -> Any:
    """Return peft's model, for which nothing may be missing or left over."""
    with quiet():
        model = peft.PeftModel.from_pretrained(
            load(kind, base), adapter, adapter_name="a0", autocast_adapter_dtype=False
        )
        found = model.load_adapter(adapter, "a0", autocast_adapter_dtype=False)
    assert not found.unexpected_keys
    assert not [key for key in found.missing_keys if ".a0" in key]
    return model.double().eval()


def miss(kind: str, model: Any, wanted: Tensor) -> float:
    return float((models.logits(kind, model) - wanted).abs().max())


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Return a function that gives base and adapter of a kind, both made once."""
    known: dict[str, tuple[Path, Path]] = {}

    def make(kind: str) -> tuple[Path, Path]:
        if kind not in known:
            folder = tmp_path_factory.mktemp(kind)
            base = models.save(kind, folder / "base", 1)
            config = peft.LoraConfig(r=RANK, lora_alpha=5, target_modules="all-linear")
            with quiet():
                model = peft.get_peft_model(load(kind, base), config, autocast_adapter_dtype=False)
                fill(model, 5)
                model.save_pretrained(folder / "adapter")
            known[kind] = base, folder / "adapter"
        return known[kind]

    return make


def merged(base: Path, adapter: Path, out: Path) -> Path:
    models_ = [{"model": f"{base}+{adapter}"}]
    recipe = {"merge_method": "passthrough", "models": models_, "dtype": "float64"}
    return merge(recipe, out).output


@pytest.mark.parametrize("kind", KINDS)
def test_a_merge_into_the_base_answers_as_peft_does(tmp_path, made, kind):
    base, adapter = made(kind)
    wanted = models.logits(kind, adapted(kind, base, adapter))
    assert miss(kind, load(kind, base), wanted) > 0.1
    assert miss(kind, load(kind, merged(base, adapter, tmp_path / "out")), wanted) <= 1e-5


@pytest.mark.parametrize("kind", KINDS)
def test_an_adapter_that_is_written_anew_is_loaded_by_peft(tmp_path, made, kind):
    base, adapter = made(kind)
    models_ = [{"model": str(adapter), "parameters": {"weight": 0.5}}]
    out = merge({"merge_method": "lora_concat", "models": models_}, tmp_path / "out").output
    wanted = models.logits(kind, scale(adapted(kind, base, adapter), (0.5,)))
    assert miss(kind, adapted(kind, base, out), wanted) <= 1e-5


@pytest.mark.parametrize("kind", KINDS)
def test_an_adapter_that_is_extracted_is_loaded_by_peft(tmp_path, made, kind):
    base, adapter = made(kind)
    whole = merged(base, adapter, tmp_path / "whole")
    recipe = {
        "merge_method": "lora_extract",
        "base_model": str(base),
        "models": [{"model": str(whole)}],
        # two projections lie in one matrix of fused experts, whose change has twice the rank
        "parameters": {"rank": 2 * RANK, "rest": "save"},
    }
    out = merge(recipe, tmp_path / "out").output
    wanted = models.logits(kind, load(kind, whole))
    assert miss(kind, adapted(kind, base, out), wanted) <= 1e-4


@pytest.mark.parametrize("kind", RENAMED)
def test_what_has_other_names_in_memory_is_merged_or_refused_by_name(tmp_path, made, kind):
    base, adapter = made(kind)
    try:
        out = merged(base, adapter, tmp_path / "out")
    except MergeKitError as error:
        assert "are not in input-1:base: vit.layers.0" in str(error)  # noqa: PT017
        return
    wanted = models.logits(kind, adapted(kind, base, adapter))
    assert miss(kind, load(kind, out), wanted) <= 1e-5
