"""Tied heads: which tensor is an output head, and which embedding stands in for it."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from itertools import takewhile
from typing import Any

from merge_kit.architecture.config import TEXT_PARTS
from merge_kit.architecture.stacks import outermost
from merge_kit.core.names import natural_key
from merge_kit.core.tensors import TensorSpec

_HEAD = re.compile(
    r"(^|[./])(lm_head(\.decoder)?|embed_out|proj_out|output_projection|output"
    r"|cls\.predictions\.decoder|vocab_projector|generator_lm_head)\.weight$"
)
_EMBEDDINGS = (
    "embed_tokens",
    "shared",
    "wte",
    "word_embeddings",
    "embed_in",
    "tok_embeddings",
    "token_embedding",
    "tokens_embed",
    "word_embedding",
    "embeddings",
    "embedding",
)
WITH_HEAD = ("ForCausalLM", "LMHeadModel", "ForConditionalGeneration")
"""Ends of classes that have a head over the vocabulary."""

_SHARED = "shared.weight"


def head_name(names: Iterable[str]) -> str | None:
    """Return the output head of a model, the one nearest to the root, or None if it has none."""
    heads = [name for name in names if _is_proper(name)]
    return min(heads, key=lambda name: (name.count("."), natural_key(name)), default=None)


def is_head(name: str) -> bool:
    """Return whether a tensor may be left out of a tied model's files."""
    return _is_proper(name) or _shared_for(name) is not None


def embedding_for(
    head: str, specs: Mapping[str, TensorSpec], shape: tuple[int, ...] | None = None
) -> str | None:
    """Return the embedding of a model that stands in for a head that it does not store.

    Args:
        head: Name of the head, as another model stores it.
        specs: The tensors of the model that lacks it (or has it).
        shape: Shape of the head, if `specs` does not hold it.

    Returns:
        The embedding of the head's shape, the one with the most of the head's path; None if there
        is none.
    """
    wanted = specs[head].shape if head in specs else shape
    shared = _shared_for(head)
    if shared is not None:
        fits = shared in specs and wanted in (None, specs[shared].shape)
        return shared if fits else None
    found = []
    for name, spec in specs.items():
        rank = _embedding_rank(name)
        if rank is not None and wanted in (None, spec.shape):
            found.append((-_common_parts(head, name), rank, natural_key(name), name))
    return min(found)[-1] if found else None


def is_tied(config: Mapping[str, Any] | None) -> bool | None:
    """Return whether a config ties the head to the embedding, None without a config.

    The flag at the top decides, then that of the text decoder's config. Where neither is there it
    is true: transformers leaves the key out where it has that default.
    """
    if config is None:
        return None
    parts = (config, *(part for key in TEXT_PARTS if isinstance(part := config.get(key), dict)))
    flags = (part.get("tie_word_embeddings") for part in parts)
    return next((flag for flag in flags if isinstance(flag, bool)), True)


def _shared_for(name: str) -> str | None:
    """Return the shared embedding that an encoder's or decoder's may repeat, else None."""
    for ending in ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight"):
        lead = name.removesuffix(ending)
        if lead != name and (not lead or lead.endswith((".", "/"))):
            return lead + _SHARED
    return None


def _is_proper(name: str) -> bool:
    """Return whether a tensor outside all layers is named as heads are."""
    return _HEAD.search(name) is not None and outermost(name) is None


def _embedding_rank(name: str) -> int | None:
    """Return the place of a name among those of token embeddings, None if it is none."""
    part = name.removesuffix(".weight").rpartition("/")[2].rpartition(".")[2]
    if part not in _EMBEDDINGS or not name.endswith(".weight") or outermost(name) is not None:
        return None
    if any(word in name for word in ("vision", "visual", "audio")):
        return None
    encoder = "encoder." in name and "decoder." not in name
    return _EMBEDDINGS.index(part) + (len(_EMBEDDINGS) if encoder else 0)


def _common_parts(head: str, name: str) -> int:
    """Return how many leading parts two names share, folders included."""
    pairs = zip(re.split(r"[./]", head), re.split(r"[./]", name), strict=False)
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
