"""The experts of a model, found from the names and shapes of its tensors alone.

Two layouts are known. Split: each expert has tensors of its own (`...experts.7.up_proj.weight`).
Fused: a tensor holds all of them, one after the other along its first axis
(`...experts.gate_up_proj`, three axes or more; its biases have two).
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from math import prod
from typing import Literal

from merge_kit.architecture.stacks import outermost

Shapes = Mapping[str, tuple[int, ...]]

_SPLIT = re.compile(r"(.*?(?:^|[./])(?!shared)\w*experts)\.(0|[1-9][0-9]{0,5})\.(.+)")
_FUSED = re.compile(r"(.*?(?:^|[./])(?!shared)\w*experts)\.(?![0-9]+\.)(.+)")
_FUSED_BLOCK = re.compile(r"(.*(?:^|[./])block_sparse_moe)\.((?:input|output)_linear(?:\.\w+)?)")
_ROUTER = re.compile(r"gate|router|expert|score|correction|wg")
_FUSED_AXES = 3


@dataclass(frozen=True, slots=True)
class Piece:
    """What one expert has of a tensor.

    Attributes:
        tensor: Name of the tensor that holds it.
        start: First element in the flattened tensor; 0 where the tensor is the expert's own.
        shape: Of the piece.
    """

    tensor: str
    start: int
    shape: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class ExpertGroup:
    """The experts of one block, and what belongs to them.

    Attributes:
        path: Of their module ("model.layers.3.mlp.experts").
        layer: Number of the layer, None outside layers.
        layout: Whether experts have tensors of their own, or share them.
        count: Experts.
        parts: For each part of an expert ("w1.weight", "gate_up_proj"), its piece of each expert.
        rows: Tensors of the router and the like, with one entry an expert along the first axis.
        shared: Tensors of experts that every token passes, and of their gate.
        problem: What is wrong with the group, "" if it is whole.
    """

    path: str
    layer: int | None
    layout: Literal["split", "fused"]
    count: int
    parts: Mapping[str, tuple[Piece, ...]]
    rows: tuple[str, ...] = ()
    shared: tuple[str, ...] = ()
    problem: str = ""

    @property
    def block(self) -> str:
        """Path of the block: of the module that holds experts, router and shared experts."""
        return self.path.removesuffix(_last(self.path)).rstrip(".")

    @property
    def tensors(self) -> tuple[str, ...]:
        """The tensors that hold the experts, each once."""
        pieces = (piece.tensor for part in self.parts.values() for piece in part)
        return tuple(dict.fromkeys(pieces))


def find_experts(shapes: Shapes) -> tuple[ExpertGroup, ...]:
    """Return the groups of experts of a model, in the order of its tensors."""
    split: dict[str, dict[str, dict[int, str]]] = {}
    fused: dict[str, dict[str, str]] = {}
    for name, shape in shapes.items():
        found = _SPLIT.fullmatch(name)
        if found is not None:
            parts = split.setdefault(found[1], {})
            parts.setdefault(found[3], {})[int(found[2])] = name
            continue
        found = _FUSED.fullmatch(name) or _FUSED_BLOCK.fullmatch(name)
        if found is not None and len(shape) > 1:
            fused.setdefault(found[1], {})[found[2]] = name
    groups = [_split_group(path, parts, shapes) for path, parts in split.items()]
    for path, names in fused.items():
        if path not in split and any(len(shapes[name]) >= _FUSED_AXES for name in names.values()):
            groups.append(_fused_group(path, names, shapes))
    return tuple(_with_rest(groups, shapes))


def _split_group(path: str, parts: Mapping[str, Mapping[int, str]], shapes: Shapes) -> ExpertGroup:
    count = 1 + max(max(experts) for experts in parts.values())
    made: dict[str, tuple[Piece, ...]] = {}
    problem = ""
    for part, experts in parts.items():
        missing = next((i for i in range(count) if i not in experts), None)
        if missing is not None:
            problem = problem or f"expert {missing} of {count} has no {part}"
            continue
        made[part] = tuple(Piece(experts[i], 0, shapes[experts[i]]) for i in range(count))
        odd = next((piece for piece in made[part] if piece.shape != made[part][0].shape), None)
        if odd is not None:
            first = made[part][0]
            problem = problem or (
                f"experts differ: {first.tensor} has shape {list(first.shape)}, "
                f"{odd.tensor} {list(odd.shape)}"
            )
    return ExpertGroup(path, _layer(path), "split", count, made, problem=problem)


def _fused_group(path: str, names: Mapping[str, str], shapes: Shapes) -> ExpertGroup:
    whole = next(n for n in names.values() if len(shapes[n]) >= _FUSED_AXES)
    count = shapes[whole][0]
    problem = "" if count else f"{whole} has shape {list(shapes[whole])}: no experts"
    made: dict[str, tuple[Piece, ...]] = {}
    for part, name in names.items():
        first, *rest = shapes[name]
        if first != count:
            problem = problem or f"{whole} holds {count} experts, {name} {first}"
            continue
        size = prod(rest)
        made[part] = tuple(Piece(name, i * size, tuple(rest)) for i in range(count))
    return ExpertGroup(path, _layer(path), "fused", count, made, problem=problem)


def _with_rest(groups: Iterable[ExpertGroup], shapes: Shapes) -> Iterator[ExpertGroup]:
    """Yield groups with what else their blocks hold."""
    made = list(groups)
    inside: dict[str, list[str]] = defaultdict(list)
    blocks = {group.block for group in made}
    held = {name for group in made for name in group.tensors}
    for name in shapes:
        if name not in held:
            for block in _ancestors(name):
                if block in blocks:
                    inside[block].append(name)
    for group in made:
        rest = [(name, _under(name, group.block)) for name in inside[group.block]]
        shared = tuple(name for name, path in rest if "shared" in path)
        rows = tuple(
            name
            for name, path in rest
            if "shared" not in path
            and _ROUTER.search(path.partition(".")[0])
            and shapes[name][:1] == (group.count,)
        )
        yield replace(group, rows=rows, shared=shared)


def _under(name: str, block: str) -> str:
    return name.removeprefix(block).lstrip("./")


def _ancestors(name: str) -> Iterator[str]:
    """Yield the paths of the modules that a tensor lies in, the nearest first."""
    while "." in name:
        name = name.rpartition(".")[0]
        yield name
    yield ""


def _last(path: str) -> str:
    """Return the last step of a path to experts: of one module, the whole is the block itself."""
    last = re.split(r"[./]", path)[-1]
    return last if last.endswith("experts") else ""


def _layer(path: str) -> int | None:
    found = outermost(f"{path}.x")
    return None if found is None else found[1]
