"""Tensors that an adapter holds whole: saved modules, biases, embeddings."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

from merge_kit.core.tensors import StoredTensor
from merge_kit.errors import CheckpointError
from merge_kit.io.adapter_bytes import same_bytes
from merge_kit.io.adapter_settings import Settings
from merge_kit.io.adapter_values import Saved
from merge_kit.io.strict_json import shown

_WRAPPED = re.compile(r"\.(?:token_adapter\.)?base_layer(?=\.[^.]+$)")
_COPY = re.compile(r"\.modules_to_save(?:\.default)?(?=\.)")
_ORIGINAL = re.compile(r"\.original_module(?=\.)")
_EMBEDDINGS = frozenset(
    (
        *("embed_tokens", "lm_head", "wte", "word_embeddings", "embed_in", "embed_out", "shared"),
        *("tok_embeddings", "output", "token_embd", "embeddings", "tok_embed"),
    )
)
"""Names of embeddings and heads, which peft saves whole when the vocabulary has grown."""

_OWN = "the base's own, beside a module that is saved whole"
_TWICE = "a copy of the same tensor of a module that is saved whole"
Why = Literal["modules_to_save", "bias", "base_layer"]


@dataclass(frozen=True, slots=True)
class Whole:
    """Tensors that stand for themselves, and those of the file that change nothing."""

    saved: tuple[Saved, ...]
    dropped: Mapping[str, str]


def whole_tensors(
    whole: Mapping[str, StoredTensor], updated: frozenset[str], settings: Settings | None
) -> Whole:
    """Return what an adapter holds whole, each with its reason.

    Args:
        updated: Modules with low-rank changes.

    Raises:
        CheckpointError: If nothing explains why a tensor is there.
    """
    saved: dict[str, Saved] = {}
    dropped: dict[str, str] = {}
    later = []
    for path, tensor in whole.items():
        if _COPY.search(path) or _ORIGINAL.search(path):
            later.append((path, tensor))
            continue
        name = _WRAPPED.sub("", path)
        why = _why(path, name, updated, settings)
        if why is None:
            raise _unexplained(tensor)
        saved[name] = Saved(name, why, tensor)
    for path, tensor in later:
        name = _ORIGINAL.sub("", _COPY.sub("", path))
        if _COPY.search(path) and name not in saved:
            saved[name] = Saved(name, "modules_to_save", tensor)
        elif _COPY.search(path) and same_bytes(tensor, saved[name].stored):
            dropped[tensor.spec.name] = _TWICE
        elif _ORIGINAL.search(path) and _is_saved(name, whole, settings):
            dropped[tensor.spec.name] = _OWN
        else:
            raise _unexplained(tensor)
    return Whole(tuple(saved.values()), dropped)


def _why(path: str, name: str, updated: frozenset[str], settings: Settings | None) -> Why | None:
    """Return the reason why a tensor is held whole, or None."""
    module, _, leaf = name.rpartition(".")
    if settings is None:
        return None
    if leaf == "bias" and settings.bias != "none" and not _named(name, settings):
        return "bias"
    if path != name:
        return "base_layer" if module in updated or ".token_adapter." in path else None
    if _named(name, settings):
        return "modules_to_save"
    is_embedding = leaf in {"weight", "bias"} and module.rpartition(".")[2] in _EMBEDDINGS
    return "modules_to_save" if is_embedding else None


def _named(name: str, settings: Settings) -> bool:
    """Return whether a module of `modules_to_save` holds a tensor."""
    parents = list(_parents(name))
    return any(parent.endswith(end) for end in settings.modules_to_save for parent in parents)


def _parents(name: str) -> Iterator[str]:
    while "." in name:
        name = name.rpartition(".")[0]
        yield name


def _is_saved(name: str, whole: Mapping[str, StoredTensor], settings: Settings | None) -> bool:
    return settings is not None and _named(name, settings) and name in whole


def _unexplained(tensor: StoredTensor) -> CheckpointError:
    where = f"{tensor.span.path}, tensor {shown(tensor.spec.name)}"
    problem = "is neither a low-rank factor nor a tensor that the config says is saved whole"
    hint = "if it replaces the base's, name its module under modules_to_save in the config"
    return CheckpointError(problem, where=where, hint=hint)
