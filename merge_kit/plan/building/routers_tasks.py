"""What is found of prompts before a run: the tasks, as the planner hands them to the engine."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from merge_kit.plan.sources import Source

MOST_PROMPTS = 4096
"""Of all experts together."""

MOST_BYTES = 8192
"""Of one prompt, as UTF-8."""

MOST_TOKENS = 2048
"""Of one prompt that runs through the model: its attention grows with the square."""

EXPERTS, SHARED = "experts", "shared"
"""Names of the found tensors; where layers differ, their number follows."""


_BEFORE = 8
"""Tokens that a prompt may have beside those of its bytes."""


def most_tokens(text: str) -> int:
    """Return how many tokens a prompt may have: hardly one is less than a byte."""
    return len(text.encode(errors="replace")) + _BEFORE


def found_name(name: str, layer: int | None) -> str:
    """Return the name of a found tensor: of one layer, or of all."""
    return name if layer is None else f"{name}.{layer}"


@dataclass(frozen=True, slots=True)
class PromptSet:
    """What one row of a router is found of.

    Attributes:
        expert: How messages call whom they are for ("expert 2 (models/math)").
        positive: Texts that are to go there.
        negative: Texts that are not to go there.
    """

    expert: str
    positive: tuple[str, ...]
    negative: tuple[str, ...] = ()

    @property
    def texts(self) -> tuple[str, ...]:
        """All texts, the positive ones first."""
        return self.positive + self.negative


@dataclass(frozen=True, slots=True)
class Question:
    """The prompts, and what makes them vectors.

    Attributes:
        experts: One an expert, in their order.
        shared: Of the shared expert, or None.
        folder: Where the tokenizer's files lie.
        label: How messages call the model.
        embedding: Of tokens, (vocabulary, hidden).
    """

    experts: tuple[PromptSet, ...]
    shared: PromptSet | None
    folder: Path
    label: str
    embedding: Source

    @property
    def sets(self) -> tuple[PromptSet, ...]:
        """All sets, the shared expert's last."""
        return self.experts if self.shared is None else (*self.experts, self.shared)


@dataclass(frozen=True, slots=True, eq=False)
class EmbeddedRouters:
    """Rows of the sum of the embeddings of the prompts' tokens, the same in every layer."""

    question: Question


@dataclass(frozen=True, slots=True, eq=False)
class HiddenRouters:
    """Rows of what enters each layer's MLP when the prompts run through the model.

    Attributes:
        config_text: The model's config.json.
        weights: The layers from the first to the last that gets experts: their tensors by the
            name within the layer.
        layers: Those that get experts.
        averaged: Whether all tokens of a prompt count, not only the last.
    """

    question: Question
    config_text: str
    weights: tuple[Mapping[str, Source], ...]
    layers: tuple[int, ...]
    averaged: bool
