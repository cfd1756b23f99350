"""Which key of a recipe's `modules` a tensor belongs to."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from merge_kit.architecture.stacks import Stack, outermost

DEFAULT = "default"
_VISION = ("vision_tower", "vision_model")
_PROJECTORS = ("projector", "merger", "connector", "mm_projector", "aligner")
_VISION_WORDS = ("vision", "visual", "image_encoder")
_AUDIO_WORDS = ("audio", "speech", "talker", "code2wav")
_HEADS = ("lm_head", "proj_out", "embed_out", "output_projection")


def component_of(name: str, keys: Sequence[str], stacks: Sequence[Stack]) -> str | None:
    """Return the key that a tensor belongs to, or None if no key covers it.

    The longest key that is the beginning of the tensor's path wins (`model.language_model.layers`,
    the folder `unet`), then the dialect's component names (text_decoder, vision_tower,
    vision_model, multi_modal_projector, encoder, decoder, shared), then `default`: everything in a
    model with at most one numbered prefix, else the tensors outside all layers.

    Args:
        name: The tensor's name, with its folder if it has one ("unet/conv_in.weight").
        keys: The keys of `modules`.
        stacks: The model's stacks.
    """
    leading = [key for key in keys if name.startswith((f"{key}.", f"{key}/"))]
    if leading:
        return max(leading, key=len)
    kind = kind_of(name)
    if kind == "vision":
        kind = next((key for key in _VISION if key in keys), kind)
    if kind in keys:
        return kind
    side = side_of(name)
    if side in keys:
        return side
    everything = len(stacks) <= 1 or outermost(name) is None
    return DEFAULT if DEFAULT in keys and everything else None


def component_names(names: Iterable[str], stacks: Sequence[Stack]) -> tuple[str, ...]:
    """Return the keys that `modules` may have for this model, for hints."""
    names = tuple(names)
    found = dict.fromkeys([DEFAULT])
    if len(stacks) > 1:
        found |= dict.fromkeys(stack.prefix for stack in stacks)
    found |= dict.fromkeys(name.rpartition("/")[0] for name in names if "/" in name)
    kinds = {kind_of(name) for name in names}
    sides = {side_of(name) for name in names}
    if len(kinds) > 1:
        found |= dict.fromkeys(sorted(kinds & {"text_decoder", "multi_modal_projector"}))
        if "vision" in kinds:
            parts = {part for name in names for part in name.split(".")}
            found |= dict.fromkeys([part for part in _VISION if part in parts] or _VISION[:1])
    elif {"encoder", "decoder"} <= sides:
        found |= dict.fromkeys(sorted(sides))
    return tuple(key for key in found if key)


def kind_of(name: str) -> str:
    """Return the part of a multimodal model; what is no other part is the text decoder."""
    parts = name.rpartition("/")[2].lower().split(".")
    if any(part.endswith(_PROJECTORS) or "deepstack_merger" in part for part in parts):
        return "multi_modal_projector"
    if any(word in part for part in parts for word in _VISION_WORDS):
        return "vision"
    if any(word in part for part in parts for word in _AUDIO_WORDS):
        return "audio"
    return "text_decoder"


def side_of(name: str) -> str:
    """Return "encoder", "decoder" or "shared" of an encoder-decoder, "" for other tensors."""
    parts = name.split(".")
    if any(head in parts for head in _HEADS):
        return "decoder"
    return next((part for part in parts if part in ("encoder", "decoder", "shared")), "")
