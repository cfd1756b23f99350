"""`mergekit inspect` of adapters: what one of them holds, and how close several are."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from merge_kit.api.closeness import AdapterComparison, Pair, Row
from merge_kit.cli.adapter_facts import AdapterFacts, facts_of_adapter
from merge_kit.cli.text import columns, print_json, table
from merge_kit.core.sizes import format_count, format_size
from merge_kit.io.adapter import open_adapter
from merge_kit.io.adapter_values import Adapter, Update
from merge_kit.plan.describe import Row as Line
from merge_kit.plan.describe import first_of, labelled, plural

SHOWN = 8
_HEAD = ("", "norm", "other", "cosine", "interference", "outputs", "inputs")
_LEGEND = (
    "interference: how much longer (+) or shorter (-) the sum is than at right angles",
    "outputs, inputs: share of the smaller change's space that is in the other's (and by chance)",
)


def show_adapters(paths: Sequence[Path], *, tensors: bool, as_json: bool) -> None:
    """Print what one adapter holds, or how close several are; with `tensors` by module."""
    adapters = [open_adapter(path) for path in paths]
    if len(adapters) == 1:
        _show_one(facts_of_adapter(adapters[0]), tensors=tensors, as_json=as_json)
        return
    from merge_kit.api.comparing_adapters import compared  # noqa: PLC0415  (one needs no weights)

    found = compared(adapters)
    if as_json:
        print_json(_comparison_json(found, adapters, tensors=tensors))
    else:
        print("\n".join(_comparison_lines(found, adapters, tensors=tensors)))


def _show_one(facts: AdapterFacts, *, tensors: bool, as_json: bool) -> None:
    if as_json:
        print_json(facts.as_json(tensors=tensors))
        return
    print(table(list(_lines(facts))))
    if tensors:
        if facts.updates:
            print("\n" + columns([_update_cells(update) for update in facts.updates]))
        specs = [
            (n, s.dtype, f"[{', '.join(map(str, s.shape))}]") for n, s in facts.tensors.items()
        ]
        print("\n" + columns(specs))


def _lines(facts: AdapterFacts) -> Iterator[Line]:
    kind = "a file" if facts.is_file else "a folder"
    yield Line("adapter", f"{facts.name}, {kind}, {facts.style.replace('_', ' ')} style")
    yield Line("base", facts.base or "not named")
    yield Line("modules", f"{len(facts.updates):,}: {_counted(facts.kinds)}")
    yield Line("targets", _counted(facts.targets))
    yield Line("ranks", _numbers(facts.ranks))
    yield Line("alphas", _numbers(facts.alphas))
    stabilised = ", by rsLoRA" if facts.rank_stabilised else ""
    yield Line("scales", _numbers(facts.scales) + stabilised)
    for key, pattern in facts.patterns.items():
        yield Line(key, first_of([f"{k}: {v}" for k, v in pattern.items()], SHOWN))
    if facts.magnitudes:
        yield Line("DoRA", f"magnitudes of {plural(facts.magnitudes, 'module')}")
    if facts.biases:
        yield Line("biases", f"of {plural(facts.biases, 'module')}")
    saved = [f"{name} ({why})" for name, why in facts.saved.items()]
    if saved:
        yield Line("held whole", f"{plural(len(saved), 'tensor')}: {first_of(saved, SHOWN)}")
    for module, rows in facts.tokens.items():
        yield Line("tokens", f"{plural(rows, 'row')} of {module}")
    size = f"{format_count(facts.parameters)} parameters, {format_size(facts.nbytes)}"
    yield Line("tensors", f"{len(facts.tensors):,}, {size}")
    yield Line("dtypes", _counted(facts.dtypes))
    yield Line("weights", f"{plural(len(facts.files), 'file')}: {first_of(facts.files)}")
    names = facts.side_files
    yield Line("side files", f"{len(names)}: {first_of(names, SHOWN)}" if names else "none")
    yield from labelled("no effect", [f"{name}: {why}" for name, why in facts.dropped.items()])
    yield from labelled("not copied", [f"{name}: {why}" for name, why in facts.left_out.items()])
    yield from labelled("warnings", facts.warnings)


def _counted(counts: Mapping[str, int]) -> str:
    return first_of([f"{name} {count:,}" for name, count in counts.items()], SHOWN) or "none"


def _numbers(counts: Mapping[float, int]) -> str:
    """Return the one number, or each with how many modules have it."""
    if len(counts) == 1:
        return f"{next(iter(counts)):g}"
    texts = [f"{n:g} in {plural(count, 'module')}" for n, count in counts.items()]
    return first_of(texts, SHOWN) or "none"


def _update_cells(update: Update) -> tuple[str, ...]:
    more: list[str] = [update.kind] if update.kind != "linear" else []
    more += [f"{update.experts} experts"] if update.experts else []
    more += ["DoRA"] if update.magnitude is not None else []
    more += ["bias"] if update.bias is not None else []
    numbers = f"rank {update.rank}", f"alpha {update.alpha:g}", f"scale {update.scale:g}"
    return (update.module, *numbers, ", ".join(more))


def _comparison_lines(
    found: AdapterComparison, adapters: Sequence[Adapter], *, tensors: bool
) -> Iterator[str]:
    yield table([*labelled("adapters", list(_introduced(found, adapters)))])
    for pair in found.total.pairs:
        yield ""
        yield from _pair_lines(found, pair, tensors=tensors)
    yield ""
    yield table([*labelled("legend", _LEGEND), *labelled("notes", found.notes)])


def _introduced(found: AdapterComparison, adapters: Sequence[Adapter]) -> Iterator[str]:
    for name, base, norm, adapter in zip(
        found.names, found.bases, found.total.norms, adapters, strict=True
    ):
        of = f"base {base}" if base else "no base named"
        yield f"{name}: {of}, {plural(len(adapter.updates), 'module')}, norm {norm:.4g}"


def _pair_lines(found: AdapterComparison, pair: Pair, *, tensors: bool) -> Iterator[str]:
    one, other = (found.names[i] for i in pair.adapters)
    signs = f"{pair.reinforcing:,} reinforce, {pair.cancelling:,} cancel each other"
    yield f"{one} and {other}: {plural(pair.shared, 'shared module')}, {signs}"
    rows: list[tuple[str, ...]] = [_HEAD]
    if tensors:
        at = found.total.pairs.index(pair)
        outside = {row.name for row in found.modules}
        layers = [row for row in found.layers if row.name not in outside]
        rows += [_cells(row.name, row.pairs[at]) for row in (*layers, *found.modules)]
    rows.append(_cells("all", pair))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for first, *rest in rows:
        cells = [text.rjust(width) for text, width in zip(rest, widths[1:], strict=True)]
        yield "  ".join(["", first.ljust(widths[0]), *cells]).rstrip()


def _cells(name: str, pair: Pair) -> tuple[str, ...]:
    own, other = (f"{norm:.4g}" for norm in pair.norms)
    return (
        name,
        own,
        other,
        "-" if pair.cosine is None else f"{pair.cosine:.4f}",
        "-" if pair.interference is None else f"{pair.interference:+.4f}",
        _overlap(pair.output_overlap, pair.output_overlap_by_chance),
        _overlap(pair.input_overlap, pair.input_overlap_by_chance),
    )


def _overlap(found: float | None, chance: float | None) -> str:
    return "-" if found is None or chance is None else f"{found:.3f} ({chance:.3f})"


def _comparison_json(
    found: AdapterComparison, adapters: Sequence[Adapter], *, tensors: bool
) -> dict[str, Any]:
    """Return a comparison as values that `json.dumps` takes."""
    rows = zip(found.names, found.bases, found.total.norms, adapters, strict=True)
    whole: dict[str, Any] = {
        "adapters": [
            {"name": name, "base": base, "modules": len(adapter.updates), "norm": norm}
            for name, base, norm, adapter in rows
        ],
        "pairs": [_pair_json(found.names, pair) for pair in found.total.pairs],
        "notes": list(found.notes),
    }
    by_name = {"layers": found.layers, "modules": found.modules} if tensors else {}
    return whole | {
        key: [_row_json(found.names, row) for row in rows] for key, rows in by_name.items()
    }


def _row_json(names: Sequence[str], row: Row) -> dict[str, Any]:
    pairs = [_pair_json(names, pair) for pair in row.pairs]
    return {"name": row.name, "norms": list(row.norms), "pairs": pairs}


def _pair_json(names: Sequence[str], pair: Pair) -> dict[str, Any]:
    return {
        "first": names[pair.adapters[0]],
        "second": names[pair.adapters[1]],
        "norms": list(pair.norms),
        "dot": pair.dot,
        "cosine": pair.cosine,
        "interference": pair.interference,
        "shared": pair.shared,
        "reinforcing": pair.reinforcing,
        "cancelling": pair.cancelling,
        "output_overlap": pair.output_overlap,
        "input_overlap": pair.input_overlap,
        "output_overlap_by_chance": pair.output_overlap_by_chance,
        "input_overlap_by_chance": pair.input_overlap_by_chance,
    }
