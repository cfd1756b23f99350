"""A plan in words: rows of a label and a text, for a terminal or a log."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from merge_kit.core.sizes import format_count, format_size
from merge_kit.methods.base import MergeMethod
from merge_kit.methods.registry import find
from merge_kit.plan.describe_adapters import adapter_lines
from merge_kit.plan.sources import Found, Generated, Merged, Source
from merge_kit.plan.values import Artefact, Bill, Plan, PlanInput, SideFile, Step
from merge_kit.plan.walk import operands, parts

FLOPS = 20e9
"""Operations a second of one thread, as a guess."""

_FOUND = {
    "EmbeddedRouters": "routers of prompts",
    "HiddenRouters": "routers of prompts",
    "EmbeddingBasis": "a basis of the embeddings",
    "GivenBasis": "the inverse of a basis",
}
"""What is found before a run, by the kind of its task."""

SHOWN = 3
"""Names that are listed before `and 12 more`."""


_LAYER = re.compile(r"\blayer (\d+)")


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


def is_generated(step: Step) -> bool:
    """Return whether a step takes nothing that is stored: zeros, noise, what was found before."""
    return step.action == "merge" and all(map(_is_generated, operands(step)))


def _is_generated(source: Source) -> bool:
    below = parts(source)
    return all(map(_is_generated, below)) if below else isinstance(source, Generated | Found)


def generated_count(plan: Plan) -> int:
    """Return how many output tensors are generated."""
    return sum(len(step.outputs) for step in plan.steps if is_generated(step))


def merged_by_method(plan: Plan) -> dict[str, int]:
    """Return how many output tensors each method merges, by the method's name, sorted.

    What takes one tensor as it is counts for what made it: an earlier stage's method, or the
    output's own where that lays out or changes tensors.
    """
    own = plan.method if plan.ranks or find(plan.method).makes == "structure" else ""
    counts = Counter[str]()
    for step in plan.steps:
        if step.method is not None and not is_generated(step):
            counts[_maker(step.method, step.inputs, own)] += len(step.outputs)
    return dict(sorted(counts.items()))


def _maker(method: MergeMethod, inputs: Sequence[Source], own: str) -> str:
    if method.method_name != "passthrough":
        return method.method_name
    first = inputs[0] if inputs else None
    if isinstance(first, Merged) and first.step.method is not None:
        return _maker(first.step.method, first.step.inputs, own)
    return own or method.method_name


def counts_line(plan: Plan) -> str:
    """Return the run's accounting in one line: `merged 146, copied 2, dropped 0 tensors`."""
    merged, copied, dropped = plan.counts()
    made = generated_count(plan)
    named = f"merged {merged - made:,}, " + (f"generated {made:,}, " if made else "")
    return f"{named}copied {copied:,}, dropped {dropped:,} tensors"


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
        read = format_size(sum(a.read_bytes for a in row))
        keys = row[0].key if len(row) == 1 else f"{row[0].key} to {row[-1].key}"
        texts.append(f"{keys} ({_found(row)}, which reads {read})")
    return texts


def _found(row: Sequence[Artefact]) -> str:
    kind = type(row[0].task).__name__  # the classes would load the planner, which `--help` does not
    layers = plural(len(row), "layer")
    return f"the order of experts in {layers}" if kind == "ExpertMatching" else _FOUND[kind]


def dropped_by_reason(plan: Plan) -> dict[str, list[str]]:
    """Return which tensors are dropped, by the reason, in the order of the plan.

    Reasons that differ in the number of a layer only are one.
    """
    reasons: dict[str, list[str]] = {}
    layers: dict[str, dict[str, None]] = {}
    for fate in plan.fates:
        if fate.what == "dropped":
            alike = _LAYER.sub("\0", fate.why, count=1)
            reasons.setdefault(alike, []).append(f"{fate.tensor} of {fate.model}")
            number = _LAYER.search(fate.why)
            layers.setdefault(alike, {})[number[1] if number is not None else ""] = None
    return {why.replace("\0", _layers(list(layers[why]))): n for why, n in reasons.items()}


def _layers(numbers: Sequence[str]) -> str:
    return f"layer {numbers[0]}" if len(numbers) == 1 else f"each of layers {first_of(numbers)}"


def _dropped(plan: Plan) -> list[str]:
    """Return a text for each reason why tensors are dropped, in the order of the plan."""
    rows = dropped_by_reason(plan).items()
    return [f"{len(names):,}, {why}: {first_of(names)}" for why, names in rows]


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
    shown = f"about {seconds:.0f} s" if seconds < 100 else f"about {seconds / 60:.0f} min"
    shown = shown if seconds >= 1 else "less than 1 s"
    at_once = plural(bill.solvers, "thread")
    rate = f"{_operations(bill.flops)} in {plural(bill.solves, 'tensor')}"
    return f"{rate}, {shown} with {at_once} of {FLOPS / 1e9:.0f} GFLOP/s"


def _operations(flops: float) -> str:
    """Return `12 GFLOP`, in the largest unit of which there is one."""
    for unit, size in (("TFLOP", 1e12), ("GFLOP", 1e9)):
        if flops >= size:
            return f"{flops / size:.3g} {unit}"
    return f"{flops / 1e6:.3g} MFLOP"


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
