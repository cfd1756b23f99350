"""A run that is killed at any moment goes on, and ends with the bytes of a clean run."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace

ROOT = Path(__file__).parent.parent


def models(folder: Path) -> Path:
    generator = torch.Generator().manual_seed(0)
    for name in "ab":
        (folder / name).mkdir()
        tensors = {f"t{i}": torch.randn(400_000, generator=generator) for i in range(60)}
        save_file(tensors, folder / name / "model.safetensors")
    recipe = folder / "recipe.yaml"
    recipe.write_text(
        "merge_method: slerp\nbase_model: a\nmodels: [{model: b}]\nparameters: {t: 0.4}\n"
        "shard_size: 20MB\n"
    )
    return recipe


def start(recipe: Path, out: Path) -> subprocess.Popen:
    command = [sys.executable, "-m", "merge_kit", "run", str(recipe), "-o", str(out)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(
        command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    )


def content(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def killed_and_resumed(recipe: Path, times: int, number: int) -> None:
    tmp_path = recipe.parent
    begun = time.monotonic()
    process = start(recipe, tmp_path / "clean")
    _, errors = process.communicate()
    assert process.returncode == 0, errors.decode()
    took = time.monotonic() - begun
    wanted = content(tmp_path / "clean")
    chance = random.Random(1)
    for i in range(times):
        out = tmp_path / f"out{i}"
        process = start(recipe, out)
        time.sleep(chance.uniform(0.3, 1.0) * took)
        process.send_signal(number)
        process.communicate()
        if not out.exists():
            again = start(recipe, out)
            _, errors = again.communicate()
            assert again.returncode == 0, errors.decode()
        assert content(out) == wanted
        assert not list(tmp_path.glob("*.partial"))


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_a_killed_run_goes_on(tmp_path, number):
    killed_and_resumed(models(tmp_path), 1, number)


@pytest.mark.slow
def test_a_run_killed_at_a_hundred_moments_goes_on(tmp_path):
    killed_and_resumed(models(tmp_path), 100, signal.SIGKILL)


# runs that find something first ------------------------------------------------------------------

HIDDEN, WIDE, WORDS, DEEP = 256, 512, 2000, 6


def dense(folder: Path, seed: int) -> None:
    """Write a small Llama with a tokenizer of words."""
    generator, kind = torch.Generator().manual_seed(seed), torch.bfloat16
    shapes = {"model.embed_tokens.weight": (WORDS, HIDDEN), "model.norm.weight": (HIDDEN,)}
    for i in range(DEEP):
        lead = f"model.layers.{i}"
        shapes |= {f"{lead}.self_attn.{name}_proj.weight": (HIDDEN, HIDDEN) for name in "qkvo"}
        shapes |= {f"{lead}.mlp.{name}_proj.weight": (WIDE, HIDDEN) for name in ("gate", "up")}
        shapes[f"{lead}.mlp.down_proj.weight"] = (HIDDEN, WIDE)
        shapes |= {f"{lead}.{n}_layernorm.weight": (HIDDEN,) for n in ("input", "post_attention")}
    shapes["lm_head.weight"] = (WORDS, HIDDEN)
    tensors = {n: torch.randn(s, generator=generator).to(kind) for n, s in shapes.items()}
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": HIDDEN,
        "intermediate_size": WIDE,
        "num_hidden_layers": DEEP,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "vocab_size": WORDS,
        "tie_word_embeddings": False,
        "rms_norm_eps": 1e-6,
        "torch_dtype": "bfloat16",
    }
    (folder / "config.json").write_text(json.dumps(config))
    words = {"<unk>": 0} | {f"w{i}": i for i in range(1, WORDS)}
    made = Tokenizer(WordLevel(words, unk_token="<unk>"))
    made.pre_tokenizer = Whitespace()
    made.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "unk_token": "<unk>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


UPCYCLE = "merge_method: sparse_upcycle\nbase_model: a\n"
MIXTURE = "name: {}\n" + UPCYCLE + "models: [{{model: {}}}, {{model: {}}}]\n"
MIXTURE += "parameters: {{noise_scale: 0.01}}\n---\n"
FINDING = {
    "project": "merge_method: project\nmodels: [{model: a}]\nparameters: {hidden_size: 192}\n",
    "match_experts": MIXTURE.format("first", "a", "b")
    + MIXTURE.format("second", "b", "a")
    + "merge_method: match_experts\nbase_model: first\nmodels: [{model: second}]\n",
    "hidden": UPCYCLE
    + "models:\n- {model: a, positive_prompts: [w1 w2 w3, w4 w5]}\n"
    + "- {model: b, positive_prompts: [w6 w7 w8], negative_prompts: [w9]}\n"
    + "parameters: {router: hidden}\n",
}


def finding(folder: Path, what: str) -> Path:
    for seed, name in enumerate("ab"):
        dense(folder / name, seed)
    recipe = folder / "recipe.yaml"
    recipe.write_text(FINDING[what] + "shard_size: 2MB\n")
    return recipe


@pytest.mark.parametrize("what", FINDING)
def test_a_killed_run_that_finds_something_first_goes_on(tmp_path, what):
    killed_and_resumed(finding(tmp_path, what), 1, signal.SIGKILL)


@pytest.mark.slow
@pytest.mark.parametrize("what", FINDING)
def test_a_run_that_finds_something_first_is_killed_at_ten_moments_and_goes_on(tmp_path, what):
    killed_and_resumed(finding(tmp_path, what), 10, signal.SIGKILL)
