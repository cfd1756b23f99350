"""Finds routers of prompts: one row an expert, of length 1, along what its prompts have in common.

positive and negative prompts give a vector each, and the row is their difference.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from merge_kit.engine.operands import Operands
from merge_kit.engine.routers_layers import Layers
from merge_kit.engine.routers_tokens import Tokens, tokenised
from merge_kit.engine.workspace import Workspace
from merge_kit.errors import NonFiniteError, PlanError, SolveError
from merge_kit.plan.building.routers_tasks import (
    EXPERTS,
    MOST_TOKENS,
    SHARED,
    EmbeddedRouters,
    HiddenRouters,
    PromptSet,
    Question,
    found_name,
)
from merge_kit.plan.sources import Rows

SMALLEST = 1e-6
"""Differences that are shorter, beside the vectors that they are of, are rounding alone."""


class _Embedded:
    """The embedding's rows of the tokens that prompts have."""

    def __init__(
        self, question: Question, tokens: Mapping[str, Tokens], operands: Operands
    ) -> None:
        used = tuple(sorted({token for one in tokens.values() for token in one}))
        self._places = {token: place for place, token in enumerate(used)}
        self._rows = operands.whole(Rows(question.embedding, used), torch.float32, Workspace())

    def of(self, tokens: Tokens) -> Tensor:
        """Return (tokens, hidden), float32."""
        places = torch.tensor([self._places[token] for token in tokens])
        return self._rows.index_select(0, places)


def find_embedded(
    task: EmbeddedRouters, operands: Operands, stop: threading.Event
) -> Mapping[str, Tensor]:
    """Return routers of the sum of the embeddings of the prompts' tokens; `stop` is not needed."""
    del stop
    question = task.question
    tokens = tokenised(question)
    embedded = _Embedded(question, tokens, operands)

    def summed(texts: Sequence[str]) -> Tensor:
        total = torch.zeros(question.embedding.shape[1], dtype=torch.float64)
        for text in texts:
            total += embedded.of(tokens[text]).double().sum(dim=0)
        return total.div(total.norm().clamp(min=1e-8))

    return _routers(question, summed, None)


def find_hidden(
    task: HiddenRouters, operands: Operands, stop: threading.Event
) -> Mapping[str, Tensor]:
    """Return routers of what enters the layers' MLPs at the prompts' tokens."""
    question = task.question
    tokens = tokenised(question)
    _check_lengths(question, tokens)
    texts = tuple(tokens)
    embedded = _Embedded(question, tokens, operands)
    vectors = torch.empty(len(texts), question.embedding.shape[1], dtype=torch.float64)
    places = {text: place for place, text in enumerate(texts)}
    found: dict[str, Tensor] = {}

    def meant(some: Sequence[str]) -> Tensor:
        total = torch.zeros(vectors.shape[1], dtype=torch.float64)
        for text in some:
            total += vectors[places[text]]
        return total.div(max(1, len(some)))

    def use(layer: int, prompt: int, entering: Tensor) -> None:
        wide = entering.double()
        vectors[prompt] = wide.mean(dim=0) if task.averaged else wide[-1]
        if prompt == len(texts) - 1 and layer in task.layers:
            found.update(_routers(question, meant, layer))

    Layers(task).run([embedded.of(tokens[text]) for text in texts], operands, stop, use)
    return found


def _routers(
    question: Question, vector: Callable[[Sequence[str]], Tensor], layer: int | None
) -> dict[str, Tensor]:
    """Return the experts' rows, and that of the shared expert if it has prompts."""
    rows = [_row(question, one, vector, layer) for one in question.experts]
    found = {found_name(EXPERTS, layer): torch.stack(rows)}
    if question.shared is not None:
        found[found_name(SHARED, layer)] = _row(question, question.shared, vector, layer)[None]
    return found


def _row(
    question: Question,
    one: PromptSet,
    vector: Callable[[Sequence[str]], Tensor],
    layer: int | None,
) -> Tensor:
    """Return positive minus negative, of length 1, in float32."""
    row = vector(one.positive)
    length = float(row.norm())
    if one.negative:
        row = row - vector(one.negative)
    place = "" if layer is None else f" in layer {layer}"
    if not bool(row.isfinite().all()):
        problem = f"the prompts of {one.expert} give values that are not finite{place}"
        hint = "does the model hold NaN or infinity? `mergekit inspect` counts them"
        raise NonFiniteError(problem, where=question.label, hint=hint)
    if not float(row.norm()) > SMALLEST * length:
        problem = f"the prompts of {one.expert} give no direction{place}: their difference is zero"
        hint = "change them, or leave out the negative ones"
        raise SolveError(problem, where=question.label, hint=hint)
    return row.div(row.norm()).float()


def _check_lengths(question: Question, tokens: Mapping[str, Tokens]) -> None:
    longest = max(tokens.values(), key=len)
    if len(longest) > MOST_TOKENS:
        problem = f"a prompt has {len(longest):,} tokens, expected at most {MOST_TOKENS:,}"
        raise PlanError(problem, where=question.label, hint="shorten it, or take cheap_embed")
