"""A plan as one JSON object that is the same for the same plan."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

from merge_kit.methods.base import MergeMethod
from merge_kit.plan.describe import generated_count, merged_by_method
from merge_kit.plan.describe_steps import arguments, file_keys
from merge_kit.plan.sources import SOURCES, Chosen
from merge_kit.plan.values import Plan, PlanInput, Shard


def plan_json(plan: Plan) -> dict[str, Any]:
    """Return everything that a plan says, as values that `json.dumps` takes.

    Files of inputs appear as `input-1/model.safetensors`; everything that describes bytes carries
    its unit in its key.
    """
    files = file_keys(plan)
    _, copied, dropped = plan.counts()
    made = generated_count(plan)
    generated = {"generated": made} if made else {}
    counts = {**generated, "copied": copied, "dropped": dropped}
    return {
        "method": plan.method,
        "architecture": plan.architecture,
        "layers": plan.layers,
        "parameters": plan.parameters,
        "seed": plan.seed,
        "identity": plan.identity,
        "tensors": {"merged": merged_by_method(plan), **counts},
        "dtypes": dict(plan.dtypes),
        "bill": _value(plan.bill, files),
        "inputs": [_input(model) for model in plan.inputs],
        "statistics": [_input(one) for one in plan.statistics],
        "shards": [_shard(shard) for shard in plan.shards],
        "side_files": _value(plan.side_files, files),
        "layer_map": _value(plan.layer_map, files),
        "stage_layers": _value(plan.stage_layers, files),
        "steps": _value(plan.steps, files),
        "fates": _value(plan.fates, files),
        "ranks": _value(plan.ranks, files),
        "fits": [step.outputs[0].key for step in plan.fits],
        "artefacts": [
            {"key": a.key, "kept_bytes": a.kept_bytes, "read_bytes": a.read_bytes, "flops": a.flops}
            for a in plan.artefacts
        ],
        "notes": list(plan.notes),
    }


def _input(model: PlanInput) -> dict[str, Any]:
    """Return an input without the modification times of its files, which copying changes."""
    return {
        "key": model.key,
        "name": model.name,
        "text": model.text,
        "root": str(model.root),
        "hub_id": model.hub_id,
        "revision": model.revision,
        "is_base": model.is_base,
        "files": [{"name": file.name, "nbytes": file.nbytes} for file in model.files],
    }


def _shard(shard: Shard) -> dict[str, Any]:
    return {"name": shard.name, "nbytes": shard.nbytes, "header_nbytes": len(shard.header)}


def _value(value: Any, files: Mapping[Path, str]) -> Any:
    """Return a value of the plan in the types of JSON; sources carry the name of their kind."""
    if isinstance(value, MergeMethod):
        return {"name": value.method_name, "parameters": _value(arguments(value), files)}
    if isinstance(value, Path):
        return files.get(value, str(value))
    if isinstance(value, Mapping):
        return {str(key): _value(item, files) for key, item in value.items()}
    if isinstance(value, tuple | list):
        return [_value(item, files) for item in value]
    if isinstance(value, Chosen) and value.plain:  # of many experts: the first stands for all
        of = {"kind": "Chosen", "of": len(value.sources), "first": _value(value.sources[0], files)}
        return of | {"key": value.key, "name": value.name, "place": value.place}
    if is_dataclass(value):
        kind = {"kind": type(value).__name__} if isinstance(value, SOURCES) else {}
        return kind | {f.name: _value(getattr(value, f.name), files) for f in fields(value)}
    return value if value is None or isinstance(value, bool | int | float | str) else str(value)
