"""Vocabularies: the files of a tokenizer, and whether two of them give tokens the same ids."""

from __future__ import annotations

import re
from collections.abc import Mapping
from fnmatch import fnmatchcase

from merge_kit.architecture.sections import is_int
from merge_kit.architecture.vocab_formats import FORMATS, Vocabulary, read_json

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer.model.v*",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "vocab.bpe",
    "encoder.json",
    "merges.txt",
    "bpe.codes",
    "spiece.model",
    "spm.model",
    "source.spm",
    "target.spm",
    "sentencepiece.bpe.model",
    "sentencepiece.model",
    "tekken.json",
    "*.tiktoken",
    "tiktoken.model",
    "chat_template.jinja",
    "chat_template.json",
    "additional_chat_templates/*",
)
"""Files that follow the choice of a tokenizer, as names or patterns, in any folder of a model."""

Files = Mapping[str, bytes]
_NUMBER = re.compile(r"[0-9]{1,9}")


def is_tokenizer_file(name: str) -> bool:
    """Return whether a file, relative to its model with forward slashes, belongs to a tokenizer."""
    parts = name.split("/")
    tails = ("/".join(parts[i:]) for i in range(len(parts)))
    return any(fnmatchcase(tail, pattern) for tail in tails for pattern in TOKENIZER_FILES)


def same_vocabulary(texts_a: Files, texts_b: Files) -> bool | None:
    """Return whether the tokenizers of two models give the same tokens the same ids.

    Args:
        texts_a: Name -> content of the tokenizer files of one model; others are ignored.
        texts_b: Those of the other.

    Returns:
        None where nobody can tell, because a model has no vocabulary or they share no format.

    Raises:
        CheckpointError: If a file that must be read is broken.
    """
    for name, read in FORMATS.items():
        if name in texts_a and name in texts_b:
            equal = texts_a[name] == texts_b[name]
            if equal and _extras(texts_a) == _extras(texts_b):
                return True
            a = read(name, texts_a[name])
            b = a if equal else read(name, texts_b[name])
            return a | _added(texts_a) == b | _added(texts_b)
    return None


def _extras(files: Files) -> tuple[bytes | None, ...]:
    return tuple(files.get(name) for name in ("added_tokens.json", "tokenizer_config.json"))


def _added(files: Files) -> Vocabulary:
    """Return the ids of tokens added on top of a vocabulary, from every file that holds some."""
    found: Vocabulary = {}
    if "added_tokens.json" in files:
        held = read_json("added_tokens.json", files["added_tokens.json"])
        found |= {token: number for token, number in held.items() if is_int(number)}
    if "tokenizer_config.json" in files:
        held = read_json("tokenizer_config.json", files["tokenizer_config.json"])
        decoder = held.get("added_tokens_decoder")
        for number, token in (decoder if isinstance(decoder, dict) else {}).items():
            content = token.get("content") if isinstance(token, dict) else None
            if _NUMBER.fullmatch(number) and isinstance(content, str):
                found[content] = int(number)
    return found
