"""Adapters on a head that is its embedding: followed by both, or parted from one another."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace

from merge_kit.architecture.config import class_of
from merge_kit.architecture.ties import WITH_HEAD, embedding_for, head_name, is_tied
from merge_kit.core.tensors import TensorSpec
from merge_kit.errors import MismatchError
from merge_kit.io.adapter_values import Saved, TokenRows
from merge_kit.plan.applying.fitting import What
from merge_kit.plan.models import Model, full_name

_WITHOUT_HEAD = ("Model", "ForSequenceClassification", "ForTokenClassification", "Encoder")
_HEAD = "lm_head.weight"

ByTensor = dict[str, dict[Model, list[What]]]
"""For each tensor what each adapter does to it."""


@dataclass(frozen=True, slots=True)
class Ties:
    """The embedding of a model that stands for its head too.

    Attributes:
        embedding: Its name, "" if no head is tied to one.
        head: Name of the head, which the model need not store.
        heads: The head with its spec, where the model does not store it and could.
        is_stored: Whether the model stores the head.
        problem: Why the two cannot be parted, "" if they can.
    """

    embedding: str = ""
    head: str = ""
    heads: Mapping[str, TensorSpec] = field(default_factory=dict)
    is_stored: bool = False
    problem: str = ""


def ties_of(model: Model) -> Ties:
    """Return the tie of a model's head, as far as config.json and names tell."""
    config, names = model.config or {}, model.tensors
    first = class_of(config)
    known = first.endswith(WITH_HEAD)
    if is_tied(model.config) is False or (first.endswith(_WITHOUT_HEAD) and not known):
        return Ties()
    head = head_name(names)
    embedding = embedding_for(head or _HEAD, model.specs)
    if embedding is None or names[embedding].component != model.main.path:
        return Ties()
    problem = ""
    if model.config is None:
        if head is not None:
            return Ties()
        return Ties(embedding, _HEAD, problem="no config.json tells whether there is one")
    if config.get("is_encoder_decoder") is True or embedding.endswith("shared.weight"):
        problem = "an encoder and a decoder share it"
    elif head is None and not known:
        problem = "config.json names no class whose head is known"
    if head is not None:
        return Ties(embedding, head, is_stored=True, problem=problem)
    spec = replace(names[embedding].spec, name=_head_beside(names[embedding].spec.name))
    head = full_name(names[embedding].component, spec.name)
    return Ties(embedding, head, {head: spec}, problem=problem)


def _head_beside(embedding: str) -> str:
    """Return the name of the head that belongs to an embedding."""
    inner = "language_model."
    return inner + _HEAD if embedding.startswith(f"{inner}model.") else _HEAD


def part_ties(ties: Ties, touched: ByTensor, agreed: Collection[Model] = ()) -> bool:
    """Give head and embedding what each is changed by; return whether they now differ.

    Rows of tokens, and the weight that lies below an update, are those of both. An update changes
    one side alone, as it did in training, unless the adapter says `ensure_weight_tying`.

    Args:
        agreed: Adapters that hold the two whole, and equal.

    Raises:
        MismatchError: If they differ and cannot be parted.
    """
    if not ties.embedding:
        return False
    below, above = touched.get(ties.embedding, {}), touched.get(ties.head, {})
    if not below and not above:
        return False
    alike = not above and all(
        adapter in agreed or _is_shared(what, adapter)
        for adapter, whats in below.items()
        for what in whats
    )
    if not alike:
        _check(ties, below or above, named=bool(above))
    followed = {
        model: [w for w in ws if model in agreed or _is_shared(w, model)]
        for model, ws in below.items()
    }
    leading = {model: [w for w in ws if _is_below(w)] for model, ws in above.items()}
    if not alike or ties.is_stored:
        touched[ties.head] = _joined(above, followed)
    if below or any(leading.values()):
        touched[ties.embedding] = _joined(below, leading)
    return not alike


def _check(ties: Ties, sides: Mapping[Model, list[What]], *, named: bool) -> None:
    unknown = ties.problem.startswith("config.json")
    if not ties.problem or (unknown and named):
        return
    adapter = next(iter(sides))
    raise MismatchError(
        f"changes {ties.embedding} or the head that is tied to it, and the two cannot be parted: "
        f"{ties.problem}",
        where=adapter.label,
        hint="leave the embedding out of target_modules and modules_to_save, or train rows of it "
        "with trainable_token_indices",
    )


def _is_below(what: What) -> bool:
    return isinstance(what, Saved) and what.why == "base_layer"


def _is_shared(what: What, adapter: Model) -> bool:
    """Return whether what an adapter does to an embedding happens to the head as well."""
    assert adapter.adapter is not None
    if adapter.adapter.config.get("ensure_weight_tying") is True:
        return True
    return isinstance(what, TokenRows) or _is_below(what)


def _joined(
    own: Mapping[Model, list[What]], more: Mapping[Model, list[What]]
) -> dict[Model, list[What]]:
    """Return what adapters do to a tensor, with what they do by way of the other one of the pair.

    A kind of thing that an adapter does to the tensor itself is not done twice.
    """
    joined = {model: list(whats) for model, whats in own.items()}
    for model, whats in more.items():
        kinds = {type(what) for what in own.get(model, ())}
        added = [what for what in whats if type(what) not in kinds]
        if added:
            joined[model] = [*added, *joined.get(model, [])]
    return joined
