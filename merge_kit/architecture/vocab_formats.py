"""Files that hold a whole vocabulary, each read into token -> id."""

from __future__ import annotations

import base64
import binascii
from collections.abc import Callable, Mapping
from typing import Any

from merge_kit.architecture.config import read_config
from merge_kit.architecture.sections import is_int
from merge_kit.architecture.sentencepiece import pieces
from merge_kit.errors import CheckpointError

Vocabulary = dict[str, int]


def read_json(name: str, content: bytes) -> dict[str, Any]:
    """Return the object that a JSON file holds.

    Raises:
        CheckpointError: If it is no UTF-8, no JSON or no object.
    """
    return read_config(_text(name, content), name)


def _tokenizer_json(name: str, content: bytes) -> Vocabulary:
    held = read_json(name, content)
    model = held.get("model")
    vocab = model.get("vocab") if isinstance(model, dict) else None
    if isinstance(vocab, dict):
        found = {token: _number(name, number) for token, number in vocab.items()}
    elif isinstance(vocab, list):
        found = {_first(name, entry): i for i, entry in enumerate(vocab)}
    else:
        raise _broken(name, "no vocabulary under model.vocab")
    return found | _entries(name, held, "added_tokens", "content", "id")


def _tekken(name: str, content: bytes) -> Vocabulary:
    held = read_json(name, content)
    settings = held.get("config")
    if not isinstance(settings, dict) or "vocab" not in held:
        raise _broken(name, "no config or no vocab")
    first = _number(name, settings.get("default_num_special_tokens", 0))
    ordinary = _entries(name, held, "vocab", "token_bytes", "rank")
    special = _entries(name, held, "special_tokens", "token_str", "rank")
    return {token: number + first for token, number in ordinary.items()} | special


def _vocab_json(name: str, content: bytes) -> Vocabulary:
    held = read_json(name, content)
    return {token: _number(name, number) for token, number in held.items()}


def _vocab_txt(name: str, content: bytes) -> Vocabulary:
    lines = _text(name, content).removesuffix("\n").split("\n")  # tokens may hold other separators
    return {line.removesuffix("\r"): i for i, line in enumerate(lines)}


def _tiktoken(name: str, content: bytes) -> Vocabulary:
    found: Vocabulary = {}
    for line in filter(bytes.strip, content.split(b"\n")):
        try:
            token, rank = line.split()
            found[base64.b64decode(token, validate=True).hex()] = int(rank)
        except (ValueError, binascii.Error) as exc:
            raise _broken(name, f"a line {line[:40]!r}, expected token and rank") from exc
    return found


def _sentencepiece(name: str, content: bytes) -> Vocabulary:
    return {piece: i for i, piece in enumerate(pieces(name, content))}


FORMATS: Mapping[str, Callable[[str, bytes], Vocabulary]] = {
    "tokenizer.json": _tokenizer_json,
    "tekken.json": _tekken,
    "vocab.json": _vocab_json,
    "encoder.json": _vocab_json,
    "vocab.txt": _vocab_txt,
    "tokenizer.model": _sentencepiece,
    "spiece.model": _sentencepiece,
    "spm.model": _sentencepiece,
    "sentencepiece.bpe.model": _sentencepiece,
    "tiktoken.model": _tiktoken,
    "qwen.tiktoken": _tiktoken,
}
"""Files that hold a whole vocabulary and their readers; the first that two models share decides."""


def _entries(name: str, held: Mapping[str, Any], key: str, token: str, number: str) -> Vocabulary:
    """Return the vocabulary that a list of objects under a key holds, {} where there is none."""
    listed = held.get(key)
    if listed is None:
        return {}
    if not isinstance(listed, list):
        raise _broken(name, f"{key} that is no list")
    found: Vocabulary = {}
    for entry in listed:
        if not isinstance(entry, dict) or not isinstance(entry.get(token), str):
            raise _broken(name, f"an entry {entry!r:.60} in {key}, expected {token} and {number}")
        found[entry[token]] = _number(name, entry.get(number))
    return found


def _first(name: str, entry: Any) -> str:
    if isinstance(entry, list) and entry and isinstance(entry[0], str):
        return entry[0]
    raise _broken(name, f"an entry {entry!r:.60} in model.vocab, expected [piece, score]")


def _number(name: str, value: Any) -> int:
    if is_int(value):
        return int(value)
    raise _broken(name, f"an id {value!r:.60}, expected an integer")


def _text(name: str, content: bytes) -> str:
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as exc:
        raise _broken(name, "text that is no UTF-8") from exc


def _broken(name: str, found: str) -> CheckpointError:
    hint = "is the download complete? compare the file with the original"
    return CheckpointError(f"the vocabulary cannot be read: found {found}", where=name, hint=hint)
