"""The two maps of a plan: output layers to their sources, output tensors to their rules."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from merge_kit.methods.base import MergeMethod, PerModel
from merge_kit.methods.registry import find, parameters
from merge_kit.plan.describe import is_generated
from merge_kit.plan.describe_scales import Scales, layer_scales, scale_note
from merge_kit.plan.layer_origins import LayerOrigin, StageLayers
from merge_kit.plan.sources import (
    Chosen,
    Columns,
    Concat,
    Found,
    Generated,
    LowRank,
    Merged,
    Normed,
    Permuted,
    Projected,
    Rows,
    Scaled,
    Source,
    Stored,
    Sum,
    Transposed,
    View,
)
from merge_kit.plan.values import Plan, Step

_IN_PLACE = "each layer from the layers of the same number"


def layer_lines(plan: Plan) -> list[str]:
    """Return one line for each longest run of layers that come from consecutive layers.

    Stages that feed the output come first, each line with the name of its stage in front.
    """
    labels, scales = _labels(plan), layer_scales(plan.layer_map, plan.steps)
    fed = [line for stage in plan.stage_layers for line in _stage_lines(stage, labels)]
    lines = _map_lines(plan.layer_map, labels, scales)
    if not lines and not any(stage.origins for stage in plan.stage_layers):
        return ["no layer is moved: each comes from the layers of the same number"]
    return [*fed, *(lines or [f"output: {plan.method}, {_IN_PLACE}"])]


def _stage_lines(stage: StageLayers, labels: Mapping[str, str]) -> list[str]:
    """Return the lines of a stage that feeds others."""
    given = zip(stage.origins, stage.scales, strict=True)
    scales = {_place(one): dict(factors) for one, factors in given if factors}
    lines = _map_lines(stage.origins, labels, scales)
    models = ", ".join(labels.get(key, key) for key in stage.models)
    return [
        f"{stage.stage}: {line}" for line in lines or [f"{stage.method} of {models}, {_IN_PLACE}"]
    ]


def _map_lines(
    origins: Sequence[LayerOrigin],
    labels: Mapping[str, str],
    scales: Mapping[tuple[str, int], Scales],
) -> list[str]:
    runs = _runs(origins, scales)
    return [_layer_line(run, labels, [scales.get(_place(one), {}) for one in run]) for run in runs]


def _labels(plan: Plan) -> dict[str, str]:
    """Return `input-1:name` for each input's key; stages have no other name than their key."""
    return {model.key: f"{model.key}:{model.name}" for model in plan.inputs}


def _place(origin: LayerOrigin) -> tuple[str, int]:
    return origin.stack, origin.layer


def _runs(
    origins: Sequence[LayerOrigin], scales: Mapping[tuple[str, int], Scales]
) -> Iterator[list[LayerOrigin]]:
    run: list[LayerOrigin] = []
    for origin in origins:
        same = run and list(scales.get(_place(run[-1]), ())) == list(scales.get(_place(origin), ()))
        if run and not (same and _follows(run[-1], origin)):
            yield run
            run = []
        run.append(origin)
    if run:
        yield run


def _follows(before: LayerOrigin, after: LayerOrigin) -> bool:
    expected = tuple((model, layer + 1) for model, layer in before.sources)
    next_to_it = (after.stack, after.layer, after.sources) == (
        before.stack,
        before.layer + 1,
        expected,
    )
    alike = (after.method, after.labels) == (before.method, before.labels)
    return next_to_it and alike


def _layer_line(
    run: Sequence[LayerOrigin], labels: Mapping[str, str], scales: Sequence[Scales]
) -> str:
    first, last = run[0], run[-1]
    pairs = zip(first.sources, last.sources, strict=True)
    named = first.labels or [labels.get(key, key) for key, _ in first.sources]
    spans = [_span(start, stop) for (_, start), (_, stop) in pairs]
    sources = [f"{name} {span}" for name, span in zip(named, spans, strict=True)]
    by = f"{first.method} of " if first.method else ""
    span = f"{first.stack} {_span(first.layer, last.layer)}"
    return f"{span} from {by}{', '.join(sources)}{scale_note(scales)}"


def _span(first: int, last: int) -> str:
    return str(first) if first == last else f"{first}-{last}"


def rule_lines(plan: Plan) -> list[str]:
    """Return one line for each output tensor: its name, what is done, and from what."""
    files, labels = file_keys(plan), _labels(plan)
    own = plan.method if find(plan.method).makes == "structure" else ""
    return [
        f"{target.key}: {_made(step, own, labels) or _rule(step, i, files, labels)}"
        for step in plan.steps
        for i, target in enumerate(step.outputs)
    ]


def _made(step: Step, own: str, labels: Mapping[str, str]) -> str:
    """Return what a built tensor is: generated numbers, or another shape of one of a model.

    Args:
        own: The output's method if it builds, else "".
    """
    note = f" ({step.note})" if step.note else ""
    if is_generated(step):
        kinds = dict.fromkeys(map(_generated, step.inputs))
        return f"generated: {', '.join(kinds)}{note}"
    if not own or step.method is None or step.method.method_name != "passthrough":
        return ""
    if arguments(step.method)["scale"] not in ((), (None,)):
        return ""
    models = ", ".join(labels.get(model, model) for model in step.models)
    return f"{own} of {models}{_changes(step.inputs[0])}{note}"


def _changes(source: Source) -> str:
    """Return what is added to a tensor of one model, and by what it is multiplied."""
    if not isinstance(source, Sum):
        return ""
    (factor, first), *more = source.terms
    noise = "".join(f" plus {_generated(term)}" for _, term in more if isinstance(term, Generated))
    return f"{_changes(first)}{noise}" + (f", times {factor:g}" if factor != 1 else "")


def _generated(source: Source) -> str:
    """Return what numbers are that no file holds."""
    match source:
        case Found(key=key):
            return f"found before the run, {key}"
        case Generated(kind="zeros"):
            return "zeros"
        case Generated(kind="constant", scale=scale):
            return f"{scale:g} everywhere"
        case Generated(kind=kind, scale=scale):
            return f"{kind} numbers times {scale:g}"
    return "found before the run"


def _weights(step: Step, output: int) -> tuple[float, ...]:
    """Return the weights that count for one output: of several adapters each has its own."""
    count = len(step.models)
    if step.shape is None or len(step.weights) == count:
        return step.weights
    start = output // 2 * count  # outputs are pairs, a and b
    return step.weights[start : start + count]


def _rule(step: Step, output: int, files: Mapping[Path, str], labels: Mapping[str, str]) -> str:
    note = f" ({step.note})" if step.note else ""
    operands = [labels.get(model, model) for model in step.models]
    if step.method is None:
        return f"copy {', '.join(operands)}{note}"
    if step.weights and "weight" in arguments(step.method):
        pairs = zip(operands, _weights(step, output), strict=True)
        operands = [f"{model} * {weight:g}" for model, weight in pairs]
    if step.base is not None:
        base = origin(step.base, files)
        operands.insert(0, f"base {labels.get(base, base)}")
    return f"{_call(step.method)} of {', '.join(operands)}{note}"


def _call(method: MergeMethod) -> str:
    shown = [
        f"{name}={_value(value)}"
        for name, value in arguments(method).items()
        if name != "weight" and value not in ((), (None,))
    ]
    if method.method_name == "passthrough" and not shown:
        return "passthrough"
    return f"{method.method_name}({', '.join(shown)})"


def arguments(method: MergeMethod) -> dict[str, object]:
    """Return a method's evaluated parameters by the recipe's keys."""
    return {p.name: getattr(method, p.field) for p in parameters(type(method))}


def _value(value: object) -> str:
    """Return a parameter's value; values of models that are all equal are shown once."""
    if isinstance(value, PerModel):
        texts = [_value(item) for item in value]
        return texts[0] if len(set(texts)) == 1 else "/".join(texts)
    if isinstance(value, bool) or value is None:
        return {True: "true", False: "false", None: "none"}[value]
    return f"{value:g}" if isinstance(value, float) else str(value)


def file_keys(plan: Plan) -> dict[Path, str]:
    """Return `input-1/model.safetensors` for the path of each file that is read."""
    return {file.path: f"{model.key}/{file.name}" for model in plan.read for file in model.files}


def origin(source: Source, files: Mapping[Path, str]) -> str:
    """Return which model a source takes its numbers from, the first one if there are several."""
    match source:
        case Stored(span=span):
            return files.get(span.path, span.path.name).split("/", 1)[0]
        case LowRank(weight=weight, a=a):
            return origin(a if weight is None else weight, files)
        case Concat(sources=sources) | Columns(sources=sources) | Chosen(sources=sources):
            return origin(sources[0], files)
        case Sum(terms=terms):
            return origin(terms[0][1], files)
        case Rows() | View() | Permuted() | Projected() | Scaled() | Transposed() | Normed():
            return origin(source.source, files)
        case Merged():
            return "an earlier stage"
        case _:
            return "generated numbers"
