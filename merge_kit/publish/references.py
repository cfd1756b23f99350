"""References to models without the places where they lie."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import PurePath

from merge_kit.plan.values import PlanInput

_WORDS = {
    "source": {"base", "union"},
    "tokenizer_source": {"base", "union"},
    "basis": {"svd"},
}
"""What is no reference, by the key that it stands under."""
_HOME = re.compile(
    r"(?<![\w.~-])(?:(?:/home|/Users|[A-Za-z]:\\Users)[/\\][^/\\\s\"']+|/root(?=/|$))"
)
_LOCAL = re.compile(r"[/~.\\]|[A-Za-z]:[/\\]|[^/]*/[^/]*/|.*\\")
"""What begins like this is a path; `org/name` may be one or a Hub id, and tells nothing."""


class References:
    """Looks up which input a reference means.

    Args:
        inputs: As the plan has them.
        stages: Names of the recipe's other documents; they win over paths.
    """

    def __init__(self, inputs: Sequence[PlanInput], stages: set[str]) -> None:
        self._inputs, self._stages = tuple(inputs), stages
        self._known: dict[str, PlanInput] = {}
        for model in inputs:
            whole = "+" not in model.text or _ends_with(model, model.text)  # else with adapters
            self._known.setdefault(model.text if whole else model.text.split("+", 1)[0], model)
        for model in inputs:  # `{path: a, revision: b}` is `a@b` to the plan
            self._known.setdefault(model.text.split("+", 1)[0].rpartition("@")[0], model)
        self._known.pop("", None)

    def portable(self, key: str, text: str) -> str:
        """Return a reference that stands under a key: `input-1:name` where it is a local path."""
        if text.split("@", 1)[0] in self._stages or text in _WORDS.get(key, ()):
            return text
        found = self._find(text)
        if found is not None:
            return label(found, text)
        if key == "basis":
            return self._tensor(text)
        if "+" in text:
            return "+".join(self.portable(key, part) for part in text.split("+"))
        path, at, revision = text.rpartition("@")
        if at and path:
            return f"{self.portable(key, path)}@{revision}"
        return f"local:{folder_name(text)}" if _LOCAL.match(text) else text

    def _tensor(self, text: str) -> str:
        """Return the reference to a tensor of a file, `FILE:TENSOR`, or to a file alone."""
        path, colon, name = text.rpartition(":")
        found = self._find(path) if colon and path else None
        if found is not None:
            return f"{label(found)}:{printable(name)}"
        return f"local:{folder_name(text)}" if _LOCAL.match(text) else text

    def _find(self, text: str) -> PlanInput | None:
        """Return the input of this reference, or of a path that ends as its place does."""
        if text in self._known:
            return self._known[text]
        local = (model for model in self._inputs if model.hub_id is None)
        return next((model for model in local if _ends_with(model, text)), None)


def label(model: PlanInput, text: str | None = None) -> str:
    """Return what an output calls a model: its Hub id as it stands in `text`, else `key:name`."""
    if model.hub_id is None:
        return f"{model.key}:{printable(model.name)}"
    if text is not None and text.split("@", 1)[0] == model.hub_id:
        return text
    return f"{model.hub_id}@{model.revision}" if model.revision else model.hub_id


def _ends_with(model: PlanInput, text: str) -> bool:
    """Return whether the place of a model ends as a path does, its `~` and `..` left aside."""
    parts = PurePath(os.path.normpath(text)).parts[1 if text.startswith("~") else 0 :]
    parts = tuple(part for part in parts if part not in ("..", "."))
    return bool(parts) and model.root.parts[-len(parts) :] == parts


def folder_name(text: str) -> str:
    """Return the last part of a path with either kind of slash."""
    return printable(re.split(r"[/\\]", text.rstrip("/\\"))[-1])


def without_homes(text: str) -> str:
    """Return a text with home directories replaced by `~`."""
    own = os.path.expanduser("~")  # noqa: PTH111  (must not fail without a home)
    if len(own) > 1:
        text = re.sub(re.escape(own) + r"(?=[/\s\"']|$)", "~", text)
    return _HOME.sub("~", text)


def printable(text: str, limit: int = 200) -> str:
    """Return a text in one line: what cannot be printed is replaced, and it is not too long."""
    shown = "".join(c if c.isprintable() else "\ufffd" for c in text[:limit])
    return shown if len(text) <= limit else shown + "..."
