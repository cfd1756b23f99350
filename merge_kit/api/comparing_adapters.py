"""Compares adapters module by module: each factor is read once, and no change is ever formed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import combinations
from os import PathLike
from typing import TYPE_CHECKING

from merge_kit.api.closeness import AdapterComparison, Pair, Row, joined
from merge_kit.api.comparing import layer_of
from merge_kit.api.nodes import applied
from merge_kit.api.shared_modules import Changes, aligned, by_module, check_shapes
from merge_kit.core.names import natural_key
from merge_kit.errors import UsageError
from merge_kit.io.adapter_values import Adapter, Update
from merge_kit.io.reader import Reader
from merge_kit.methods.closeness import Directions, directions, products
from merge_kit.plan.describe import plural
from merge_kit.plan.findings import Findings
from merge_kit.plan.sources import Stored

if TYPE_CHECKING:
    from torch import Tensor

    from merge_kit.api.held import HeldModel
    from merge_kit.core.tensors import StoredTensor


def compare_adapters(
    adapters: Sequence[str | PathLike[str] | HeldModel],
) -> AdapterComparison:
    """Return how close the changes of adapters are: cosines, norms, and common subspaces.

    The change of a module is scale * b @ a; only its factors are looked at, in float64, one module
    after the other. A module that one of two adapters leaves alone counts as no change.

    Args:
        adapters: Folders or files of two or more LoRA adapters, or adapters that are loaded.

    Raises:
        CheckpointError: If one of them is no adapter, or is broken.
        MismatchError: If a module has different shapes in two of them, or names do not tell
            whether two of them change the same modules.
        UsageError: If there are fewer than two.
    """
    if isinstance(adapters, str | bytes) or not isinstance(adapters, Sequence):
        problem = f"found adapters of type {type(adapters).__name__}, expected a list"
        raise UsageError(problem, hint="write compare_adapters([a, b])")
    if len(adapters) < 2:
        problem = f"found {len(adapters)} adapters to compare, expected two or more"
        raise UsageError(problem, hint="write compare_adapters([a, b])")
    return compared([_opened(adapter) for adapter in adapters])


def compared(adapters: Sequence[Adapter]) -> AdapterComparison:
    """Return how close adapters are that are open already."""
    from merge_kit.engine.threads import one_torch_thread  # noqa: PLC0415  (torch)

    names = tuple(_distinct([adapter.checkpoint.name for adapter in adapters]))
    findings = Findings()
    found = by_module(aligned(adapters, names, findings))
    findings.raise_any()
    check_shapes(found, names)
    files = {f.path: f for a in adapters for c in a.checkpoint.components for f in c.files}
    with Reader(files.values()) as reader, one_torch_thread():  # small QRs are faster on one
        rows = tuple(_row(reader, name, found[name]) for name in sorted(found, key=natural_key))
        reader.check_all()
    by_layer: dict[str, list[Row]] = {}
    for row in rows:
        by_layer.setdefault(layer_of(row.name), []).append(row)
    layers = tuple(joined(name, members) for name, members in by_layer.items())
    total = joined("all", [_nothing(len(adapters)), *rows])
    notes = [*findings.notes]
    notes += [note for pair in zip(names, adapters, strict=True) for note in _notes(*pair)]
    notes += _apart(total, names)
    bases = tuple(adapter.base for adapter in adapters)
    return AdapterComparison(names, bases, rows, layers, total, tuple(notes))


def _opened(adapter: str | PathLike[str] | HeldModel) -> Adapter:
    found = applied(adapter).adapter.model.adapter
    assert found is not None  # what is no adapter is refused
    return found


def _nothing(adapters: int) -> Row:
    pairs = tuple(Pair(pair, (0.0, 0.0)) for pair in combinations(range(adapters), 2))
    return Row("", (0.0,) * adapters, pairs)


def _distinct(names: Sequence[str]) -> Iterator[str]:
    """Yield the names, each with its number behind it where two are the same."""
    counts = Counter(names)
    for i, name in enumerate(names, start=1):
        yield f"{name} ({i})" if counts[name] > 1 else name


def _row(reader: Reader, name: str, changes: Changes) -> Row:
    found = [None if change is None else _directions(reader, change) for change in changes]
    squares = [0.0 if one is None else one.square for one in found]
    pairs = tuple(
        _pair((i, j), (squares[i], squares[j]), found[i], found[j])
        for i, j in combinations(range(len(found)), 2)
    )
    return Row(name, tuple(square**0.5 for square in squares), pairs)


def _pair(
    adapters: tuple[int, int],
    squares: tuple[float, float],
    one: Directions | None,
    other: Directions | None,
) -> Pair:
    if one is None or other is None:
        return Pair(adapters, squares)
    both = products(one, other)
    return Pair(
        adapters,
        squares,
        dot=both.dot,
        shared=1,
        reinforcing=int(both.dot > 0),
        cancelling=int(both.dot < 0),
        least=both.least,
        output_common=both.left,
        input_common=both.right,
        output_chance=both.left_chance,
        input_chance=both.right_chance,
    )


def _directions(reader: Reader, update: Update) -> Directions:
    """Return the singular values and vectors of a change; its factors become (blocks, ...)."""
    a, b = _read(reader, update.a), _read(reader, update.b)
    if update.experts:
        a = a.view(update.experts, update.rank, -1)
        b = b.view(-1, update.rank, update.experts).permute(2, 0, 1)
    else:
        a, b = a.view(1, update.rank, -1), b.view(1, -1, update.rank)
    return directions(b, a, update.scale, where=update.module)


def _read(reader: Reader, stored: StoredTensor) -> Tensor:
    from merge_kit.engine.in_memory import fetch  # noqa: PLC0415  (torch, when it is needed)

    return fetch(reader, Stored(stored.span, stored.spec.dtype, stored.spec.shape)).double()


def _apart(total: Row, names: Sequence[str]) -> Iterator[str]:
    """Yield the pairs that have no module in common."""
    for pair in total.pairs:
        if not pair.shared:
            one, other = (names[i] for i in pair.adapters)
            yield f"{one} and {other} change no module in common, by their names"


def _notes(name: str, adapter: Adapter) -> Iterator[str]:
    """Yield what of an adapter is not compared."""
    scaled = sum(one.magnitude is not None for one in adapter.updates)
    if scaled:
        yield f"{name}: magnitudes of DoRA, in {plural(scaled, 'module')}, not compared"
    biases = sum(one.bias is not None for one in adapter.updates)
    if biases:
        yield f"{name}: biases, in {plural(biases, 'module')}, not compared"
    if adapter.saved:
        yield f"{name}: {plural(len(adapter.saved), 'tensor')} held whole, not compared"
    for rows in adapter.rows:
        yield f"{name}: {plural(len(rows.tokens), 'row')} of {rows.module}, not compared"
