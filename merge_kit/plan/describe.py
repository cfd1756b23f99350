"""A plan in words: rows of a label and a text, for a terminal or a log."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from merge_kit.core.sizes import format_count, format_size
from merge_kit.plan.describe_adapters import adapter_lines
from merge_kit.plan.values import Artefact, Bill, Plan, PlanInput, SideFile

FLOPS = 20e9
"""Operations a second of one thread, as a guess."""

SHOWN = 3
"""Names that are listed before `and 12 more`."""


@dataclass(frozen=True, slots=True)
class Row:
    """One row of a table: a label (empty if it is the one above) and a text of any length."""

    label: str
    text: str


def plural(count: int, noun: str) -> str:
    """Return `1 shard`, `2 shards`."""
    return f"{count:,} {noun}" if count == 1 else f"{count:,} {noun}s"


def first_of(names: Sequence[str], shown: int = SHOWN) -> str:
    """Return the first names, and how many more there are."""
    listed = ", ".join(names[:shown])
    more = len(names) - shown
    return f"{listed} and {more:,} more" if more > 0 else listed


def merged_by_method(plan: Plan) -> dict[str, int]:
    """Return how many output tensors each method merges, by the method's name, sorted."""
    counts = Counter[str]()
    for step in plan.steps:
        if step.method is not None:
            laid = plan.ranks and step.method.method_name == "passthrough"  # by what lays factors
            counts[plan.method if laid else step.method.method_name] += len(step.outputs)
    return dict(sorted(counts.items()))


def counts_line(plan: Plan) -> str:
    """Return the run's accounting in one line: `merged 146, copied 2, dropped 0 tensors`."""
    merged, copied, dropped = plan.counts()
    return f"merged {merged:,}, copied {copied:,}, dropped {dropped:,} tensors"


def summary(plan: Plan, free_bytes: int | None) -> list[Row]:
    """Return what a run of this plan does and takes.

    Args:
        plan: The plan.
        free_bytes: Free space where the output goes, or None if that is not known.
    """
    tensors = Counter(fate.model for fate in plan.fates)
    return [
        Row("method", f"{plan.method}, seed {plan.seed}"),
        *labelled("inputs", [_input(model, tensors[model.key]) for model in plan.inputs]),
        *labelled("statistics", [_statistics(one) for one in plan.statistics]),
        Row("tensors", counts_line(plan)),
        *labelled("merged", [f"{count:,} by {m}" for m, count in merged_by_method(plan).items()]),
        *labelled("dropped", _dropped(plan)),
        *([Row("model", _model(plan))] if not plan.ranks else labelled("adapter", _adapters(plan))),
        *labelled("found first", _artefacts(plan.artefacts)),
        Row("dtypes", ", ".join(f"{name} {count:,}" for name, count in plan.dtypes) or "none"),
        *labelled("side files", _side_files(plan.side_files)),
        *_costs(plan, free_bytes),
        *labelled("notes", plan.notes),
    ]


def labelled(label: str, texts: Iterable[str]) -> list[Row]:
    """Return a row for each text, the label on the first of them."""
    return [Row("" if i else label, text) for i, text in enumerate(texts)]


def _input(model: PlanInput, tensors: int) -> str:
    role = ", base" if model.is_base else ""
    revision = f" at {model.revision}" if model.revision else ""
    stored = format_size(sum(file.nbytes for file in model.files))
    return f"{model.key}{role}: {model.text}{revision} ({plural(tensors, 'tensor')}, {stored})"


def _statistics(one: PlanInput) -> str:
    return f"{one.key}: {one.text} ({format_size(sum(file.nbytes for file in one.files))})"


def _artefacts(found: Sequence[Artefact]) -> list[str]:
    """Return a text for each artefact, and one for a row of those that differ in a number only."""
    rows: dict[tuple[type, str], list[Artefact]] = {}
    for one in found:
        stem, _, number = one.key.rpartition("-")
        rows.setdefault((type(one.task), stem if number.isdigit() else one.key), []).append(one)
    texts = []
    for row in rows.values():
        kept, read = sum(a.kept_bytes for a in row), sum(a.read_bytes for a in row)
        keys = row[0].key if len(row) == 1 else f"{row[0].key} to {row[-1].key}"
        texts.append(f"{keys} ({format_size(kept)} of {format_size(read)} read)")
    return texts


def _dropped(plan: Plan) -> list[str]:
    """Return a text for each reason why tensors are dropped, in the order of the plan."""
    reasons: dict[str, list[str]] = {}
    for fate in plan.fates:
        if fate.what == "dropped":
            reasons.setdefault(fate.why, []).append(f"{fate.tensor} of {fate.model}")
    return [f"{len(names):,}, {why}: {first_of(names)}" for why, names in reasons.items()]


def _model(plan: Plan) -> str:
    known = [plan.architecture] if plan.architecture else []
    if plan.layers is not None:
        known.append(plural(plan.layers, "layer"))
    return ", ".join([*known, f"{format_count(plan.parameters)} parameters"])


def _adapters(plan: Plan) -> list[str]:
    """Return the ranks of each adapter that is made, and the size of all."""
    return [*adapter_lines(plan), f"{format_count(plan.parameters)} parameters"]


def _side_files(files: Sequence[SideFile]) -> list[str]:
    copied = [file.name for file in files if file.source is not None]
    written = [file.name for file in files if file.source is None]
    kinds = (("copied", copied), ("written", written))
    return [f"{len(names):,} {what}: {first_of(names)}" for what, names in kinds if names]


def _solves(bill: Bill) -> str:
    """Return how long decompositions and solves take on a usual processor."""
    seconds = bill.flops / (FLOPS * bill.solvers)
    shown = f"{seconds:.0f} s" if seconds < 100 else f"{seconds / 60:.0f} min"
    at_once = plural(bill.solvers, "thread")
    rate = f"{bill.flops / 1e12:.3g} TFLOP in {plural(bill.solves, 'tensor')}"
    return f"{rate}, about {shown} with {at_once} of {FLOPS / 1e9:.0f} GFLOP/s"


def _costs(plan: Plan, free_bytes: int | None) -> list[Row]:
    bill = plan.bill
    needed = bill.written_bytes + bill.scratch_bytes
    rows = [
        Row("read", format_size(bill.read_bytes)),
        Row("write", f"{format_size(bill.written_bytes)} in {plural(len(plan.shards), 'shard')}"),
    ]
    if bill.flops:
        rows.append(Row("solves", _solves(bill)))
    if bill.scratch_bytes:
        rows.append(Row("scratch", format_size(bill.scratch_bytes)))
    if free_bytes is not None:
        short = "" if free_bytes >= needed else f", {format_size(needed - free_bytes)} too little"
        rows.append(Row("free disk", format_size(free_bytes) + short))
    threads = plural(bill.workers, "thread")
    return [*rows, Row("peak memory", f"{format_size(bill.peak_bytes)} with {threads}")]
