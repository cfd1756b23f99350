"""`mergekit inspect`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from merge_kit.cli.inspecting_adapters import show_adapters
from merge_kit.cli.model_facts import Difference, Facts, difference, facts_of
from merge_kit.cli.text import columns, print_json, table
from merge_kit.core.sizes import format_count, format_size
from merge_kit.core.tensors import TensorSpec
from merge_kit.errors import UsageError
from merge_kit.io.adapter import is_adapter
from merge_kit.io.checkpoint import open_checkpoint
from merge_kit.plan.describe import Row, first_of, labelled, plural


def show(models: Sequence[Path], *, tensors: bool, as_json: bool) -> None:
    """Print what one model or adapter holds, or how several compare.

    Raises:
        UsageError: If models stand beside adapters, or there are three or more models.
    """
    adapters = [model for model in models if is_adapter(model)]
    if len(adapters) == len(models):
        show_adapters(models, tensors=tensors, as_json=as_json)
    elif adapters:
        other = next(model for model in models if model not in adapters)
        problem = f"{adapters[0]} is an adapter, {other} is a model"
        raise UsageError(problem, hint="compare adapters with adapters, models with models")
    elif len(models) == 1:
        show_model(models[0], tensors=tensors, as_json=as_json)
    elif len(models) == 2:
        show_difference(*models, as_json=as_json)
    else:
        problem = f"found {len(models)} models, expected one or two"
        raise UsageError(problem, hint="three or more can be compared if they are adapters")


def show_model(model: Path, *, tensors: bool, as_json: bool) -> None:
    """Print what a checkpoint holds; with `tensors` also every tensor."""
    facts = facts_of(open_checkpoint(model))
    if as_json:
        print_json(facts.as_json(tensors=tensors))
        return
    print(table(list(_rows(facts))))
    if tensors:
        print("\n" + columns([_line(name, spec) for name, spec in facts.tensors.items()]))


def show_difference(model: Path, other: Path, *, as_json: bool) -> None:
    """Print the tensors that are not in both checkpoints with one dtype and shape."""
    found = difference(
        facts_of(open_checkpoint(model)).tensors, facts_of(open_checkpoint(other)).tensors
    )
    if as_json:
        print_json(found.as_json())
    else:
        print("\n".join(_difference_lines(found, str(model), str(other))))


def _rows(facts: Facts) -> Iterator[Row]:
    yield Row("model", f"{facts.name}, {'a file' if facts.is_file else 'a folder'}")
    if facts.architecture:
        classes = f" ({', '.join(facts.classes)})" if facts.classes else ""
        yield Row("architecture", facts.architecture + classes)
    size = format_size(facts.nbytes)
    parameters = format_count(facts.parameters)
    yield Row("tensors", f"{len(facts.tensors):,}, {parameters} parameters, {size}")
    yield Row("dtypes", _counted(facts.dtypes))
    yield from labelled("weights", [_component(path, files) for path, files in facts.shards])
    yield from labelled("layers", facts.layer_texts())
    if facts.head_text():
        yield Row("head", facts.head_text())
    if facts.vocabulary is not None:
        yield Row("vocabulary", f"{facts.vocabulary:,} tokens")
    names = facts.side_files
    yield Row("side files", f"{len(names)}: {first_of(names, 8)}" if names else "none")
    yield from labelled("not copied", [f"{name}: {why}" for name, why in facts.left_out.items()])
    yield from labelled("warnings", facts.warnings)


def _component(path: str, files: Sequence[str]) -> str:
    place = f" in {path}" if path else ""
    return f"{plural(len(files), 'file')}{place}: {first_of(files)}"


def _counted(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{name} {count:,}" for name, count in counts.items()) or "none"


def _line(name: str, spec: TensorSpec) -> tuple[str, str, str]:
    return name, spec.dtype, _shape(spec)


def _shape(spec: TensorSpec) -> str:
    return f"[{', '.join(map(str, spec.shape))}]"


def _difference_lines(found: Difference, model: str, other: str) -> Iterator[str]:
    only = ((found.only_first, model), (found.only_second, other))
    for names, place in only:
        if names:
            yield f"only in {place}: {plural(len(names), 'tensor')}"
            yield from (f"  {name}" for name in names)
    if found.changed:
        yield f"different: {plural(len(found.changed), 'tensor')}"
        for name, first, second in found.changed:
            before, after = (f"{spec.dtype} {_shape(spec)}" for spec in (first, second))
            yield f"  {name}: {before} and {after}"
    yield f"the same name, dtype and shape: {plural(found.same, 'tensor')}"
