"""Names of an adapter's tensors: which part of which module each one is, in every style."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from merge_kit.io.adapter_values import Style

Part = Literal["a", "b", "bias", "magnitude", "alpha", "tokens", "whole"]

PEFT_PREFIX = "base_model.model."
_OLD_END = r"(?:_lora|\.lora|\.lora_linear_layer)"
_ENDS: tuple[tuple[str, Part | None, Style | None], ...] = (
    (r"\.lora_(?P<letter>[AB])(?:\.(?P<label>[^.]+))?\.(?P<kind>weight|bias)", None, None),
    (r"\.lora_embedding_(?P<letter>[AB])(?:\.(?P<label>[^.]+))?", None, "peft"),
    (r"\.lora_(?P<letter>down|up)\.(?P<kind>weight|bias)", None, "kohya"),
    (_OLD_END + r"\.(?P<letter>down|up)\.(?P<kind>weight|bias)", None, "old_diffusers"),
    (r"\.lora_magnitude_vector(?:\.(?!weight$)(?P<label>[^.]+))?(?:\.weight)?", "magnitude", None),
    (r"\.token_adapter\.trainable_tokens_delta(?:\.(?P<label>[^.]+))?", "tokens", "peft"),
    (_OLD_END + r"\.alpha", "alpha", "old_diffusers"),
    (r"\.alpha", "alpha", None),
    (r"\.dora_scale", "magnitude", None),
)
"""What follows a module's path, what it is (None: the letter tells), and who writes it so."""

_FORMS = tuple((re.compile(f"(?P<module>.+?){end}"), part, style) for end, part, style in _ENDS)
_OLD_NAMES = re.compile(r"\.?processor(?=\.|$)")
_TEXT_PROJECTIONS = {"to_q": "q_proj", "to_k": "k_proj", "to_v": "v_proj", "to_out": "out_proj"}


@dataclass(frozen=True, slots=True)
class Key:
    """What a tensor's name says.

    Attributes:
        module: Path of the module as the file writes it; of a whole tensor, the tensor's name.
        part: a, b: the factors. bias: of b. magnitude: DoRA's. alpha: a scalar. tokens: rows of an
            embedding. whole: a tensor that stands for itself.
        style: The style that writes such a name; None where several do.
        is_embedding: Whether the factors are an embedding's.
        label: The adapter's label within the name ("default"), or "".
    """

    module: str
    part: Part
    style: Style | None = None
    is_embedding: bool = False
    label: str = ""


_LETTERS: Mapping[str, Part] = {"A": "a", "B": "b", "down": "a", "up": "b"}


def read_key(name: str) -> Key:
    """Return what a tensor's name says."""
    path = name.removeprefix(PEFT_PREFIX)
    style: Style | None = "peft" if path != name else None
    for form, part, writer in _FORMS:
        found = form.fullmatch(path)
        if found is None:
            continue
        groups = found.groupdict()
        known = part or _part(groups["letter"], groups.get("kind"))
        if known is not None:
            module = _renamed(found["module"]) if writer == "old_diffusers" else found["module"]
            is_embedding = "lora_embedding_" in path[len(found["module"]) :]
            return Key(module, known, writer or style, is_embedding, groups.get("label") or "")
    return Key(path, "whole", style)


def _part(letter: str, kind: str | None) -> Part | None:
    """Return which factor it is; the bias of the first has no meaning."""
    part = _LETTERS[letter]
    if kind != "bias":
        return part
    return "bias" if part == "b" else None


def _renamed(module: str) -> str:
    """Return the module that an attention processor of old diffusers changes."""
    module = _OLD_NAMES.sub("", module)
    parent, _, leaf = module.rpartition(".")
    if leaf not in _TEXT_PROJECTIONS:
        return module
    if module.startswith("text_encoder") or parent.endswith("self_attn"):
        return f"{parent}.{_TEXT_PROJECTIONS[leaf]}"
    return f"{module}.0" if leaf == "to_out" else module
