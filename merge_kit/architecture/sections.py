"""Which part of a config.json describes which layer stack: nested configs and layer-count keys."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

COUNT_KEYS = (
    "num_hidden_layers",
    "n_layer",
    "n_layers",
    "num_layers",
    "num_transformer_layers",
    "num_blocks",
    "depth",
)
ENCODER_COUNT_KEYS = ("encoder_layers", "num_encoder_layers", "n_encoder_layers")
DECODER_COUNT_KEYS = ("decoder_layers", "num_decoder_layers", "n_decoder_layers")

_ALL_COUNT_KEYS = (*COUNT_KEYS, *ENCODER_COUNT_KEYS, *DECODER_COUNT_KEYS)

_MEANS = {
    "visual": "vision",
    "image": "vision",
    "vit": "vision",
    "speech": "audio",
    "language": "text",
    "llm": "text",
    "lm": "text",
}
_EMPTY = frozenset(
    {"config", "model", "models", "layers", "layer", "tower", "blocks", "block", "h"}
)
_KINDS = ("vision", "audio")
_PREFERRED = ("text", "decoder", "generator")


@dataclass(frozen=True, slots=True)
class Section:
    """An object of a config.json that describes a model or a part of it.

    Attributes:
        path: Keys that lead to it, () for the whole file.
        config: The object.
    """

    path: tuple[str, ...]
    config: Mapping[str, Any]

    @property
    def kind(self) -> str:
        """What it describes: "vision", "audio", or "text" for everything else."""
        return _kind(self.words)

    @property
    def words(self) -> frozenset[str]:
        """The words of its path that say something."""
        return path_words(".".join(self.path))

    @property
    def is_counted(self) -> bool:
        """Whether it holds a layer count."""
        return bool(self._held(_ALL_COUNT_KEYS))

    def count_keys(self, prefix: str, layers: int) -> tuple[str, ...]:
        """Return the keys that hold the layer count of a stack, () where the config is silent.

        Of keys with different counts, those are taken that hold the number of layers there are,
        else the best known.
        """
        plain = self._held(COUNT_KEYS)
        encoder, decoder = self._held(ENCODER_COUNT_KEYS), self._held(DECODER_COUNT_KEYS)
        side = side_of(prefix)
        if side == "encoder" and encoder:
            keys = (*encoder, *plain)  # num_hidden_layers is then a second name for it
        elif side == "decoder" and decoder:
            keys = decoder
        else:
            keys = plain or decoder or encoder
        counts = [self.config[key] for key in keys]
        count = layers if layers in counts else next(iter(counts), None)
        return tuple(key for key in keys if self.config[key] == count)

    def count(self, prefix: str, layers: int) -> int | None:
        """Return how many layers this section gives a stack, None where it is silent."""
        keys = self.count_keys(prefix, layers)
        return int(self.config[keys[0]]) if keys else None

    def other_side(self, prefix: str) -> str:
        """Return "encoder" or "decoder" if keys of that name describe another stack, else ""."""
        side = side_of(prefix)
        if self._held((*ENCODER_COUNT_KEYS, *DECODER_COUNT_KEYS)) and side:
            return "decoder" if side == "encoder" else "encoder"
        return ""

    def _held(self, keys: Sequence[str]) -> tuple[str, ...]:
        return tuple(key for key in keys if is_int(self.config.get(key)))


def is_int(value: Any) -> bool:
    """Return whether a JSON value is an integer; true and false are none."""
    return isinstance(value, int) and not isinstance(value, bool)


def side_of(prefix: str) -> str:
    """Return "encoder" or "decoder", whichever is the first such part of a path, or ""."""
    return next((part for part in prefix.split(".") if part in ("encoder", "decoder")), "")


def find_sections(config: Mapping[str, Any]) -> tuple[Section, ...]:
    """Return every object with a layer count or a model type of its own, outer ones first.

    The whole file is one of them only if it holds a layer count or nothing else does: a config
    made of parts has a model type too.
    """
    found = tuple(_walk(config, ()))
    if any(section.is_counted for section in found) and not found[0].is_counted:
        return found[1:]
    return found


def section_of(config: Mapping[str, Any], prefix: str, layers: int) -> Section | None:
    """Return the section that describes a stack, or None.

    The words of its path decide (`vision_config` and `vision_tower.encoder.layers`), then whether
    the layer count is the stack's, then the inner one of two. A file without parts describes
    every stack.

    Args:
        config: The whole config.
        prefix: The stack's path before the layer number.
        layers: How many layers the stack has.
    """
    sections = find_sections(config)
    if len(sections) == 1 and not sections[0].path:
        return sections[0]
    words = path_words(prefix)

    def fit(section: Section) -> tuple[int, bool, bool, bool, int]:
        return (
            len(section.words & words),
            section.count(prefix, layers) == layers,
            section.is_counted,
            not section.words or any(word in section.words for word in _PREFERRED),
            len(section.path),
        )

    return max((s for s in sections if s.kind == _kind(words)), key=fit, default=None)


def main_section(config: Mapping[str, Any]) -> Section | None:
    """Return the section of the text decoder, or of the whole model where there is no other."""
    sections = find_sections(config)

    def rank(section: Section) -> tuple[bool, int, int]:
        named = next((i for i, w in enumerate(_PREFERRED) if w in section.words), len(_PREFERRED))
        return not section.is_counted, named if section.words else 1, len(section.path)

    return min([s for s in sections if s.kind == "text"] or sections, key=rank, default=None)


def mirrors(
    config: Mapping[str, Any], section: Section, prefix: str, layers: int
) -> tuple[Section, ...]:
    """Return the section and, if it repeats a nested text config's layer count, the whole file."""
    root = find_sections(config)[0]
    if section.path and section.kind == "text" and not root.path and root.is_counted:
        same = root.count(prefix, layers) == section.count(prefix, layers)
        return (section, root) if same else (section,)
    return (section,)


def _walk(config: Mapping[str, Any], path: tuple[str, ...]) -> Iterator[Section]:
    section = Section(path, config)
    if not path or section.is_counted or isinstance(config.get("model_type"), str):
        yield section
    for key, value in config.items():
        if isinstance(value, dict):
            yield from _walk(value, (*path, key))


def path_words(path: str) -> frozenset[str]:
    """Return the words of a path that say what it belongs to, synonyms made one."""
    split = re.split(r"[._/]", path.lower())
    return frozenset(_MEANS.get(word, word) for word in split if word) - _EMPTY


def _kind(words: frozenset[str]) -> str:
    return next((kind for kind in _KINDS if kind in words), "text")
