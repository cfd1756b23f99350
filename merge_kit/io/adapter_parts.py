"""An adapter's tensors, gathered by the module that they change."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from merge_kit.core.dtypes import is_float
from merge_kit.core.tensors import StoredTensor
from merge_kit.errors import CheckpointError
from merge_kit.io.adapter_keys import Key, Part, read_key
from merge_kit.io.adapter_refused import refusal, refused_tensor
from merge_kit.io.adapter_values import Style
from merge_kit.io.index import few
from merge_kit.io.strict_json import shown


@dataclass(slots=True)
class Parts:
    """What a file holds, before it is checked.

    Attributes:
        modules: Path of the module -> its factors and what goes with them.
        embeddings: Modules whose factors are an embedding's.
        tokens: Path of the embedding -> its new rows.
        whole: Name in the base -> a tensor that stands for itself.
        styles: The styles that names belong to without a doubt.
    """

    modules: dict[str, dict[Part, StoredTensor]] = field(default_factory=dict)
    embeddings: set[str] = field(default_factory=set)
    tokens: dict[str, StoredTensor] = field(default_factory=dict)
    whole: dict[str, StoredTensor] = field(default_factory=dict)
    styles: set[Style] = field(default_factory=set)


def gather(tensors: Mapping[str, StoredTensor], *, where: str) -> Parts:
    """Return the tensors of an adapter by module.

    Raises:
        CheckpointError: If one is of a kind that is not supported, two are the same part of the
            same module, or there are several adapters in the file.
    """
    parts, labels = Parts(), set()
    for name, tensor in tensors.items():
        what = refused_tensor(name)
        if what:
            raise refusal(name, what, where)
        key = read_key(name)
        _check_float(tensor, key, where)
        _add(parts, key, tensor, where)
        if key.style is not None and key.part != "whole":
            parts.styles.add(key.style)
        if key.label:
            labels.add(key.label)
    if len(labels) > 1:
        problem = f"holds {len(labels)} adapters, expected one: {few(sorted(labels))}"
        raise CheckpointError(problem, where=where, hint="save each of them on its own")
    return parts


def _add(parts: Parts, key: Key, tensor: StoredTensor, where: str) -> None:
    if key.part == "whole":
        other = parts.whole.setdefault(key.module, tensor)
    elif key.part == "tokens":
        other = parts.tokens.setdefault(key.module, tensor)
    else:
        other = parts.modules.setdefault(key.module, {}).setdefault(key.part, tensor)
        if key.is_embedding:
            parts.embeddings.add(key.module)
    if other is not tensor:
        one, two = shown(other.spec.name), shown(tensor.spec.name)
        problem = f"tensors {one} and {two} are the same part of the same module"
        raise CheckpointError(problem, where=where, hint="remove one of them")


def _check_float(tensor: StoredTensor, key: Key, where: str) -> None:
    dtype = tensor.spec.dtype
    if is_float(dtype) or key.part in {"whole", "alpha"}:
        return
    problem = f"tensor {shown(tensor.spec.name)} is {dtype}, expected F32, F16, BF16 or F64"
    raise CheckpointError(problem, where=where, hint="save the adapter in one of these")
