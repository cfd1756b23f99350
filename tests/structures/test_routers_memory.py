"""Finding routers of prompts keeps the promise of its plan, and holds one layer, not the model."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys

import pytest
import torch
from safetensors.torch import save_file

from tests.structures import prompted

WIDTH, INNER, LAYERS, ROWS = 1024, 4096, 5, 20_000
LAYER_BYTES = 4 * (3 * WIDTH * INNER + 4 * WIDTH * WIDTH)

CHILD = """
import json, sys
from merge_kit.api import merge
done = merge(json.loads(sys.argv[1]), sys.argv[2], threads=1)
(artefact,) = done.plan.artefacts
print(json.dumps([done.report.peak_bytes, done.plan.bill.peak_bytes, artefact.peak_bytes]))
"""


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """A model of 210 MB in bfloat16, whose layers have 67 MB each in float32."""
    folder = prompted.save("llama", tmp_path_factory.mktemp("large") / "base")
    (folder / "model.safetensors").unlink()
    config = json.loads((folder / "config.json").read_text())
    config |= {"hidden_size": WIDTH, "intermediate_size": INNER, "vocab_size": ROWS}
    config |= {"num_attention_heads": 16, "num_key_value_heads": 16, "head_dim": 64}
    config |= {"num_hidden_layers": LAYERS}
    (folder / "config.json").write_text(json.dumps(config))
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(WIDTH * INNER + 99, generator=generator).mul(0.02).bfloat16()

    def matrix(place: int, rows: int, columns: int) -> torch.Tensor:
        return noise[place : place + rows * columns].view(rows, columns).clone()

    tensors = {
        "model.embed_tokens.weight": torch.zeros(ROWS, WIDTH, dtype=torch.bfloat16),
        "lm_head.weight": torch.zeros(ROWS, WIDTH, dtype=torch.bfloat16),
        "model.norm.weight": torch.ones(WIDTH, dtype=torch.bfloat16),
    }
    tensors["model.embed_tokens.weight"][:32] = matrix(50, 32, WIDTH)
    for i in range(LAYERS):
        lead = f"model.layers.{i}"
        for name in "qkvo":
            tensors[f"{lead}.self_attn.{name}_proj.weight"] = matrix(i, WIDTH, WIDTH)
        for name in ("gate", "up"):
            tensors[f"{lead}.mlp.{name}_proj.weight"] = matrix(9 + i, INNER, WIDTH)
        tensors[f"{lead}.mlp.down_proj.weight"] = matrix(20 + i, WIDTH, INNER)
        for name in ("input", "post_attention"):
            tensors[f"{lead}.{name}_layernorm.weight"] = torch.ones(WIDTH, dtype=torch.bfloat16)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    yield folder
    shutil.rmtree(folder)


@pytest.mark.parametrize("router", ["cheap_embed", "hidden"])
def test_finding_routers_stays_within_its_bill(router, large, tmp_path):
    prompts = ("sun rain " * 10, "sum add root " * 12)
    models = [{"model": str(large), "positive_prompts": [text, "if"]} for text in prompts]
    recipe = {
        "merge_method": "sparse_upcycle",
        "base_model": str(large),
        "models": models,
        "parameters": {"router": router},
    }
    command = [sys.executable, "-c", CHILD, json.dumps(recipe), str(tmp_path / "out")]
    shell = ["sh", "-c", '"$@"; exit $?', "sh", *command]  # a small parent hands on a small peak
    done = subprocess.run(shell, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    peak, promised, finding = json.loads(done.stdout)
    shutil.rmtree(tmp_path / "out")
    assert peak <= promised
    if router == "hidden":
        assert LAYER_BYTES < finding < 2 * LAYER_BYTES  # and not the five of the model
