"""The low-rank changes of an adapter, each checked against its config and its own shapes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from merge_kit.core.tensors import StoredTensor
from merge_kit.errors import CheckpointError
from merge_kit.io.adapter_bytes import read_number
from merge_kit.io.adapter_keys import Part
from merge_kit.io.adapter_settings import Settings
from merge_kit.io.adapter_values import Kind, Update
from merge_kit.io.index import few
from merge_kit.io.strict_json import shown

Found = Mapping[Part, StoredTensor]
_SAME = "config and weights are of two adapters, or the file is damaged: fetch both again"


def check_pairs(modules: Mapping[str, Found], *, where: str) -> None:
    """Refuse a factor without the other, and what goes with factors without them.

    Raises:
        CheckpointError: It names the first five tensors.
    """
    lone = [
        f"{tensor.spec.name} (no {'b' if 'a' in found else 'a'})"
        for found in modules.values()
        if not {"a", "b"} <= set(found)
        for tensor in found.values()
    ]
    if lone:
        problem = f"{len(lone)} tensors are half of a pair of factors: {few(lone)}"
        raise CheckpointError(problem, where=where, hint="is the file complete? fetch it again")


def linear_update(
    module: str, found: Found, kind: Kind, settings: Settings | None, path: str
) -> Update:
    """Return the change of one linear layer, embedding or convolution.

    Args:
        module: As it stands in the update.
        path: As patterns of the config see it.

    Raises:
        CheckpointError: If shapes do not fit one another or the config.
    """
    a, b = found["a"], found["b"]
    rank = a.spec.shape[0] if a.spec.shape else 0
    _check_factors(a, b, rank, kind)
    alpha, scale = _scale(found, rank, settings, path)
    update = Update(
        module=module,
        kind=kind,
        a=a,
        b=b,
        rank=rank,
        alpha=alpha,
        scale=scale,
        transposed=kind == "linear" and settings is not None and settings.fan_in_fan_out,
        magnitude=found.get("magnitude"),
        bias=found.get("bias"),
        alpha_tensor=found.get("alpha"),
    )
    _check_extras(update, settings)
    return update


def kind_of(found: Found, is_embedding: bool) -> Kind:
    """Return what a pair of factors changes."""
    if is_embedding:
        return "embedding"
    return "convolution" if len(found["a"].spec.shape) > 2 else "linear"


def _check_factors(a: StoredTensor, b: StoredTensor, rank: int, kind: Kind) -> None:
    first, second = a.spec.shape, b.spec.shape
    axes = len(first) if kind == "convolution" else 2
    fits = len(first) == len(second) == axes and second[1] == rank and 0 not in (*first, *second)
    if fits and all(size == 1 for size in second[2:]):
        return
    where = f"{a.span.path}, tensor {shown(a.spec.name)}"
    shapes = f"shapes {list(first)} and {list(second)}"
    if kind == "convolution" and len(second) == axes and 0 < second[1] < rank:
        problem = f"{shapes} are those of a grouped convolution, which is not supported"
        hint = "such a change is no change of the weight: nothing can merge it"
        raise CheckpointError(problem, where=where, hint=hint)
    problem = f"{shapes} of the factors do not fit, expected a rank as first and second axis"
    raise CheckpointError(problem, where=where, hint=_SAME)


def _scale(found: Found, rank: int, settings: Settings | None, path: str) -> tuple[float, float]:
    """Return alpha and scale."""
    stored = found.get("alpha")
    if settings is None:
        alpha = float(rank) if stored is None else read_number(stored)
        return alpha, alpha / rank
    where = f"{found['a'].span.path}, tensor {shown(found['a'].spec.name)}"
    expected = settings.rank_of(path)
    if expected != rank:
        problem = f"has rank {rank} by its shape, and {expected} by {settings.where}"
        raise CheckpointError(problem, where=where, hint=_SAME)
    alpha = settings.alpha_of(path)
    if stored is not None and read_number(stored) != alpha:
        problem = f"has alpha {read_number(stored):g} beside it, and {alpha:g} by {settings.where}"
        raise CheckpointError(problem, where=where, hint=_SAME)
    return alpha, settings.scale(alpha, rank)


def _check_extras(update: Update, settings: Settings | None) -> None:
    """Check bias and magnitude against the factors, and against what the config says."""
    outputs = update.b.spec.shape[0]
    where = f"{update.b.span.path}, tensor {shown(update.b.spec.name)}"
    for what, tensor in (("bias", update.bias), ("magnitude", update.magnitude)):
        if tensor is not None and not _one_each(tensor, outputs, what):
            shape = list(tensor.spec.shape)
            problem = f"tensor {shown(tensor.spec.name)} has shape {shape}, expected {outputs}"
            hint = "a magnitude is one number for each output" if what == "magnitude" else _SAME
            raise CheckpointError(problem, where=where, hint=hint)
    for problem in _contradictions(update, settings):
        raise CheckpointError(problem, where=where, hint=_SAME)


def _one_each(tensor: StoredTensor, outputs: int, what: str) -> bool:
    """Return whether there is one number for each output.

    DoRA's may have axes of one element more: peft's of convolutions is (1, outputs, 1, 1); kohya's
    `dora_scale` is (outputs, 1, 1, 1), where (1, inputs, 1, 1) is another method, with a length for
    each input.
    """
    shape = tensor.spec.shape
    if what == "bias":
        return shape == (outputs,)
    axis = 1 if len(shape) > 2 and not tensor.spec.name.endswith(".dora_scale") else 0
    return tensor.spec.numel == outputs and len(shape) > axis and shape[axis] == outputs


def _contradictions(update: Update, settings: Settings | None) -> Iterator[str]:
    if settings is None:
        return
    for key, says, holds, what in (
        ("use_dora", settings.dora, update.magnitude is not None, "magnitude"),
        ("lora_bias", settings.lora_bias, update.bias is not None, "bias"),
    ):
        if says != holds and not (key == "lora_bias" and update.kind == "embedding"):
            holding = f"holds a {what}" if holds else f"holds no {what}"
            yield f"{holding}, and {key} is {str(says).lower()} in {settings.where}"
