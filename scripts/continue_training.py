#!/usr/bin/env python3
"""Train models of another structure further, and the same shapes from nothing, for as long.

    python scripts/continue_training.py [--steps 300] [--seeds 3] [--device cpu] [--write]

Stacks, upscales and upcycles the demo models by the recipes of `recipes/`, trains each on the text
of the demo models, and prints the loss on held-out text before and after, beside a model of the
same shape that begins with random weights and is trained on the same lines. With --write the
tables go into docs/after_stacking.md.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from demo_llama import IGNORED, Batch, Tokens, encode
from demo_text import SKILLS, Example, general_text, held_out_text, training_text
from demo_training import Schedule, optimizer_of, step
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.utils import logging

ROOT = Path(__file__).resolve().parent.parent
RECIPES = ROOT / "recipes"
DOCUMENT = ROOT / "docs" / "after_stacking.md"
START, END = "<!-- losses -->", "<!-- end of losses -->"

HELD_OUT = 200
"""Lines of each skill that a model is scored on; none of them is trained on."""

SKILL_LINES, GENERAL_LINES = 16, 16
"""Lines of each skill, and of general text, in a batch."""

CONTINUED, FRESH = (3e-4, 1e-3, 3e-3), (1e-3, 3e-3, 1e-2)
"""Learning rates that are tried, for models that know something and for those that know nothing;
of each the best one counts, chosen by the loss on the first seed."""


@dataclass(frozen=True, slots=True)
class Case:
    """A model to train: what it is called, and the recipe or the folder that it comes from."""

    name: str
    recipe: str = ""
    folder: str = ""


CASES = (
    Case("base, as it is (4 layers)", folder="demo/base"),
    Case("expert add, as it is (4 layers)", folder="demo/add"),
    Case("expert sort, as it is (4 layers)", folder="demo/sort"),
    Case("stacked: 3 layers of add, 3 of sort", recipe="stack.yaml"),
    Case("upscaled: add, overlap_mode: drop (6 layers)", recipe="depth_upscale.yaml"),
    Case("upscaled: add and sort, overlap_mode: sum (6 layers)", recipe="sum_seam.yaml"),
    Case("upscaled: add, block_expansion (6 layers)", recipe="block_expansion.yaml"),
    Case("upcycled: add, sort, translate as 3 experts", recipe="upcycle.yaml"),
    Case("upcycled: 4 copies of sort", recipe="upcycle_copies.yaml"),
)


@dataclass(frozen=True, slots=True)
class Result:
    """Losses on held-out answers, in nats a token, one a seed.

    Attributes:
        parameters: Of the model.
        before: Loss before the first step.
        after: Loss of the model that was built, trained further.
        fresh: Loss of one of the same shape, trained from random weights.
        rates: The learning rates of both.
    """

    name: str
    parameters: int
    before: float
    after: tuple[float, ...]
    fresh: tuple[float, ...]
    rates: tuple[float, float]


class Trainer:
    """Trains models on the demo text.

    Args:
        tokens: The vocabulary.
        steps: Of each training.
        device: Where.
    """

    def __init__(self, tokens: Tokens, steps: int, device: str) -> None:
        self._tokens, self._steps, self._device = tokens, steps, torch.device(device)

    def loss(self, model: nn.Module) -> float:
        """Return the mean loss over the skills, of held-out answers."""
        model.to(self._device).eval()
        with torch.inference_mode():
            losses = [
                float(self._of(model, held_out_text(skill, HELD_OUT), whole=False))
                for skill in SKILLS
            ]
        model.train()
        return statistics.fmean(losses)

    def train(self, model: nn.Module, rate: float, seed: int) -> float:
        """Train a model, and return its loss."""
        model.to(self._device).train()
        parameters, optimizer, scheduler = optimizer_of(model, Schedule(self._steps, rate))
        lines = _lines(seed)
        for _ in range(self._steps):
            loss = self._of(model, next(lines), whole=True)
            step(loss, parameters, optimizer, scheduler)
        return self.loss(model)

    def _of(self, model: nn.Module, examples: Sequence[Example], *, whole: bool) -> Tensor:
        """Return the loss on answers alone, or on whole lines."""
        batch = encode(examples, self._tokens)
        ids = batch.ids.to(self._device)
        labels = ids.masked_fill(ids == self._tokens.pad, IGNORED) if whole else batch.labels
        found = Batch(ids, labels.to(self._device))
        loss: Tensor = model(input_ids=found.ids, labels=found.labels).loss
        return loss


def _lines(seed: int) -> Iterator[list[Example]]:
    """Yield batches: as many lines of each skill, and general text."""
    skills, general = [training_text(s, seed) for s in SKILLS], general_text(seed)
    while True:
        own = [line for text in skills for line in islice(text, SKILL_LINES)]
        yield [*own, *islice(general, GENERAL_LINES)]


def measure(case: Case, folder: Path, trainer: Trainer, seeds: int) -> Result:
    """Return the losses of one model, and of its shape from random weights."""
    built = _load(folder)
    before = trainer.loss(built)
    after = _best(lambda: _load(folder), CONTINUED, trainer, seeds)
    fresh = _best(lambda: _fresh(folder), FRESH, trainer, seeds)
    size = sum(p.numel() for p in built.parameters())
    return Result(case.name, size, before, after[1], fresh[1], (after[0], fresh[0]))


def _best(
    make: Any, rates: Sequence[float], trainer: Trainer, seeds: int
) -> tuple[float, tuple[float, ...]]:
    """Return the best learning rate on the first seed, and the losses with it on all."""
    first = {}
    for rate in rates:
        torch.manual_seed(0)
        first[rate] = trainer.train(make(), rate, seed=100)
    rate = min(first, key=lambda one: first[one])
    losses = [first[rate]]
    for seed in range(1, seeds):
        torch.manual_seed(seed)
        losses.append(trainer.train(make(), rate, seed=100 + seed))
    return rate, tuple(losses)


def _load(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def _fresh(folder: Path) -> Any:
    """Return a model of the shape of a checkpoint, with random weights."""
    return AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder), dtype=torch.float32)


def tokens_of(folder: Path) -> Tokens:
    """Return the vocabulary of a checkpoint."""
    content = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    return Tokens(content["model"]["vocab"])


def table(results: Sequence[Result]) -> str:
    """Return the losses as a table in Markdown."""
    lines = [
        "| model | parameters | before | trained further | same shape from nothing | better |",
        "|---|---|---|---|---|---|",
    ]
    for one in results:
        after, fresh = statistics.fmean(one.after), statistics.fmean(one.fresh)
        better = "trained further" if after < fresh else "from nothing"
        clear = max(one.after) < min(one.fresh) or max(one.fresh) < min(one.after)
        lines.append(
            f"| {one.name} | {one.parameters / 1e6:.2f} M | {one.before:.3f} | {_spread(one.after)}"
            f" | {_spread(one.fresh)} | {better}{'' if clear else ', not on every seed'} |"
        )
    return "\n".join(lines)


def _spread(losses: Sequence[float]) -> str:
    return f"{statistics.fmean(losses):.3f} ({min(losses):.3f} to {max(losses):.3f})"


def write(text: str) -> None:
    """Put the table into the document.

    Raises:
        SystemExit: If the document has lost the marks between which it belongs.
    """
    old = DOCUMENT.read_text(encoding="utf-8")
    new, count = re.subn(
        f"{START}.*?{END}", lambda _: f"{START}\n{text}\n{END}", old, flags=re.DOTALL
    )
    if count != 1:
        sys.exit(f"{DOCUMENT} has no {START} ... {END}")
    DOCUMENT.write_text(new, encoding="utf-8")


def built(case: Case, folder: Path) -> Path:
    """Return the folder of a case's model, built by its recipe if that is not done."""
    if case.folder:
        return RECIPES / case.folder
    output = folder / Path(case.recipe).stem
    if not output.exists():
        from merge_kit import api  # noqa: PLC0415  (not needed where the models are there)

        api.merge(RECIPES / case.recipe, output)
    return output


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=300, help="of each training")
    parser.add_argument("--seeds", type=int, default=3, help="trainings of each model")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--only", action="append", default=[], help="part of a model's name")
    parser.add_argument("--folder", type=Path, help="where built models are kept, and looked for")
    parser.add_argument("--build", action="store_true", help="build the models, and stop")
    parser.add_argument("--json", type=Path, help="write the losses to this file")
    parser.add_argument("--write", action="store_true", help="write the table into the document")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Train everything and print the losses."""
    options, results = _arguments(argv), []
    logging.disable_progress_bar()
    trainer = Trainer(tokens_of(RECIPES / "demo" / "base"), options.steps, options.device)
    chosen = [c for c in CASES if not options.only or any(part in c.name for part in options.only)]
    with TemporaryDirectory(prefix="merge_kit-") as spare:
        for case in chosen:
            started, model = time.monotonic(), built(case, options.folder or Path(spare))
            if options.build:
                continue
            results.append(measure(case, model, trainer, options.seeds))
            print(f"{time.monotonic() - started:5.0f} s  {_line(results[-1])}", flush=True)
    if options.build:
        return 0
    if options.json is not None:
        rows: list[Mapping[str, Any]] = [asdict(one) for one in results]
        options.json.write_text(json.dumps(rows, indent=2), encoding="utf-8")
    print("\n" + table(results))
    if options.write:
        write(table(results))
    return 0


def _line(one: Result) -> str:
    after, fresh = statistics.fmean(one.after), statistics.fmean(one.fresh)
    rates = " and ".join(f"{rate:g}" for rate in one.rates)
    return f"{one.name}: {one.before:.3f} -> {after:.3f}, from nothing {fresh:.3f}, rates {rates}"


if __name__ == "__main__":
    sys.exit(main())
