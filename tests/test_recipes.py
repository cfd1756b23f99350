"""Every recipe of the repository runs, and its output loads in transformers."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from merge_kit import api

RECIPES = Path(__file__).parent.parent / "recipes"
DEMO = RECIPES / "demo"


NAMES = sorted(path.name for path in RECIPES.glob("*.yaml"))
OF_ADAPTERS = [n for n in NAMES if "merge_method: lora_" in (RECIPES / n).read_text()]


@pytest.mark.parametrize("name", NAMES)
def test_a_recipe_starts_with_what_it_shows(name):
    text = (RECIPES / name).read_text()
    assert text.startswith("# ")


@pytest.mark.parametrize("name", [name for name in NAMES if name not in OF_ADAPTERS])
def test_a_recipe_of_the_repository_runs_and_loads(tmp_path, name):
    done = api.merge(RECIPES / name, tmp_path / "out")
    model, loading = AutoModelForCausalLM.from_pretrained(done.output, output_loading_info=True)
    assert not any(loading.values())
    assert model.config.num_hidden_layers == done.plan.layers
    tokens = AutoTokenizer.from_pretrained(done.output)("sort cab: ", return_tensors="pt")
    made = model.generate(**tokens, max_new_tokens=4, do_sample=False)
    assert torch.isfinite(model(made).logits).all()


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # of peft
@pytest.mark.parametrize("name", OF_ADAPTERS)
def test_a_recipe_that_makes_adapters_runs_and_peft_loads_them(tmp_path, name):
    from peft import PeftModel  # noqa: PLC0415  (slow to import)

    done = api.merge(RECIPES / name, tmp_path / "out")
    folders = [path.parent for path in done.output.rglob("adapter_config.json")]
    assert folders
    tokens = AutoTokenizer.from_pretrained(DEMO / "base")("sort cab: ", return_tensors="pt")
    for folder in folders:
        base = AutoModelForCausalLM.from_pretrained(DEMO / "base")
        before = base(**tokens).logits
        model = PeftModel.from_pretrained(base, folder)
        found = model.load_adapter(folder, "again")
        assert not found.unexpected_keys
        assert not [key for key in found.missing_keys if "again" in key]
        logits = model(**tokens).logits
        assert torch.isfinite(logits).all()
        assert not torch.equal(logits, before)


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    for path in folder.glob("*.safetensors"):
        found |= load_file(path)
    return found


def test_rules_leave_the_rest_alone(tmp_path):
    api.merge(RECIPES / "rules.yaml", tmp_path / "out")
    result, base, add = tensors(tmp_path / "out"), tensors(DEMO / "base"), tensors(DEMO / "add")
    for name, tensor in result.items():
        if name.startswith("model.layers.0."):
            assert torch.equal(tensor, add[name])
        elif ".mlp." not in name:
            assert torch.equal(tensor, base[name])
    assert not torch.equal(
        result["model.layers.1.mlp.up_proj.weight"], base["model.layers.1.mlp.up_proj.weight"]
    )
