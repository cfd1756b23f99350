"""Layers that stand more than once in a stack: what the plan says about them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence

from merge_kit.plan.models import Model

_TIMES = {2: "twice"}

SHOWN = 6
"""Runs of layers that are listed before `and 12 more`."""


def repeats(
    prefix: str, layers: Sequence[Sequence[tuple[Model, int]]], stage: str | None
) -> Iterator[str]:
    """Yield one sentence that says which layers of which model a stack has more than once.

    Args:
        prefix: The stack's name.
        layers: What each output layer is made of.
        stage: Name of the stage, None for the output's.
    """
    counts = Counter(one for made_of in layers for one in dict.fromkeys(made_of))
    runs: list[tuple[Model, int, int, int]] = []  # model, first, last, times
    order = {model: None for model, _ in counts}
    for model in order:
        for layer in sorted(layer for one, layer in counts if one is model):
            times = counts[model, layer]
            last = runs[-1] if runs else None
            if last is not None and (last[0] is model and last[2:] == (layer - 1, times)):
                runs[-1] = (model, last[1], layer, times)
            else:
                runs.append((model, layer, layer, times))
    found = [_run(*run) for run in runs if run[3] > 1]
    if found:
        more = len(found) - SHOWN
        shown = ", ".join(found[:SHOWN]) + (f" and {more} more" if more > 0 else "")
        where = f"{prefix or 'the stack'}{f' of {stage}' if stage else ''}"
        yield f"{where}: layers that stand there more than once: {shown}"


def _run(model: Model, first: int, last: int, times: int) -> str:
    span = str(first) if first == last else f"{first}-{last}"
    return f"{span} of {model.label} ({_TIMES.get(times, f'{times} times')})"
