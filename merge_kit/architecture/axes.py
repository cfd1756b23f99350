"""Which axis of which tensor of a decoder is hidden, intermediate, or of heads."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from merge_kit.architecture.axis_names import FAMILIES, Family, Pattern
from merge_kit.architecture.sections import is_int
from merge_kit.core.names import nearest
from merge_kit.core.tensors import TensorSpec
from merge_kit.errors import MismatchError, PlanError

Kind = Literal["hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", ""]
KINDS: tuple[Kind, ...] = (
    "hidden_size",
    "intermediate_size",
    "num_attention_heads",
    "num_key_value_heads",
)
_WORDS: Mapping[str, Kind] = {
    "hidden": "hidden_size",
    "inter": "intermediate_size",
    "heads": "num_attention_heads",
    "kv": "num_key_value_heads",
}


@dataclass(frozen=True, slots=True)
class Sizes:
    """Sizes of a decoder by the names that config.json has for them; 0 for what it has not."""

    hidden_size: int
    intermediate_size: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int

    def of(self, kind: Kind) -> int:
        """Return the size of this name."""
        return int(getattr(self, kind))

    def elements(self, kind: Kind) -> int:
        """Return the elements of an axis of this kind."""
        heads = kind in ("num_attention_heads", "num_key_value_heads")
        return self.of(kind) * (self.head_dim if heads else 1)


@dataclass(frozen=True, slots=True)
class Run:
    """Elements that follow one another along an axis; of the kind "" they are no size of these."""

    kind: Kind
    length: int


@dataclass(frozen=True, slots=True)
class Placed:
    """A tensor by what its axes are.

    Attributes:
        axes: The runs along each axis; most axes are one run, fused ones are several.
        after: Name of the norm that its inputs pass; "" where its columns are not hidden.
        role: norm: weights of a norm over the hidden size. head: rows for tokens or classes.
            matched: a projection whose output is normalised by heads, so that its scale is free.
    """

    axes: tuple[tuple[Run, ...], ...]
    after: str = ""
    role: Literal["", "norm", "embedding", "head", "matched"] = ""

    def has(self, kind: Kind) -> bool:
        """Return whether an axis is of this kind."""
        return any(run.kind == kind for runs in self.axes for run in runs)


def family_of(config: Mapping[str, Any] | None, label: str) -> Family:
    """Return what is known of an architecture's names.

    Raises:
        PlanError: If there is no config.json, or nothing is known.
    """
    if config is None:
        problem = "has no config.json, which says what its axes are"
        raise PlanError(problem, where=label, hint="put the model's config.json beside its weights")
    name = config.get("model_type")
    if isinstance(name, str) and name in FAMILIES:
        return FAMILIES[name]
    known = ", ".join(FAMILIES)
    hint = nearest(str(name), FAMILIES) if name else ""
    raise PlanError(
        f"the axes of model_type {str(name)!r} are not known, expected one of {known}",
        where=f"{label}/config.json",
        hint=hint
        if hint.startswith("did")
        else "only models of these can be padded, cropped or projected",
    )


def sizes_of(
    family: Family, config: Mapping[str, Any], specs: Mapping[str, TensorSpec], label: str
) -> Sizes:
    """Return the sizes of a model; what its config leaves to defaults is told by its tensors.

    Raises:
        PlanError: If a size is no whole number above 0, or cannot be told.
    """
    where = f"{label}/config.json"

    def stated(key: str) -> int:
        name = family.key(key)
        value = config.get(name)
        if value is None:
            return 0
        if not is_int(value) or value < 1:
            problem = f"{name} is {str(value)[:60]}, expected a whole number above 0"
            raise PlanError(problem, where=where, hint="one size holds for all layers")
        return int(value)

    def rows(ending: str) -> int:
        found = (s.shape[0] for n, s in specs.items() if n.endswith(ending) and len(s.shape) == 2)
        return next(found, 0)

    hidden, heads = stated("hidden_size"), stated("num_attention_heads")
    if not hidden or not heads:
        missing = family.key("hidden_size" if not hidden else "num_attention_heads")
        raise PlanError(f"{missing} is missing", where=where, hint="add it to the config")
    head_dim = stated("head_dim") or rows("self_attn.q_proj.weight") // heads or hidden // heads
    kv_rows = rows("self_attn.k_proj.weight")
    return Sizes(
        hidden,
        stated("intermediate_size") or _inner(family, specs),
        heads,
        stated("num_key_value_heads") or kv_rows // max(1, head_dim) or heads,
        head_dim,
    )


def _inner(family: Family, specs: Mapping[str, TensorSpec]) -> int:
    """Return the intermediate size that a config leaves out, from the first tensor that has it."""
    for name, spec in specs.items():
        found = family.find(name)
        if found is None or len(found[0].axes) != len(spec.shape):
            continue
        for words, length in zip(found[0].axes, spec.shape, strict=True):
            if set(words) == {"inter"}:
                return length // len(words)
    return 0


def place(
    name: str, spec: TensorSpec, family: Family, sizes: Sizes, names: Mapping[str, object]
) -> Placed:
    """Return what the axes of a tensor are.

    Args:
        names: The model's tensors.

    Raises:
        MismatchError: If its name is not known, or its shape is not that of the config's sizes.
    """
    found = family.find(name)
    if found is None:
        raise MismatchError(
            "is no tensor whose axes are known in this architecture",
            where=name,
            hint="copy the model without it first (`tensors: [{match: ..., drop: true}]` in a "
            "document with a name)",
        )
    pattern, prefix = found
    wanted = _lengths(pattern, spec.shape, sizes)
    if wanted != spec.shape:
        raise MismatchError(
            f"has shape {list(spec.shape)}, expected {list(wanted)} by the sizes in config.json",
            where=name,
            hint="is the config that of these weights?",
        )
    axes = tuple(
        tuple(Run(_WORDS.get(word, ""), _length(word, n, sizes)) for word in words)
        for words, n in zip(pattern.axes, spec.shape, strict=True)
    )
    after = family.norm(pattern, prefix, names) if pattern.after else ""
    placed = Placed(axes, after, pattern.role)
    if placed.role == "matched" and f"{prefix}{pattern.matched}" not in names:
        return replace(placed, role="")
    return placed


def _length(word: str, length: int, sizes: Sizes) -> int:
    return sizes.elements(_WORDS[word]) if word in _WORDS else length


def _lengths(pattern: Pattern, shape: tuple[int, ...], sizes: Sizes) -> tuple[int, ...]:
    """Return the shape that a tensor should have; what no size tells is as it is."""
    if len(pattern.axes) != len(shape):
        return tuple(
            sum(_length(word, 0, sizes) for word in words) for words in pattern.axes
        )  # another number of axes: no shape equals it
    return tuple(
        sum(_length(word, n, sizes) for word in words)
        for words, n in zip(pattern.axes, shape, strict=True)
    )
