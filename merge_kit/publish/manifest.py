"""merge_kit.json: what was merged and how, and the hash of every tensor.

The same merge gives the same text on every machine: no clock, no path, no user.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from merge_kit.errors import CheckpointError
from merge_kit.io.small_files import read_bytes
from merge_kit.io.strict_json import is_printable, parse_object, shown
from merge_kit.plan.describe_adapters import residuals
from merge_kit.plan.describe_orders import Orders
from merge_kit.plan.finishing import library_versions
from merge_kit.plan.values import Plan, PlanInput, SideFile
from merge_kit.publish.failures import reading
from merge_kit.publish.recipes import portable_recipe, recipe_hash
from merge_kit.publish.references import printable
from merge_kit.publish.side_files import is_inside
from merge_kit.publish.staging import MANIFEST

FORMAT = 1
_MAX_BYTES = 256 << 20
_HASH = re.compile(r"[0-9a-f]{32}")
_HINT = "it is damaged or was edited; merge again"


@dataclass(frozen=True, slots=True)
class FileRecord:
    """A file by its name, with its size where the plan knows it."""

    __pydantic_config__: ClassVar[Any] = {"extra": "forbid"}

    name: str
    nbytes: int | None


@dataclass(frozen=True, slots=True)
class InputRecord:
    """A model that was read."""

    __pydantic_config__: ClassVar[Any] = {"extra": "forbid"}

    key: str
    name: str
    hub_id: str | None
    revision: str | None
    is_base: bool
    files: tuple[FileRecord, ...]


@dataclass(frozen=True, slots=True)
class Counts:
    """Output tensors that were merged and copied, and input tensors that were left out."""

    __pydantic_config__: ClassVar[Any] = {"extra": "forbid"}

    merged: int
    copied: int
    dropped: int


@dataclass(frozen=True, slots=True)
class Residual:
    """What the factors of one module miss of the change that was asked for.

    Attributes:
        relative: Its Frobenius norm, over that of the change; 0 where there is no change.
        norm: That of the change.
    """

    __pydantic_config__: ClassVar[Any] = {"extra": "forbid"}

    relative: float
    norm: float


@dataclass(frozen=True, slots=True)
class Order:
    """Experts of one block, in the order that they were put in.

    Attributes:
        experts: For each place, the number that the expert had that stands there now.
        distances: How far each is from the one that it was matched with, relative to that one.
    """

    __pydantic_config__: ClassVar[Any] = {"extra": "forbid"}

    experts: tuple[int, ...]
    distances: tuple[float, ...]

    def __post_init__(self) -> None:
        if sorted(self.experts) != list(range(len(self.experts))):
            raise ValueError(f"{shown(list(self.experts))} is no order")
        if len(self.distances) != len(self.experts):
            raise ValueError(f"{len(self.distances)} distances of {len(self.experts)} experts")


@dataclass(frozen=True, slots=True)
class Manifest:
    """The record of a merge.

    Attributes:
        recipe: As YAML, local models by their key and folder's name.
        recipe_hash: See `publish.recipes.recipe_hash`.
        versions: What the bytes depend on beside recipe and inputs.
        files: Weight files, in order.
        side_files: All others, the model card and this record not among them.
        tensors: Key -> hash.
        nonfinite: Key -> NaN and infinities that were written.
        saturated: Key -> values beyond the output dtype.
        statistics: Files that models were weighed by.
        ranks: Module of an adapter that was made -> its rank; of one expert, for experts.
        residuals: Module whose factors were computed -> what they miss.
        orders: Experts that were put in order (their model and module) -> what stands where.
    """

    __pydantic_config__: ClassVar[Any] = {"extra": "forbid"}

    format: int
    recipe: str
    recipe_hash: str
    versions: dict[str, str]
    seed: int
    method: str
    inputs: tuple[InputRecord, ...]
    counts: Counts
    files: tuple[FileRecord, ...]
    side_files: tuple[FileRecord, ...]
    tensors: dict[str, str]
    nonfinite: dict[str, int]
    saturated: dict[str, int]
    statistics: tuple[InputRecord, ...] = ()
    ranks: dict[str, int] = field(default_factory=dict)
    residuals: dict[str, Residual] = field(default_factory=dict)
    orders: dict[str, Order] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for file in (*self.files, *self.side_files):
            if not is_inside(file.name) or not is_printable(file.name):
                raise ValueError(f"the file {shown(file.name)} is not in the folder")
        for key in (*self.tensors, *self.ranks, *self.residuals, *self.orders):
            if not is_printable(key):
                raise ValueError(f"the name {shown(key)} cannot be printed")
        for key, value in self.tensors.items():
            if not _HASH.fullmatch(value):
                raise ValueError(f"the hash of {shown(key)} is {shown(value)}, expected 32 digits")


def manifest(  # noqa: PLR0913  (every option has a name)
    plan: Plan,
    *,
    recipe_text: str,
    hashes: Mapping[str, str],
    nonfinite: Mapping[str, int],
    saturated: Mapping[str, int],
    versions: Mapping[str, str],
    facts: Mapping[str, Mapping[str, float]] | None = None,
    orders: Orders | None = None,
) -> str:
    """Return the text of merge_kit.json.

    Args:
        recipe_text: The recipe as YAML; paths in it are replaced.
        hashes: Of every tensor that was written, by its key.
        nonfinite: NaN and infinities written, by the tensor's key.
        saturated: Values beyond the output dtype, by the tensor's key.
        versions: Of merge_kit and torch, and the CPU capability.
        facts: See `Report.facts`.
        orders: See `Report.orders`.
    """
    own = library_versions(plan.artefacts)
    record = Manifest(
        format=FORMAT,
        recipe=portable_recipe(recipe_text, plan.read),
        recipe_hash=recipe_hash(recipe_text),
        versions={"python": ".".join(map(str, sys.version_info[:2]))} | dict(versions) | own,
        seed=plan.seed,
        method=plan.method,
        inputs=tuple(_input(model) for model in plan.inputs),
        counts=Counts(*plan.counts()),
        files=tuple(FileRecord(shard.name, shard.nbytes) for shard in plan.shards),
        side_files=tuple(FileRecord(file.name, _size(file)) for file in plan.side_files),
        tensors=dict(hashes),
        nonfinite=dict(nonfinite),
        saturated=dict(saturated),
        statistics=tuple(_input(one) for one in plan.statistics),
        ranks={rank.key: rank.rank for rank in plan.ranks},
        residuals={one.key: Residual(one.relative, one.norm) for one in residuals(facts or {})},
        orders={printable(where): _order(pairs) for where, pairs in (orders or {}).items()},
    )
    return json.dumps(asdict(record), indent=1, sort_keys=True, ensure_ascii=True) + "\n"


def _order(pairs: Sequence[tuple[int, float]]) -> Order:
    return Order(tuple(expert for expert, _ in pairs), tuple(apart for _, apart in pairs))


def _input(model: PlanInput) -> InputRecord:
    files = tuple(FileRecord(printable(file.name), file.nbytes) for file in model.files)
    name = printable(model.name)
    return InputRecord(model.key, name, model.hub_id, model.revision, model.is_base, files)


def _size(file: SideFile) -> int | None:
    """Return the size of a text; that of a copy is its source's, whatever it is by then."""
    return None if file.text is None else len(file.text.encode("utf-8"))


def read_manifest(path: Path) -> Manifest:
    """Return the record in a file.

    Args:
        path: The file, or the folder that holds it.

    Raises:
        CheckpointError: If it is not there, is damaged, or has another format.
    """
    from pydantic import TypeAdapter, ValidationError  # noqa: PLC0415  (slow; merges don't read)

    named = path
    with reading(path):
        path = path / MANIFEST if path.is_dir() else path
        is_there = path.exists()
        # The buffer is allocated for the limit, so the limit is what the file holds.
        limit_bytes = min(path.stat().st_size, _MAX_BYTES) if is_there else 0
    if not is_there:
        problem = f"there is no {MANIFEST}"
        above = (named.parent / MANIFEST).is_file()  # one of several adapters
        hint = "name a folder that mergekit run has written"
        hint = f"name the folder above it, {named.parent}" if above else hint
        raise CheckpointError(problem, where=str(named), hint=hint)
    raw = read_bytes(path, limit_bytes)
    found = parse_object(raw, where=str(path), what="record").get("format")
    if found != FORMAT or isinstance(found, bool):
        problem = f"has format {shown(found)}, expected {FORMAT}"
        hint = "was it written by a newer merge_kit?" if isinstance(found, int) else _HINT
        raise CheckpointError(problem, where=str(path), hint=hint)
    try:
        return TypeAdapter(Manifest).validate_json(raw, strict=True)
    except ValidationError as exc:
        first = exc.errors(include_url=False, include_input=False)[0]
        place = ".".join(str(part) for part in first["loc"])
        problem = f"is no record of a merge: {place}: {first['msg']}"
        raise CheckpointError(problem, where=str(path), hint=_HINT) from exc
