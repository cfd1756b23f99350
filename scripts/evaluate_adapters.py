"""Measure what becomes of the demo adapters, and of experts turned into adapters.

    python scripts/evaluate_adapters.py            # prints the tables of docs/adapters.md
    python scripts/evaluate_adapters.py --write    # writes them there

Runs the recipes for adapters, merges what they make into the demo base, and measures it as
evaluate_demo.py does: the mean loss in nats per token of the answer on held-out prompts.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "scripts")]

import torch  # noqa: E402
from demo_llama import load, score  # noqa: E402
from demo_text import SKILLS, held_out_text  # noqa: E402

import merge_kit as mk  # noqa: E402

RECIPES = ROOT / "recipes"
DEMO = RECIPES / "demo"
PAGE = ROOT / "docs" / "adapters.md"
COUNT = 200
RANKS = (4, 16, 64)
ADAPTERS = {"adapter-sort": 0.7, "adapter-translate": 1.0}
"""The demo's adapters and the weights of the recipes."""

Losses = Mapping[str, float]
"""Mean loss by skill."""


@dataclass(frozen=True, slots=True)
class Bench:
    """Where things are made, and how many examples of each skill they are measured on."""

    folder: Path
    count: int = COUNT

    def losses(self, model: Path) -> Losses:
        """Return the losses of a model's folder."""
        loaded = load(model)
        return {skill: score(loaded, held_out_text(skill, self.count)).loss for skill in SKILLS}

    def run(self, recipe: str) -> Path:
        """Run a recipe of the repository and return its output."""
        return mk.merge(RECIPES / f"{recipe}.yaml", self.folder / recipe, overwrite=True).output

    def combined(self, method: str, *weights: float, **parameters: object) -> Path:
        """Combine the demo's adapters, with the weights of the recipes unless others are given."""
        chosen = dict(zip(ADAPTERS, weights, strict=True)) if weights else ADAPTERS
        models = [
            {"model": str(DEMO / adapter), "parameters": {"weight": weight}}
            for adapter, weight in chosen.items()
        ]
        recipe = {"merge_method": method, "models": models, "parameters": parameters}
        name = "-".join(map(str, [method, *weights, *parameters.values()]))
        return mk.merge(recipe, self.folder / name, overwrite=True).output

    def extracted(self, expert: str, **parameters: object) -> Path:
        """Turn an expert of the demo into an adapter."""
        recipe = {
            "merge_method": "lora_extract",
            "base_model": str(DEMO / "base"),
            "models": [{"model": str(DEMO / expert)}],
            "parameters": {"rest": "save", **parameters},
        }
        out = self.folder / "-".join(map(str, [expert, *parameters.values()]))
        return mk.merge(recipe, out, overwrite=True).output

    def applied(self, adapter: Path) -> Losses:
        """Return the losses of the demo's base with an adapter merged into it."""
        models = [{"model": {"model": str(DEMO / "base"), "lora": str(adapter)}}]
        recipe = {"merge_method": "passthrough", "models": models}
        with tempfile.TemporaryDirectory(dir=self.folder) as folder:
            whole = mk.merge(recipe, Path(folder) / "whole").output
            return self.losses(whole)


def kilobytes(folder: Path) -> str:
    """Return the size of a folder's weights."""
    total = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    return f"{total / 1000:.0f} kB"


def ranks(adapter: Path) -> str:
    """Return the smallest and the largest rank of an adapter's modules, and their number."""
    found = json.loads((adapter / "merge_kit.json").read_text(encoding="utf-8"))["ranks"].values()
    least, most = min(found), max(found)
    return str(most) if least == most else f"{least} to {most}"


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a table in Markdown."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def cells(losses: Losses) -> list[str]:
    """Return the losses as they are printed."""
    return [f"{losses[skill]:.3f}" for skill in SKILLS]


def combinations(bench: Bench) -> str:
    """Return the table of the demo's two adapters, alone and together."""
    rows = [["base alone", "", "", *cells(bench.losses(DEMO / "base"))]]
    rows += [
        [
            f"`{name}`",
            str(json.loads((DEMO / name / "adapter_config.json").read_text())["r"]),
            kilobytes(DEMO / name),
            *cells(bench.applied(DEMO / name)),
        ]
        for name in ADAPTERS
    ]
    merged = bench.run("merge_adapter")
    rows.append(
        [
            "both merged into the base (`merge_adapter.yaml`)",
            "",
            kilobytes(merged),
            *cells(bench.losses(merged)),
        ]
    )
    made = {
        "`lora_concat` (`concat_adapters.yaml`)": bench.run("concat_adapters"),
        "`lora_concat`, both with weight 1": bench.combined("lora_concat", 1.0, 1.0),
        "`lora_linear`": bench.combined("lora_linear"),
        "`lora_svd`, `energy: 0.9`": bench.combined("lora_svd", energy=0.9),
        "`lora_svd`, `rank: 4`": bench.combined("lora_svd", rank=4),
        "`lora_ties`, `density: 0.8`, `rank: 16` (`ties_adapters.yaml`)": bench.run(
            "ties_adapters"
        ),
        "`lora_ties`, `density: 0.5`, `rank: 16`": bench.combined(
            "lora_ties", density=0.5, rank=16, normalize=False
        ),
        "`lora_dare`, `density: 0.8`, `rank: 16`": bench.combined(
            "lora_dare", density=0.8, rank=16
        ),
        "`lora_knots`, `density: 0.8`": bench.combined("lora_knots", density=0.8, normalize=False),
    }
    rows += [
        [name, ranks(out), kilobytes(out), *cells(bench.applied(out))] for name, out in made.items()
    ]
    return table(["what", "rank", "size", *SKILLS], rows)


def uses(bench: Bench) -> str:
    """Return the table of the adapters that one run makes for several uses."""
    out = bench.run("serve_adapters")
    folders = sorted(path.parent for path in out.glob("*/adapter_config.json"))
    rows = [
        [f"`{folder.name}`", kilobytes(folder), *cells(bench.applied(folder))] for folder in folders
    ]
    return table(["use", "size", *SKILLS], rows)


def experts(bench: Bench) -> str:
    """Return the table of three experts as adapters, which all change the same modules."""
    made = {skill: bench.extracted(skill, rank=16, rest="drop") for skill in SKILLS}
    rows = [
        [f"{skill} alone", ranks(out), *cells(bench.applied(out))] for skill, out in made.items()
    ]
    voted = {"density": 0.8, "normalize": False, "rank": 48}
    settings: list[tuple[str, str, float, dict[str, object]]] = [
        ("`lora_concat`, weight 0.9", "lora_concat", 0.9, {}),
        ("`lora_svd`, weight 0.9, `rank: 32`", "lora_svd", 0.9, {"rank": 32}),
        ("`lora_svd`, weight 0.9, `rank: 16`", "lora_svd", 0.9, {"rank": 16}),
        ("`lora_dare`, weight 0.9, `density: 0.8`", "lora_dare", 0.9, {"density": 0.8, "rank": 48}),
        ("`lora_ties`, weight 0.8, `density: 0.8`", "lora_ties", 0.8, voted),
        ("`lora_knots`, weight 0.8, `density: 0.8`", "lora_knots", 0.8, voted),
    ]
    for name, method, weight, parameters in settings:
        models = [{"model": str(out), "parameters": {"weight": weight}} for out in made.values()]
        recipe = {"merge_method": method, "models": models, "parameters": parameters}
        out = mk.merge(recipe, bench.folder / f"experts-{len(rows)}").output
        rows.append([name, ranks(out), *cells(bench.applied(out))])
    return table(["what", "rank", *SKILLS], rows)


def missed(adapter: Path) -> str:
    """Return the share of the change that an adapter misses, over all of its modules."""
    found = json.loads((adapter / "merge_kit.json").read_text(encoding="utf-8"))["residuals"]
    whole = sum(one["norm"] ** 2 for one in found.values())
    left = sum((one["relative"] * one["norm"]) ** 2 for one in found.values())
    return f"{(left / whole) ** 0.5:.1%}"


def extractions(bench: Bench) -> str:
    """Return the table of experts turned into adapters of several ranks."""
    rows = []
    base = bench.losses(DEMO / "base")
    for expert in SKILLS:
        own = bench.losses(DEMO / expert)[expert]
        rows.append(
            [expert, "the expert itself", "", kilobytes(DEMO / expert), f"{own:.3f}", "100%"]
        )
        for rank in RANKS:
            out = bench.extracted(expert, rank=rank)
            loss = bench.applied(out)[expert]
            kept = (base[expert] - loss) / (base[expert] - own)
            rows.append(
                [expert, f"rank {rank}", missed(out), kilobytes(out), f"{loss:.3f}", f"{kept:.0%}"]
            )
    return table(["expert", "adapter", "missed", "size", "loss", "of its gain"], rows)


TABLES = {
    "combinations": combinations,
    "experts": experts,
    "uses": uses,
    "extractions": extractions,
}


def placed(page: str, tables: Mapping[str, str]) -> str:
    """Return the page with its tables replaced."""
    for name, text in tables.items():
        pattern = rf"(<!-- {name} -->\n).*?(<!-- end -->)"
        page, count = re.subn(
            pattern, lambda m, t=text: f"{m[1]}{t}\n{m[2]}", page, flags=re.DOTALL
        )
        if count != 1:
            raise SystemExit(f"{PAGE} has no place for the table {name!r}")
    return page


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, and print or write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--write", action="store_true", help=f"write them to {PAGE.name}")
    parser.add_argument("--count", type=int, default=COUNT, help="examples of each skill")
    arguments = parser.parse_args(argv)
    torch.set_num_threads(1)  # small matrices: on a busy machine, threads wait for one another
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(Path(folder), arguments.count)
        tables = {name: make(bench) for name, make in TABLES.items()}
    if arguments.write:
        PAGE.write_text(placed(PAGE.read_text(encoding="utf-8"), tables), encoding="utf-8")
    else:
        print("\n\n".join(tables.values()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
