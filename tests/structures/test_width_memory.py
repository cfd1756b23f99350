"""Models of another width keep the promise of their plans: resident memory of the whole process."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

CHILD = """
import json, resource, sys
from merge_kit.api import merge
recipe, output, threads = json.loads(sys.argv[1]), sys.argv[2], int(sys.argv[3])
done = merge(recipe, output, threads=threads)
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
peak *= 1 if sys.platform == "darwin" else 1024
print(json.dumps([peak, done.plan.bill.peak_bytes]))
"""
HIDDEN, INNER, VOCAB = 512, 15_000, 45_000
GENERATOR = torch.Generator().manual_seed(9)


def normal(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=GENERATOR).bfloat16()


@pytest.fixture(scope="module")
def large(tmp_path_factory) -> Path:
    """A Llama of one layer and 140 MB in bfloat16."""
    folder = tmp_path_factory.mktemp("large") / "model"
    folder.mkdir()
    tensors = {
        "model.embed_tokens.weight": normal(VOCAB, HIDDEN),
        "lm_head.weight": normal(VOCAB, HIDDEN),
        "model.norm.weight": normal(HIDDEN),
        "model.layers.0.input_layernorm.weight": normal(HIDDEN),
        "model.layers.0.post_attention_layernorm.weight": normal(HIDDEN),
        "model.layers.0.mlp.gate_proj.weight": normal(INNER, HIDDEN),
        "model.layers.0.mlp.up_proj.weight": normal(INNER, HIDDEN),
        "model.layers.0.mlp.down_proj.weight": normal(HIDDEN, INNER),
    }
    for name in "qkvo":
        tensors[f"model.layers.0.self_attn.{name}_proj.weight"] = normal(HIDDEN, HIDDEN)
    save_file(tensors, folder / "model.safetensors")
    config = {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": HIDDEN,
        "intermediate_size": INNER,
        "num_attention_heads": 8,
        "num_hidden_layers": 1,
        "vocab_size": VOCAB,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
    }
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def merged(recipe: dict, output: Path, threads: int) -> tuple[int, int]:
    """Return peak and promise of a run in a process of its own, below a small one."""
    command = [sys.executable, "-c", CHILD, json.dumps(recipe), str(output), str(threads)]
    shell = ["sh", "-c", '"$@"; exit $?', "sh", *command]
    done = subprocess.run(shell, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    peak, promised = json.loads(done.stdout)
    return peak, promised


@pytest.mark.parametrize(
    ("method", "hidden", "threads"), [("pad", 768, 2), ("project", 768, 1), ("project", 256, 2)]
)
def test_a_change_of_width_stays_within_its_bill(method, hidden, threads, large, tmp_path):
    sizes = {"hidden_size": hidden, "intermediate_size": INNER + (8 if method == "pad" else -8)}
    recipe = {"merge_method": method, "models": [{"model": str(large)}], "parameters": sizes}
    peak, promised = merged(recipe, tmp_path / "out", threads)
    assert peak <= promised
    assert promised < 250e6 + 135e6  # the model does not fit beside Python and torch
