"""Measure the demo models, or what was merged from them, on held-out text.

    python scripts/evaluate_demo.py recipes/demo/base merged/quickstart
    python scripts/evaluate_demo.py --summary merged/quickstart

Prints, for each checkpoint and skill, the mean loss in nats per token of the answer, and the share
of answers that are right to the last character. Adapter folders are added to their base.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import torch
from demo_llama import DemoError, Llama, Score, answer, load, score
from demo_text import SKILLS, held_out_text

DEMO = Path(__file__).resolve().parent.parent / "recipes" / "demo"
COUNT = 200

Scores = dict[str, Score]
"""The scores of one checkpoint by skill."""


def measure(model: Llama, count: int = COUNT) -> Scores:
    """Return the scores on so many held-out examples of each skill."""
    return {skill: score(model, held_out_text(skill, count)) for skill in SKILLS}


def gap_closed(base: Scores, experts: Sequence[Scores], merged: Scores) -> dict[str, float]:
    """Return the share of the gap between base and best expert that a merge closes, by skill.

    0 is as bad as the base, 1 as good as the expert.

    Raises:
        DemoError: If no expert is better than the base at a skill.
    """
    closed = {}
    for skill in SKILLS:
        gap = base[skill].loss - min(expert[skill].loss for expert in experts)
        if gap <= 0:
            raise DemoError(f"no expert is better than the base at {skill!r}: there is no gap")
        closed[skill] = (base[skill].loss - merged[skill].loss) / gap
    return closed


def table(names: Sequence[str], rows: Sequence[Scores]) -> str:
    """Return loss and share of right answers, one line a checkpoint, one column a skill."""
    width = max(map(len, [*names, "gap closed"]))
    lines = [" " * width + "".join(f"{skill:>16}" for skill in SKILLS)]
    for name, scores in zip(names, rows, strict=True):
        cells = "".join(f"{s.loss:11.3f}{s.right:5.0%}" for s in scores.values())
        lines.append(f"{name:{width}}{cells}")
    return "\n".join(lines)


def _summary_models(models: Sequence[Path]) -> list[Path]:
    """Return base, experts and merged model; the first ones are the demo's if not given."""
    if len(models) == 1:
        return [DEMO / "base", *(DEMO / skill for skill in SKILLS), *models]
    if len(models) < 3:
        raise DemoError("--summary takes MERGED, or BASE EXPERT... MERGED")
    return list(models)


def _summary(names: Sequence[str], models: Sequence[Llama], rows: Sequence[Scores]) -> str:
    closed = gap_closed(rows[0], rows[1:-1], rows[-1])
    width = max(map(len, [*names, "gap closed"]))
    lines = [f"{'gap closed':{width}}" + "".join(f"{share:16.0%}" for share in closed.values())]
    lines += ["", f"{'prompt':28}{names[0]:20}{names[-1]}"]
    for skill in SKILLS:
        prompt = held_out_text(skill, 1)[0].prompt
        lines.append(f"{prompt:28}{answer(models[0], prompt):20}{answer(models[-1], prompt)}")
    return "\n".join(lines)


def _as_json(names: Sequence[str], rows: Sequence[Scores], *, summary: bool) -> str:
    models = [
        {"model": name, "skills": {skill: asdict(s) for skill, s in scores.items()}}
        for name, scores in zip(names, rows, strict=True)
    ]
    content: dict[str, object] = {"models": models}
    if summary:
        content["gap_closed"] = gap_closed(rows[0], rows[1:-1], rows[-1])
    return json.dumps(content, indent=2)


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("models", nargs="+", type=Path, metavar="MODEL", help="checkpoint folder")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.add_argument(
        "--summary",
        action="store_true",
        help="MODELs are BASE EXPERT... MERGED, or MERGED alone: what share of each skill's gap "
        "between base and expert the merge closes, and a few answers",
    )
    return parser.parse_args(argv)


def report(folders: Sequence[Path], *, summary: bool, as_json: bool) -> str:
    """Return the table, with the summary or as JSON if asked.

    Raises:
        DemoError: If a checkpoint is broken.
    """
    folders = _summary_models(folders) if summary else folders
    models = [load(folder) for folder in folders]
    rows, names = [measure(model) for model in models], [folder.name for folder in folders]
    if as_json:
        return _as_json(names, rows, summary=summary)
    text = "held-out loss in nats per token, and right answers\n" + table(names, rows)
    return f"{text}\n{_summary(names, models, rows)}" if summary else text


def main(argv: Sequence[str] | None = None) -> int:
    """Print the measures; return the exit code, 3 if a checkpoint is broken."""
    arguments = _arguments(argv)
    torch.set_num_threads(1)  # small matrices: on a busy machine, threads wait for one another
    try:
        print(report(arguments.models, summary=arguments.summary, as_json=arguments.json))
    except DemoError as exc:
        print(exc, file=sys.stderr)
        return 3
    return 0


if __name__ == "__main__":
    sys.exit(main())
