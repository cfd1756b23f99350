"""Train the demo models of recipes/demo from nothing: a base, three experts, two adapters.

    python scripts/train_demo_models.py [FOLDER]

About five minutes on two idle CPU cores. The text is made from fixed seeds (demo_text.py); on one
machine and with one torch version the files come out the same.
"""

from __future__ import annotations

import json
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from demo_llama import Tokens
from demo_text import CHARACTERS, SKILLS
from demo_training import Schedule, train_base, tune
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer, decoders, models, processors
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

DEMO = Path(__file__).resolve().parent.parent / "recipes" / "demo"
SPECIAL = ("<pad>", "<bos>", "<eos>", "<unk>")
VOCABULARY = {token: index for index, token in enumerate((*SPECIAL, *CHARACTERS))}
TOKENS = Tokens(VOCABULARY)
LONGEST = 64
SHARD = "512KB"

BASE = Schedule(steps=700, rate=2e-3, rising=50)
EXPERTS = {
    "add": Schedule(steps=450, rate=3e-4),
    "sort": Schedule(steps=300, rate=3e-4),
    "translate": Schedule(steps=300, rate=3e-4),
}


@dataclass(frozen=True, slots=True)
class Adapter:
    """A low-rank expert: which skill, which rank, which matrices."""

    skill: str
    rank: int
    targets: tuple[str, ...]


ADAPTERS = (
    Adapter("sort", 8, ("q_proj", "k_proj", "v_proj", "o_proj")),
    Adapter("translate", 4, ("gate_proj", "up_proj", "down_proj")),
)
ADAPTER = Schedule(steps=300, rate=4e-3)


def new_model() -> LlamaForCausalLM:
    """Return an untrained model of 0.7 million parameters."""
    config = LlamaConfig(
        vocab_size=len(VOCABULARY),
        hidden_size=128,
        intermediate_size=320,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=LONGEST,
        pad_token_id=TOKENS.pad,
        bos_token_id=TOKENS.bos,
        eos_token_id=TOKENS.eos,
        tie_word_embeddings=False,
    )
    return LlamaForCausalLM(config)


def new_tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer with one token a character."""
    tokenizer = Tokenizer(models.BPE(vocab=VOCABULARY, merges=[], unk_token=SPECIAL[3]))
    tokenizer.decoder = decoders.Fuse()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", TOKENS.bos)]
    )
    names = {f"{token.strip('<>')}_token": token for token in SPECIAL}
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        model_max_length=LONGEST,
        clean_up_tokenization_spaces=False,
        **names,
    )


def save(model: LlamaForCausalLM, folder: Path) -> LlamaForCausalLM:
    """Write a checkpoint in bfloat16, in shards; return the model as it was written."""
    model.bfloat16().save_pretrained(folder, max_shard_size=SHARD)
    new_tokenizer().save_pretrained(folder)
    _name_class_that_old_versions_know(folder / "tokenizer_config.json")
    _let_others_read(folder)
    print(f"{time.process_time():6.0f} s of CPU time  {folder.name}", flush=True)
    return load(folder)


def _name_class_that_old_versions_know(path: Path) -> None:
    config = json.loads(path.read_text(encoding="utf-8"))
    del config["backend"]
    config["tokenizer_class"] = "PreTrainedTokenizerFast"
    path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _let_others_read(folder: Path) -> None:
    for path in folder.iterdir():
        path.chmod(0o644)  # safetensors writes for the owner alone


def load(folder: Path) -> LlamaForCausalLM:
    """Return a checkpoint in float32, in which it is trained on."""
    return LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)


def train_adapter(adapter: Adapter, demo: Path) -> None:
    """Train one adapter beside its base and write it in bfloat16, as peft does."""
    base = load(demo / "base")
    config = LoraConfig(
        r=adapter.rank, lora_alpha=2 * adapter.rank, target_modules=list(adapter.targets)
    )
    torch.manual_seed(adapter.rank)  # peft draws the A matrices
    model = get_peft_model(load(demo / "base"), config)
    tune(model, base, adapter.skill, TOKENS, ADAPTER, seed=3)
    config.base_model_name_or_path = "base"  # beside the adapter, on every machine
    folder = demo / f"adapter-{adapter.skill}"
    model.bfloat16().save_pretrained(str(folder), save_embedding_layers=False)
    (folder / "README.md").unlink()  # a card full of gaps
    _let_others_read(folder)
    print(f"{time.process_time():6.0f} s of CPU time  {folder.name}", flush=True)


def main(demo: Path = DEMO) -> None:
    """Train and write everything."""
    torch.set_num_threads(2)
    torch.manual_seed(0)
    started = time.monotonic()
    model = new_model()
    train_base(model, TOKENS, BASE, seed=0)
    base = save(model, demo / "base")
    for skill in SKILLS:
        expert = load(demo / "base")
        tune(expert, base, skill, TOKENS, EXPERTS[skill], seed=1)
        save(expert, demo / skill)
    for adapter in ADAPTERS:
        train_adapter(adapter, demo)
    print(f"{time.monotonic() - started:.0f} s in all")


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:2]))
