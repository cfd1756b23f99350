"""config.json: read strictly, edited as text so that whatever is not changed stays as it was."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

from merge_kit.architecture import json_text
from merge_kit.errors import CheckpointError

Config = Mapping[str, Any]
MAX_DEPTH = 64
"""Levels of nesting allowed; real configs have about five."""

MAX_WORK = 50_000_000
"""Edits times characters allowed, some seconds; real configs have a few edits in 10,000."""

TEXT_PARTS = ("text_config", "llm_config", "language_config", "decoder", "generator")
"""Keys under which a composite config keeps the one of its text decoder."""


@dataclass(frozen=True, slots=True)
class Edit:
    """One change: set the value at a path of keys (a new key goes last), or remove it."""

    path: tuple[str, ...]
    value: Any = None
    remove: bool = False


class _RefusedError(ValueError):
    """Valid for Python's reader, but not for this one."""


def read_config(text: str, where: str) -> dict[str, Any]:
    """Return the object that a JSON file holds.

    Args:
        text: The file's text.
        where: How errors name the file.

    Raises:
        CheckpointError: If it is no JSON, no object, nested too deeply, or has duplicate keys,
            NaN or infinity.
    """
    hint = "is the file complete? compare it with the original"
    try:
        value = json.loads(
            text,
            object_pairs_hook=_no_duplicates,
            parse_constant=_no_constant,
            parse_float=_finite,
        )
    except json.JSONDecodeError as exc:
        place = f"{where}:{exc.lineno}:{exc.colno}"
        raise CheckpointError(f"no valid JSON: {exc.msg}", where=place, hint=hint) from exc
    except RecursionError as exc:
        raise _too_deep(where) from exc
    except ValueError as exc:
        raise CheckpointError(str(exc), where=where, hint=hint) from exc
    if not isinstance(value, dict):
        problem = f"holds a {type(value).__name__}, expected a JSON object"
        raise CheckpointError(problem, where=where, hint=hint)
    if _deeper_than(value, MAX_DEPTH):
        raise _too_deep(where)
    return value


def edit_config(text: str, edits: Sequence[Edit], where: str = "config.json") -> str:
    """Return the text with all edits made, one after the other.

    An existing value is replaced in place; a new key is inserted as the last of its object, with
    the object's own indentation and separators. Removing what is not there changes nothing.

    Raises:
        CheckpointError: If the text is no valid config, or a path leads through a value that is
            no object.
    """
    read_config(text, where)
    if len(edits) * len(text) > MAX_WORK:
        problem = f"{len(edits):,} values would have to be changed in {len(text):,} characters"
        raise CheckpointError(problem, where=where, hint="this is no config.json of a model")
    for edit in edits:
        text = _edited(text, edit, where)
    return text


def with_dtype(text: str, dtype_name: str) -> str:
    """Return a config that names this dtype ("bfloat16"), for the model and its parts.

    Whichever of `dtype` and `torch_dtype` is there is patched, at the top and in nested configs.
    Where neither is there, a config of transformers gets `torch_dtype`, which its versions 4 and
    5 both read; other configs (diffusers, timm) keep none, since their readers know no such key.
    """
    config = read_config(text, "config.json")
    edits = [Edit((*path, key), dtype_name) for path, key in _dtype_keys(config, ())]
    if not any(len(edit.path) == 1 for edit in edits) and _is_transformers(config):
        edits.append(Edit(("torch_dtype",), dtype_name))
    return edit_config(text, edits)


def with_tied(text: str, tied: bool) -> str:
    """Return a config that says whether the head is the embedding.

    `tie_word_embeddings` is set at the top, where transformers 5 looks, and in the config of the
    text decoder, where version 4 looks. A file that says so already is not changed.
    """
    config = read_config(text, "config.json")
    places: list[tuple[str, ...]] = [()]
    places += [(key,) for key in TEXT_PARTS if isinstance(config.get(key), dict)]
    edits = []
    for path in places:
        part = config[path[0]] if path else config
        if part.get("tie_word_embeddings") is not tied:
            edits.append(Edit((*path, "tie_word_embeddings"), tied))
    return edit_config(text, edits)


def _edited(text: str, edit: Edit, where: str) -> str:
    start = json_text.skip(text, 0)
    for depth, key in enumerate(edit.path):
        found = next((m for m in json_text.members(text, start) if m.key == key), None)
        rest = edit.path[depth + 1 :]
        if found is None:
            new = _nested(rest, edit.value)
            return text if edit.remove else json_text.inserted(text, start, key, new)
        if not rest:
            if edit.remove:
                return json_text.removed(text, start, key)
            return json_text.replaced(text, found, edit.value)
        if text[found.start] != "{":
            if edit.remove:
                return text
            problem = f"{'.'.join(edit.path[: depth + 1])} is no object that can hold {rest[-1]}"
            raise CheckpointError(problem, where=where, hint="repair the config by hand")
        start = found.start
    return text


def _nested(path: tuple[str, ...], value: Any) -> Any:
    for key in reversed(path):
        value = {key: value}
    return value


def _dtype_keys(config: Config, path: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], str]]:
    """Yield path and key of every dtype of this config and of the model configs within."""
    for key in ("dtype", "torch_dtype"):
        if key in config and isinstance(config[key], str | None):
            yield path, key
    for key, value in config.items():
        if isinstance(value, dict) and _is_model_part(key, value):
            yield from _dtype_keys(value, (*path, key))


def _is_model_part(key: str, value: Config) -> bool:
    """Return whether a nested object is the config of a part of the model."""
    return "model_type" in value or (key.endswith("_config") and "quant" not in key)


def _is_transformers(config: Config) -> bool:
    return "model_type" in config or "architectures" in config


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                raise _RefusedError(f"key {key[:60]!r} appears twice in one object, expected once")
            seen.add(key)
    return found


def _no_constant(name: str) -> NoReturn:
    raise _RefusedError(f"holds {name}, which is no JSON number")


def _finite(text: str) -> float:
    number = float(text)
    if math.isinf(number):
        raise _RefusedError(f"holds {text}, which no float can hold")
    return number


def _deeper_than(value: Any, levels: int) -> bool:
    layer = [value]
    for _ in range(levels):
        children = [list(v.values()) if isinstance(v, dict) else v for v in layer]
        layer = [c for held in children for c in held if isinstance(c, dict | list)]
        if not layer:
            return False
    return True


def _too_deep(where: str) -> CheckpointError:
    problem = f"nested more than {MAX_DEPTH} levels deep"
    return CheckpointError(problem, where=where, hint="this is no config.json of a model")


def class_of(config: Mapping[str, Any] | None) -> str:
    """Return the class that a config names first, "" if it names none."""
    names = (config or {}).get("architectures")
    return str(names[0]) if isinstance(names, list) and names else ""
