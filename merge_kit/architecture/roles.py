"""Where a tensor outside the layers stands: before them, or after."""

from __future__ import annotations

import re
from typing import Literal

from merge_kit.architecture.stacks import Stack

_AFTER = re.compile(
    r"(^|[._])(lm_head|embed_out|output_projection|out_proj|logit_scale|logits|qa_outputs|score"
    r"|classifiers?|classification_head|heads?|pooler|cls\.|predictions|merger|fc_out|fc_norm|vocab_"
    r"|(text|visual|vision|image)_projection|final\w*|post\w*norm|output\.)|_out($|\.)"
)
_BEFORE = re.compile(
    r"emb|wte|wpe|shared|token|patch|stem|conv\d|position|rotary|inv_freq|project_in"
    r"|(^|[._])(pre|in|input)([._]|norm|proj)"
)
_NORM = re.compile(r"norm|(^|[._])ln($|[._])|ln_f")


def outside_role(name: str, stack: Stack) -> Literal["before", "after"]:
    """Return whether a tensor outside a stack stands before its layers or after them.

    Embeddings, stems and projections in stand before; a final norm, output heads, classifiers and
    poolers after. What no word tells (a projector between two models, a lone scale) stands before,
    as all loose tensors do in the dialect where nothing says what comes after.

    Args:
        name: A tensor that belongs to no layer of the stack.
        stack: The stack; the path that it shares with the tensor says nothing.
    """
    parent = stack.prefix.rpartition(".")[0]
    rest = name.removeprefix(f"{parent}.").lower()
    if _AFTER.search(rest):
        return "after"
    if _BEFORE.search(rest):
        return "before"
    return "after" if _NORM.search(rest) else "before"
