"""Where a tensor outside the layers stands: before them, or after."""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import takewhile
from typing import Literal

from merge_kit.architecture.components import kind_of, side_of
from merge_kit.architecture.stacks import Stack

Role = Literal["before", "after"]

_KINDS = ("vision", "audio", "multi_modal_projector", "text_decoder")
"""Parts of a multimodal model in the order in which its data pass them."""

_SIDES = ("encoder", "decoder")

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


def outside_role(name: str, stack: Stack, others: Sequence[Stack] = ()) -> Role:
    """Return whether a tensor outside a stack stands before its layers or after them.

    Embeddings, stems and projections in stand before; a final norm, output heads, classifiers and
    poolers after. What no word tells (a lone scale) stands before, as all loose tensors do in the
    dialect where nothing says what comes after.

    Another part of the model stands on one side with all its tensors: a vision tower before the
    layers of the text decoder, a decoder after those of its encoder, a module with layers of its
    own where the module's name puts it.

    Args:
        name: A tensor that belongs to no layer of the stack.
        stack: The stack; the path that it shares with the tensor says nothing.
        others: The model's other stacks.
    """
    role = _role_of_part(name, f"{stack.prefix}.0")
    if role is not None:
        return role
    modules = (_module(other, stack) for other in others if other != stack)
    whole = next((module for module in modules if name.startswith(module)), name)
    parent = stack.prefix.rpartition(".")[0]
    rest = whole.removeprefix(f"{parent}.").lower()
    if _AFTER.search(rest):
        return "after"
    if _BEFORE.search(rest):
        return "before"
    return "after" if _NORM.search(rest) else "before"


def _role_of_part(name: str, layer: str) -> Role | None:
    """Return the role of a tensor of another part than the layer's, None in the same part."""
    kinds = _KINDS.index(kind_of(name)), _KINDS.index(kind_of(layer))
    if kinds[0] != kinds[1]:
        return "before" if kinds[0] < kinds[1] else "after"
    one, other = side_of(name), side_of(layer)
    if one != other and one in _SIDES and other in _SIDES:
        return "before" if one == "encoder" else "after"
    return None


def _module(other: Stack, stack: Stack) -> str:
    """Return the path of the widest module that holds one stack and not the other."""
    theirs, ours = (re.split(r"(?<=[./])", f"{s.prefix}.") for s in (other, stack))
    pairs = zip(theirs, ours, strict=False)
    shared = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
    return "".join(theirs[: shared + 1])
