#!/usr/bin/env python3
"""Measure what merges of the demo models know: pruning curves, and every method at its best.

    python benchmarks/quality.py                # prints the tables
    python benchmarks/quality.py --write        # writes docs/quality.md and its plots (matplotlib)
    python benchmarks/quality.py --only ties,linear --quick

Three experts were tuned from one base, each on one skill. The measure is the share of an expert's
gain that a merge keeps: (base loss - merge's loss) / (base loss - expert's loss), in nats per token
of the answer, on held-out prompts. Settings are chosen on other held-out prompts than those that
are reported.
"""

from __future__ import annotations

import argparse
import itertools
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
sys.path[:0] = [str(ROOT), str(ROOT / "scripts")]

import torch  # noqa: E402
from demo_llama import IGNORED, Llama, encode, forward, load, score  # noqa: E402
from demo_text import SKILLS, Example, held_out_text  # noqa: E402
from quality_grid import GRID, Setting  # noqa: E402
from torch.nn.functional import nll_loss  # noqa: E402

import merge_kit as mk  # noqa: E402

DEMO = ROOT / "recipes" / "demo"
KEEP = (0.05, 0.1, 0.2, 0.5, 1.0)
DROP = (0.5, 0.9, 0.99)
SEEDS = 5
TEST, CHOICE = 200, 100
"""Examples of a skill that are reported, and those that settings are chosen on."""

Losses = dict[str, float]


@dataclass(frozen=True, slots=True)
class Text:
    """Held-out examples by skill: to choose settings on, and to report."""

    choice: Mapping[str, list[Example]]
    test: Mapping[str, list[Example]]


@dataclass(frozen=True, slots=True)
class Bench:
    """The demo models, their losses, and the text."""

    models: Mapping[str, Llama]
    text: Text
    statistics: Path | None

    def losses(self, model: Llama, skills: Sequence[str], *, test: bool = True) -> Losses:
        """Return the loss on each of these skills."""
        examples = self.text.test if test else self.text.choice
        return {skill: score(model, examples[skill]).loss for skill in skills}

    def kept(self, losses: Losses, *, test: bool = True) -> Losses:
        """Return the share of each expert's gain that these losses keep."""
        shares = {}
        for skill, loss in losses.items():
            base, expert = _ends(self, skill, test)
            shares[skill] = (base - loss) / (base - expert)
        return shares


_ENDS: dict[tuple[str, bool], tuple[float, float]] = {}


def _ends(bench: Bench, skill: str, test: bool) -> tuple[float, float]:
    """Return the losses of base and expert on a skill, measured once."""
    if (skill, test) not in _ENDS:
        pair = (bench.models["base"], bench.models[skill])
        base, expert = (bench.losses(model, [skill], test=test)[skill] for model in pair)
        _ENDS[skill, test] = base, expert
    return _ENDS[skill, test]


def text() -> Text:
    """Return the held-out examples; no prompt is in both parts."""
    test = {skill: held_out_text(skill, TEST) for skill in SKILLS}
    choice = {}
    for skill, reported in test.items():
        known = {example.prompt for example in reported}
        more = (example for example in held_out_text(skill, TEST, seed=1))
        choice[skill] = [example for example in more if example.prompt not in known][:CHOICE]
    return Text(choice, test)


def merged(bench: Bench, method: str, experts: Sequence[str], setting: Setting) -> Llama:
    """Return a merge of experts as it would be stored, in bf16."""
    parameters = dict(setting)
    if "statistics" in parameters:
        kind = parameters["statistics"]
        assert bench.statistics is not None
        parameters["statistics"] = [
            str(bench.statistics / f"{kind}-{e}.safetensors") for e in experts
        ]
    grid, models = GRID[method], [str(DEMO / expert) for expert in experts]
    base = None if grid.without_base else str(DEMO / "base")
    if grid.one_on_another:
        base, *models = models
    lazy = getattr(mk, method)(models, base=base, **parameters)
    weights = {n: t.float() for n, t in lazy.state_dict(dtype="bfloat16").items()}
    like = bench.models["base"]
    return Llama(like.config, weights, like.tokens)


def ensemble(bench: Bench, experts: Sequence[str]) -> Losses:
    """Return the losses of the experts' averaged predictions."""
    losses = {}
    for skill in experts:
        batch = encode(bench.text.test[skill], bench.models[skill].tokens)
        labels = batch.labels[:, 1:].flatten()
        shares = [forward(bench.models[e], batch.ids)[:, :-1].softmax(-1) for e in experts]
        mean = torch.stack(shares).mean(0).log().flatten(0, 1)
        losses[skill] = float(nll_loss(mean, labels, ignore_index=IGNORED))
    return losses


@dataclass(frozen=True, slots=True)
class Row:
    """A method at its best with some experts."""

    method: str
    experts: tuple[str, ...]
    setting: Setting
    losses: Losses
    kept: Losses

    @property
    def mean(self) -> float:
        """The mean share of the experts' gains that is kept."""
        return sum(self.kept.values()) / len(self.kept)


def best(bench: Bench, method: str, experts: tuple[str, ...]) -> Row | None:
    """Return a method with the setting that keeps most on the examples to choose on."""
    found: tuple[float, Setting] | None = None
    for setting in settings(method, len(experts)):
        if "statistics" in setting and bench.statistics is None:
            continue
        model = merged(bench, method, experts, setting)
        shares = bench.kept(bench.losses(model, experts, test=False), test=False)
        mean = sum(shares.values()) / len(shares)
        if found is None or mean > found[0]:
            found = mean, setting
    if found is None:
        return None
    losses = bench.losses(merged(bench, method, experts, found[1]), experts)
    return Row(method, experts, found[1], losses, bench.kept(losses))


def settings(method: str, experts: int) -> Iterator[Setting]:
    """Yield the settings of a method that are tried."""
    grid = GRID[method]
    if experts != 2 and grid.only_two:
        return
    for values in itertools.product(*grid.values.values()):
        yield dict(zip(grid.values, values, strict=True))


def keep_curves(bench: Bench) -> dict[str, list[float]]:
    """Return the share of its gain that each expert keeps with its largest changes only."""
    return {
        skill: [
            bench.kept(
                bench.losses(
                    merged(bench, "magnitude", [skill], {"weight": 1.0, "density": d}), [skill]
                )
            )[skill]
            for d in KEEP
        ]
        for skill in SKILLS
    }


def drop_curves(bench: Bench, *, rescale: bool) -> dict[str, list[float]]:
    """Return the share of its gain that each expert keeps after random dropping, over seeds."""
    curves: dict[str, list[float]] = {}
    for skill in SKILLS:
        curves[skill] = []
        for share in DROP:
            parameters = {"weight": 1.0, "density": 1 - share, "rescale": rescale}
            runs = [
                merged(bench, "dare_linear", [skill], {**parameters, "seed": seed})
                for seed in range(SEEDS)
            ]
            kept = [bench.kept(bench.losses(model, [skill]))[skill] for model in runs]
            curves[skill].append(sum(kept) / len(kept))
    return curves


def collect(folder: Path) -> Path | None:
    """Collect the statistics that fisher and regmean need; None without transformers."""
    try:
        import transformers  # noqa: F401, PLC0415  (only the scripts need it)
    except ImportError:
        return None
    for skill in SKILLS:
        lines = _training_lines(skill)
        source = folder / f"{skill}.txt"
        source.write_text("\n".join(lines), encoding="utf-8")
        for kind in ("fisher", "gram"):
            script, out = ROOT / "scripts" / "collect_statistics.py", folder / f"{kind}-{skill}"
            command = [sys.executable, script, kind, DEMO / skill, source]
            command += ["-o", out.with_suffix(".safetensors"), "--lines"]
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return folder


def _training_lines(skill: str, count: int = 200) -> list[str]:
    from demo_text import training_text  # noqa: PLC0415

    examples = itertools.islice(training_text(skill, seed=7), count)
    return [example.prompt + example.answer for example in examples]


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print, and write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--write", action="store_true", help="write docs/quality.md and its plots")
    parser.add_argument("--only", default="", help="methods to measure, with commas between")
    parser.add_argument("--raw", type=Path, help="also write the figures as JSON to this file")
    arguments = parser.parse_args(argv)
    torch.set_num_threads(1)
    chosen = [name for name in arguments.only.split(",") if name] or list(GRID)
    models = {name: load(DEMO / name) for name in ("base", *SKILLS)}
    with tempfile.TemporaryDirectory() as scratch:
        needs = any(name in ("fisher", "regmean") for name in chosen)
        bench = Bench(models, text(), collect(Path(scratch)) if needs else None)
        results = measure(bench, chosen)
    if arguments.raw:
        arguments.raw.write_text(json.dumps(results, indent=1, default=asdict), encoding="utf-8")
    from quality_page import page, plots  # noqa: PLC0415  (matplotlib)

    print(page(results))
    if arguments.write:
        (ROOT / "docs" / "quality.md").write_text(page(results), encoding="utf-8")
        plots(results, ROOT / "docs" / "quality")
    return 0


def measure(bench: Bench, methods: Sequence[str]) -> dict[str, Any]:
    """Return every figure of the page."""
    combinations = [*itertools.combinations(SKILLS, 2), tuple(SKILLS)]
    rows = []
    for method in methods:
        for experts in combinations:
            row = best(bench, method, experts)
            if row is not None:
                rows.append(row)
                print(
                    f"{method:18}{'+'.join(experts):22}{row.mean:7.1%}  {row.setting}",
                    file=sys.stderr,
                )
    together = []
    for experts in combinations:
        losses = ensemble(bench, experts)
        together.append(Row("ensemble", experts, {}, losses, bench.kept(losses)))
    base = bench.losses(bench.models["base"], list(SKILLS))
    own = {skill: bench.losses(bench.models[skill], [skill])[skill] for skill in SKILLS}
    return {
        "rows": rows,
        "ensemble": together,
        "base": base,
        "experts": own,
        "keep": keep_curves(bench),
        "drop": {on: drop_curves(bench, rescale=on == "rescaled") for on in ("rescaled", "as is")},
    }


if __name__ == "__main__":
    sys.exit(main())
