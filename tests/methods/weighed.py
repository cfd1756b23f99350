"""Steps of methods that weigh models by statistics, made by hand."""

from __future__ import annotations

from merge_kit.methods.evidence import operand_name
from tests.engine.handmade import run, step, stored


def weighed(method, models, statistics, folder, *, of_columns=False, dtype="F32", **options):
    """Return what a method makes of models of one tensor with these statistics."""
    folder.mkdir(parents=True, exist_ok=True)
    sources = [stored(folder, f"m{i}", m) for i, m in enumerate(models)]
    aux = tuple(
        (operand_name(i, of_columns=of_columns), stored(folder, f"s{i}", s))
        for i, s in enumerate(statistics)
    )
    compute = "F64" if len(models) > 4 else None
    return run(
        [step(method, sources, aux=aux, dtype=dtype, compute=compute)], folder / "out", **options
    )["x"]
