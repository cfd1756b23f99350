"""Models of another structure keep the promise of their plans: memory of the whole process."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from merge_kit.api import merge

CHILD = """
import json, resource, sys
from merge_kit.api import merge
recipe, output, threads = json.loads(sys.argv[1]), sys.argv[2], int(sys.argv[3])
done = merge(recipe, output, threads=threads)
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
peak *= 1 if sys.platform == "darwin" else 1024
print(json.dumps([peak, done.plan.bill.peak_bytes]))
"""
HIDDEN, INNER, VOCAB, LAYERS = 512, 3072, 8000, 4
NOISE = {"num_experts": 4, "noise_scale": 0.01}


def write(folder: Path, seed: int) -> None:
    """Write a Llama of 64 MB in bfloat16."""
    generator = torch.Generator().manual_seed(seed)
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (VOCAB, HIDDEN),
        "lm_head.weight": (VOCAB, HIDDEN),
        "model.norm.weight": (HIDDEN,),
    }
    for layer in range(LAYERS):
        at = f"model.layers.{layer}"
        shapes |= {f"{at}.self_attn.{name}_proj.weight": (HIDDEN, HIDDEN) for name in "qkvo"}
        shapes |= {f"{at}.mlp.{name}_proj.weight": (INNER, HIDDEN) for name in ("gate", "up")}
        shapes[f"{at}.mlp.down_proj.weight"] = (HIDDEN, INNER)
        shapes[f"{at}.input_layernorm.weight"] = (HIDDEN,)
        shapes[f"{at}.post_attention_layernorm.weight"] = (HIDDEN,)
    folder.mkdir()
    save_file(
        {n: torch.randn(s, generator=generator).bfloat16() for n, s in shapes.items()},
        folder / "model.safetensors",
    )
    config = {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": HIDDEN,
        "intermediate_size": INNER,
        "num_attention_heads": 8,
        "num_hidden_layers": LAYERS,
        "vocab_size": VOCAB,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
    }
    (folder / "config.json").write_text(json.dumps(config))


@pytest.fixture(scope="module")
def large(tmp_path_factory) -> Path:
    """Two dense models, and a mixture of experts of each."""
    folder = tmp_path_factory.mktemp("large")
    for seed, name in enumerate(("one", "two")):
        write(folder / name, seed)
        mixture = {"merge_method": "sparse_upcycle", "base_model": str(folder / name)}
        merge(mixture | {"parameters": NOISE}, folder / f"mixture-{name}")
    return folder


def recipes(folder: Path) -> dict[str, dict[str, Any]]:
    one, two = ({"model": str(folder / name)} for name in ("one", "two"))
    mixture, other = str(folder / "mixture-one"), str(folder / "mixture-two")
    base = {"base_model": one["model"]}
    seam = {"overlap": 2, "overlap_mode": "sum", "blend": "slerp"}
    average = {"noise_scale": 0.01, "non_experts": "average"}
    grown = {"target_layers": 6, "block_expansion": True}
    return {
        "noise": {"merge_method": "sparse_upcycle", **base, "parameters": NOISE},
        "average": {
            "merge_method": "sparse_upcycle",
            **base,
            "models": [one, two, two],
            "parameters": average,
        },
        "smaller": {"merge_method": "project", "models": [one], "parameters": {"hidden_size": 256}},
        "larger": {"merge_method": "project", "models": [one], "parameters": {"hidden_size": 768}},
        "match": {
            "merge_method": "match_experts",
            "base_model": mixture,
            "models": [{"model": other}],
        },
        "dense": {"merge_method": "moe_to_dense", "models": [{"model": mixture}]},
        "grown": {"merge_method": "depth_upscale", "models": [one], "parameters": grown},
        "seam": {"merge_method": "depth_upscale", "models": [one, two], "parameters": seam},
    }


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize(
    "kind", ["noise", "average", "smaller", "larger", "match", "dense", "grown", "seam"]
)
def test_a_model_of_another_structure_stays_within_its_bill(kind, threads, large, tmp_path):
    recipe = json.dumps(recipes(large)[kind])
    command = [sys.executable, "-c", CHILD, recipe, str(tmp_path / "out"), str(threads)]
    shell = ["sh", "-c", '"$@"; exit $?', "sh", *command]  # a child has its parent's peak
    done = subprocess.run(shell, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    peak, promised = json.loads(done.stdout)
    assert peak <= promised
