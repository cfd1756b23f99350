"""How the demo models learn: text without labels for the base, answers for the experts."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import islice

import torch
from demo_llama import IGNORED, Batch, Tokens, encode
from demo_text import SKILLS, Example, general_text, training_text
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_
from torch.optim.lr_scheduler import LambdaLR


@dataclass(frozen=True, slots=True)
class Schedule:
    """Steps, the highest learning rate, and the steps in which it rises."""

    steps: int
    rate: float
    rising: int = 20

    def factor(self, step: int) -> float:
        """Return the share of the highest rate: up, then down to a twentieth, linearly."""
        return min(1.0, (step + 1) / self.rising) * max(0.05, 1 - step / self.steps)


BASE_LINES: Mapping[str, int] = {"add": 10, "sort": 2, "translate": 1}
"""Lines of each skill in a batch of the base: enough to begin to learn it."""

GENERAL_LINES = 51
EXPERT_LINES = 48
KEPT_LINES = 12


def train_base(model: nn.Module, tokens: Tokens, schedule: Schedule, seed: int) -> None:
    """Train on whole lines: much general text, little of each skill."""
    skills = {skill: training_text(skill, seed) for skill in BASE_LINES}
    general = general_text(seed)
    parameters, optimizer, scheduler = optimizer_of(model, schedule)
    for _ in range(schedule.steps):
        lines = [line for skill, n in BASE_LINES.items() for line in islice(skills[skill], n)]
        ids = encode([*lines, *islice(general, GENERAL_LINES)], tokens).ids
        step(_loss(model, Batch(ids, _whole(ids, tokens))), parameters, optimizer, scheduler)


def tune(
    model: nn.Module, base: nn.Module, skill: str, tokens: Tokens, schedule: Schedule, seed: int
) -> None:
    """Train on the answers of one skill, and hold on to what the base says about all else.

    Without the second half, an expert forgets the other skills, and a sum of task vectors forgets
    all of them: the divergence from the base keeps the vectors out of each other's way.
    """
    own, others = training_text(skill, seed), _other_text(skill, seed + 1)
    parameters, optimizer, scheduler = optimizer_of(model, schedule)
    for _ in range(schedule.steps):
        learned = _loss(model, encode(list(islice(own, EXPERT_LINES)), tokens))
        kept = encode(list(islice(others, len(SKILLS) * KEPT_LINES)), tokens).ids
        drift = _divergence(model, base, kept, tokens)
        step(learned + drift, parameters, optimizer, scheduler)


def _other_text(skill: str, seed: int) -> Iterator[Example]:
    """Yield lines of the other skills and general text in turn."""
    skills = [training_text(other, seed) for other in SKILLS if other != skill]
    for lines in zip(*skills, general_text(seed), strict=True):
        yield from lines


def optimizer_of(
    model: nn.Module, schedule: Schedule
) -> tuple[list[nn.Parameter], torch.optim.Optimizer, LambdaLR]:
    """Return what is trained of a model, and what `step` needs."""
    parameters = [each for each in model.parameters() if each.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=schedule.rate, betas=(0.9, 0.98), weight_decay=0)
    return parameters, optimizer, LambdaLR(optimizer, schedule.factor)


def step(
    loss: Tensor,
    parameters: list[nn.Parameter],
    optimizer: torch.optim.Optimizer,
    scheduler: LambdaLR,
) -> None:
    """Go one step down the loss."""
    optimizer.zero_grad()
    loss.backward()  # type: ignore[no-untyped-call]
    clip_grad_norm_(parameters, 1.0)
    optimizer.step()
    scheduler.step()


def _whole(ids: Tensor, tokens: Tokens) -> Tensor:
    return ids.masked_fill(ids == tokens.pad, IGNORED)


def _loss(model: nn.Module, batch: Batch) -> Tensor:
    loss: Tensor = model(input_ids=batch.ids, labels=batch.labels).loss
    return loss


def _divergence(model: nn.Module, base: nn.Module, ids: Tensor, tokens: Tokens) -> Tensor:
    """Return the mean Kullback-Leibler divergence of the model from the base, in nats a token."""
    with torch.no_grad():
        expected = base(input_ids=ids).logits.log_softmax(-1)
    found = model(input_ids=ids).logits.log_softmax(-1)
    each: Tensor = (expected.exp() * (expected - found)).sum(-1)
    return each[ids != tokens.pad].mean()
