"""The page and the plots of what `quality.py` measured."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

KEEP = (5, 10, 20, 50, 100)
DROP = (50, 90, 99)


def _cells(*cells: object) -> str:
    return "| " + " | ".join(map(str, cells)) + " |"


def _setting(setting: Mapping[str, Any]) -> str:
    shown = (
        f"{name.rstrip('_')} {value:g}" if isinstance(value, float) else f"{name} {value}"
        for name, value in setting.items()
        if (name, value) != ("weight", 1.0) and name != "statistics"
    )
    return ", ".join(shown) or "defaults"


def _table(head: Sequence[object], rows: Sequence[Sequence[object]]) -> str:
    return "\n".join([_cells(*head), _cells(*("---" for _ in head)), *(_cells(*r) for r in rows)])


def _means(results: Mapping[str, Any]) -> list[tuple[str, float | None, float | None]]:
    """Return (method, mean share kept with two experts, with three), the best of three first."""
    found: dict[str, dict[int, list[float]]] = {}
    for row in [*results["ensemble"], *results["rows"]]:
        found.setdefault(row.method, {}).setdefault(len(row.experts), []).append(row.mean)
    means = [
        (name, *(sum(shares[n]) / len(shares[n]) if n in shares else None for n in (2, 3)))
        for name, shares in found.items()
    ]
    return sorted(means, key=lambda row: -(row[2] if row[2] is not None else -9))


def _percent(share: float | None) -> str:
    return "" if share is None else f"{share:.1%}"


def _ranking(results: Mapping[str, Any]) -> str:
    rows = [(name, _percent(two), _percent(three)) for name, two, three in _means(results)]
    return _table(("method", "two experts (mean of three pairs)", "three experts"), rows)


def _by_skill(results: Mapping[str, Any]) -> str:
    skills = list(results["base"])
    blank = ("",)
    rows: list[Sequence[object]] = [
        ("base", "", *(f"{results['base'][s]:.3f}" for s in skills), "0.0%", *blank),
        ("expert", "its own", *(f"{results['experts'][s]:.3f}" for s in skills), "100.0%", *blank),
    ]
    ordered = sorted(
        [*results["ensemble"], *results["rows"]], key=lambda r: (len(r.experts), r.experts, -r.mean)
    )
    for row in ordered:
        losses = (f"{row.losses[s]:.3f}" if s in row.losses else "" for s in skills)
        setting = "" if row.method == "ensemble" else _setting(row.setting)
        rows.append((row.method, " + ".join(row.experts), *losses, _percent(row.mean), setting))
    return _table(("method", "experts", *skills, "kept", "setting"), rows)


def _curves(curves: Mapping[str, Sequence[float]], marks: Sequence[int], what: str) -> str:
    rows = [(skill, *(_percent(share) for share in shares)) for skill, shares in curves.items()]
    return _table((what, *(f"{mark} %" for mark in marks)), rows)


def page(results: Mapping[str, Any]) -> str:
    """Return docs/quality.md."""
    return f"""# What merges keep

Written by `python benchmarks/quality.py --write` from the demo models: a base and three experts,
Llamas of 0.7 million parameters, each really tuned on one skill. The measure is the share of an
expert's gain over the base that is left in the merge, in held-out loss (nats per token of the
answer): 100 % is as good as the expert, 0 % as the base, below that worse than the base. Settings
were chosen on other held-out prompts than those reported here. Merges are stored in bfloat16.
[choosing.md](choosing.md) says what to make of it. One family of very small models: other models
may rank methods otherwise.

## Every method at its best

The ensemble averages the experts' predictions, at two and three times the cost of a merge.

![Share of the experts' gain that each method keeps](quality/methods.svg)

{_ranking(results)}

## Keeping the largest changes

One expert, its task vector pruned to the elements of the largest magnitude in each tensor (the
figure that TIES starts from): share of its gain that is left.

![Share of the gain left by share of elements kept](quality/keep.svg)

{_curves(results["keep"], KEEP, "elements kept")}

## Dropping changes at random

One expert, elements of its task vector dropped at random, mean of five seeds (the figure that DARE
starts from). Rescaled: the others are divided by the share that is kept.

![Share of the gain left by share of elements dropped](quality/drop.svg)

{_curves(results["drop"]["rescaled"], DROP, "dropped, rescaled")}

{_curves(results["drop"]["as is"], DROP, "dropped, as is")}

## Loss by skill

{_by_skill(results)}
"""


def plots(results: Mapping[str, Any], folder: Path) -> None:
    """Write the plots as SVG."""
    import matplotlib as mpl  # noqa: PLC0415  (an extra)

    mpl.use("svg")
    mpl.rcParams["svg.hashsalt"] = "merge_kit"  # the same file each time
    folder.mkdir(exist_ok=True)
    _bars(results, folder / "methods.svg")
    curves = {f"{skill}": shares for skill, shares in results["keep"].items()}
    _lines({"": curves}, KEEP, "elements kept, %", folder / "keep.svg")
    _lines(results["drop"], DROP, "elements dropped, %", folder / "drop.svg")


def _save(figure: Any, path: Path) -> None:
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})


def _bars(results: Mapping[str, Any], path: Path) -> None:
    from matplotlib.figure import Figure  # noqa: PLC0415

    rows = _means(results)[::-1]
    figure = Figure(figsize=(8, 0.32 * len(rows) + 1))
    axes = figure.subplots()
    for offset, column, label in ((0.2, 1, "two experts"), (-0.2, 2, "three experts")):
        places = [i + offset for i, row in enumerate(rows) if row[column] is not None]
        shares = [100 * max(row[column], -0.2) for row in rows if row[column] is not None]
        axes.barh(places, shares, height=0.38, label=label)
    axes.set_yticks(range(len(rows)), [row[0] for row in rows])
    axes.set_xlabel("share of the experts' gain that is kept, %")
    axes.axvline(0, color="black", linewidth=0.5)
    axes.legend(loc="lower right")
    _save(figure, path)


def _lines(
    groups: Mapping[str, Mapping[str, Sequence[float]]],
    marks: Sequence[int],
    label: str,
    path: Path,
) -> None:
    from matplotlib.figure import Figure  # noqa: PLC0415

    figure = Figure(figsize=(6, 3.6))
    axes = figure.subplots()
    for style, (group, curves) in zip(("-", "--"), groups.items(), strict=False):
        for color, (skill, shares) in zip(("C0", "C1", "C2"), curves.items(), strict=False):
            name = f"{skill}, {group}" if group else skill
            values = [100 * max(share, -1.0) for share in shares]
            axes.plot(range(len(marks)), values, style, color=color, marker="o", label=name)
    axes.set_xticks(range(len(marks)), [str(mark) for mark in marks])
    axes.set_xlabel(label)
    axes.set_ylabel("share of the gain left, %")
    axes.axhline(0, color="black", linewidth=0.5)
    axes.legend(fontsize="small")
    _save(figure, path)
