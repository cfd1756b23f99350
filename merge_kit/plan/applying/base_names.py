"""Whether an adapter was made for the model that it is applied to, as far as names tell."""

from __future__ import annotations

import re

from merge_kit.io.strict_json import shown
from merge_kit.plan.models import Model

_CACHED = re.compile(r"(?:models--)(.+)")
_HASH = re.compile(r"[0-9a-f]{12,64}")
_TELL_NOTHING = frozenset(
    {
        *("base", "model", "models", "weights", "checkpoint", "ckpt", "snapshot", "hf", "export"),
        *("main", "final", "best", "last", "latest", "step", "epoch", "run", "tmp"),
        *("merged", "output", "outputs", "out", "result", "results"),
    }
)
_NUMBERS = "0123456789-_.v"


def made_for_another(adapter: Model, model: Model) -> str | None:
    """Return a note if an adapter names another model than the one that it is applied to.

    Only last parts of names are compared, and only names that tell models apart: a folder may be
    called anything, and the adapter may name the folder of another machine.
    """
    assert adapter.adapter is not None
    wanted = _last(adapter.adapter.base)
    names = _names(model)
    if _says_nothing(wanted) or not names:
        return None
    if any(_same(wanted, name) for name in names):
        return None
    made_for = shown(adapter.adapter.base)
    return f"{adapter.label} was made for {made_for} and is applied to {model.label}; it fits"


def _names(model: Model) -> list[str]:
    """Return the names that a model is known by: folder, cache, and what its config says."""
    if model.checkpoint is None:
        return []
    places = [model.checkpoint.name, *model.checkpoint.root.parts[-4:]]
    found = [places[0]]
    found += [match[1] for part in places if (match := _CACHED.fullmatch(part)) is not None]
    stated = (model.config or {}).get("_name_or_path")
    if isinstance(stated, str):
        found.append(_last(stated))
    return [name for name in found if not _says_nothing(name)]


def _last(name: str) -> str:
    """Return the last part of a path or Hub id; of a path into a cache, the model's name there."""
    parts = [part for part in re.split(r"[/\\]", name) if part]
    cached = next((m[1] for part in parts if (m := _CACHED.fullmatch(part))), None)
    return cached or (parts[-1] if parts else "")


def _says_nothing(name: str) -> bool:
    """Return whether any model may be called so: a word such as "checkpoint", a number, a hash."""
    word = name.lower().rstrip(_NUMBERS)
    return not word or word in _TELL_NOTHING or _HASH.fullmatch(name.lower()) is not None


def _same(one: str, other: str) -> bool:
    """Return whether two names are one, an owner's name before it and separators left aside."""
    one, other = (re.sub(r"[-_. ]+", "-", name.lower()) for name in (one, other))
    return one == other or one.endswith(f"-{other}") or other.endswith(f"-{one}")
