from __future__ import annotations

from pathlib import Path

import pytest

from merge_kit import api
from merge_kit.engine.progress import Progress
from merge_kit.engine.report import Report
from merge_kit.plan.values import Bill, Fate, LayerOrigin, Plan, PlanInput, Shard


@pytest.fixture
def plan() -> Plan:
    return Plan(
        method="linear",
        steps=(),
        shards=(Shard("model.safetensors", b"", 34),),
        side_files=(),
        inputs=(PlanInput("input-1", "a", "models/a", Path("/models/a"), ()),),
        fates=(Fate("input-1", "head", "dropped", "a rule drops it"),),
        layer_map=(LayerOrigin("layers", 0, (("input-1", 4),)),),
        architecture="llama",
        layers=1,
        parameters=1000,
        dtypes=(("F32", 1),),
        bill=Bill(6_000_000, 3_000_000, 0, 600_000_000, 2),
        notes=(),
        identity="abc",
        seed=0,
    )


@pytest.fixture
def report() -> Report:
    return Report(
        seconds=1.5,
        bytes_read=6_000_000,
        bytes_written=3_000_000,
        peak_bytes=500_000_000,
        hashes={},
        nonfinite={},
        saturated={},
        resumed=0,
    )


class Library:
    """Stands in for the library: keeps what it was told, returns what a test sets."""

    def __init__(self, plan: Plan, report: Report) -> None:
        self.made, self.report = plan, report
        self.planned: list[tuple[Path, dict]] = []
        self.merged: list[tuple[Path, Path, dict]] = []
        self.during = lambda stop: None

    def plan(self, recipe, **told):
        self.planned.append((recipe, told))
        return self.made

    def merge(self, recipe, output, **told):
        told.pop("on_plan")(self.made)
        on_progress, stop = told.pop("on_progress"), told.pop("stop")
        self.merged.append((recipe, output, told))
        on_progress(Progress(1_000_000, 3_000_000, 0.5, "a.weight"))
        on_progress(Progress(3_000_000, 3_000_000, 1.5, "b.weight"))
        self.during(stop)
        return api.Merge(Path(output), self.made, self.report)


@pytest.fixture
def library(monkeypatch, plan, report) -> Library:
    double = Library(plan, report)
    monkeypatch.setattr(api, "plan", double.plan)
    monkeypatch.setattr(api, "merge", double.merge)
    return double


@pytest.fixture
def recipe(tmp_path, monkeypatch) -> Path:
    """Return a recipe in the working directory."""
    monkeypatch.chdir(tmp_path)
    path = Path("soup.yaml")
    path.write_text(
        "merge_method: linear\n"
        "models:\n"
        "  - {model: a, parameters: {weight: 1}}\n"
        "  - {model: b, parameters: {weight: 1}}\n"
    )
    return path
