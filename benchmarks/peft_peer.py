#!/usr/bin/env python3
"""What a user of peft writes to merge adapters: the peer of bench_adapters.py.

python benchmarks/peft_peer.py into OUT BASE ADAPTER
python benchmarks/peft_peer.py concat|svd OUT BASE ADAPTER ADAPTER
"""

from __future__ import annotations

import sys

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

COMBINED = {"concat": {"combination_type": "cat"}, "svd": {"combination_type": "svd"}}


def main() -> None:
    """Do one task."""
    task, out, base, first, *others = sys.argv[1:]
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
    adapted = PeftModel.from_pretrained(model, first, adapter_name="a0")
    if task == "into":
        adapted.merge_and_unload().save_pretrained(out, max_shard_size="500MB")
        return
    names = ["a0"]
    for i, other in enumerate(others, 1):
        adapted.load_adapter(other, adapter_name=f"a{i}")
        names.append(f"a{i}")
    more = {"svd_rank": 64} if task == "svd" else {}
    adapted.add_weighted_adapter(names, [0.6, 0.4], "merged", **COMBINED[task], **more)
    adapted.save_pretrained(out, selected_adapters=["merged"])


if __name__ == "__main__":
    main()
