"""An adapter that a plan makes: its modules, and everything that its files hold."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from merge_kit.io.adapter_values import Kind
from merge_kit.plan.models import Part
from merge_kit.plan.values import Fate, ModuleRank, SideFile, Step


@dataclass(frozen=True, slots=True)
class OutModule:
    """One module of an adapter that is written: the change is scale * b @ a.

    Attributes:
        folder: Of the adapter in the output, "" where there is one adapter.
        module: As `io.adapter_values.Update.module`.
        rank: Of one expert, for experts.
        scale: alpha / rank of the adapter that is written.
        bias: Whether b has a bias.
        magnitude: Whether it is DoRA's (only a copy of one adapter can have it).
    """

    folder: str
    module: str
    kind: Kind
    rank: int
    scale: float
    bias: bool = False
    magnitude: bool = False


@dataclass(frozen=True, slots=True)
class AdapterPlan:
    """The stage that makes one or several adapters.

    Attributes:
        steps: Their targets are not placed yet; `Target.key` is the folder and the tensor's name.
            A step has one output, or two for each adapter that it makes (a, then b).
        parts: One an adapter: its folder, the stem "adapter_model", no config.json.
        files: adapter_config.json of each, and what is copied beside it.
        fits: See `Plan.fits`.
        ranks: See `Plan.ranks`.
        fates: Of every tensor of every input.
        metadata: Folder -> free text by key for the adapter's file.
    """

    steps: tuple[Step, ...]
    parts: tuple[Part, ...]
    files: tuple[SideFile, ...]
    fits: tuple[Step, ...]
    ranks: tuple[ModuleRank, ...]
    fates: tuple[Fate, ...]
    modules: tuple[OutModule, ...] = ()
    notes: tuple[str, ...] = ()
    metadata: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
