"""Plans made by hand, run by the engine: no recipe, no planner."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from merge_kit.core.tensors import TensorSpec, nbytes
from merge_kit.engine.run import run_plan
from merge_kit.io.header import read_header
from merge_kit.io.layout import build_header
from merge_kit.io.values import WeightFile
from merge_kit.plan import cost
from merge_kit.plan.sources import Stored
from merge_kit.plan.spilling import with_spills
from merge_kit.plan.values import Plan, PlanInput, Shard, Step, Target
from merge_kit.plan.whole_model import model_scans

NAMES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16", torch.float64: "F64"}


def stored(folder: Path, name: str, tensor: torch.Tensor) -> Stored:
    """Write a tensor to a file of its own and return it as a source."""
    path = folder / f"{name}.safetensors"
    save_file({"x": tensor.contiguous()}, path)
    (only,) = read_header(path).tensors
    return Stored(only.span, only.spec.dtype, only.spec.shape)


def step(method, inputs, *, base=None, dtype="F32", shapes=None, name="x", compute=None, **more):
    """Return a step with one output, or with one a shape."""
    shapes = shapes or [inputs[0].shape if inputs else base.shape]
    names = [name] if len(shapes) == 1 else [f"{name}.{i}" for i in range(len(shapes))]
    targets = tuple(
        Target(n, TensorSpec(n, dtype, tuple(shape)), -1, 0)
        for n, shape in zip(names, shapes, strict=True)
    )
    wide = "F64" if "F64" in (dtype, *(s.dtype for s in inputs)) else "F32"
    return Step(
        action="merge",
        outputs=targets,
        inputs=tuple(inputs),
        models=tuple(f"input-{i + 1}" for i in range(len(inputs))),
        method=method,
        base=base,
        weights=tuple(getattr(method, "weight", ()) or [1.0] * len(inputs)),
        compute=compute or wide,
        **more,
    )


def plan(steps, *, blocks=None, workers=2, inputs=(), fits=()) -> Plan:
    """Return a plan with one shard."""
    specs = [target.spec for s in steps for target in s.outputs]
    header, offsets = build_header(specs)
    places, placed = iter(offsets), []
    for s in steps:
        targets = tuple(Target(t.key, t.spec, 0, next(places)) for t in s.outputs)
        made = with_spills(cost.replace(s, outputs=targets))
        placed.append(cost.sized(made, blocks))
    ends = [o + spec.nbytes for o, spec in zip(offsets, specs, strict=True)]
    shard = Shard("model.safetensors", header, max([len(header), *ends]))
    looked_at = tuple(cost.sized(with_spills(s), blocks) for s in fits)
    every = (*placed, *looked_at)
    bill = cost.bill(every, workers, cost.peak_bytes(every, workers, len(every)))
    return Plan(
        method="test",
        steps=tuple(placed),
        whole_model=tuple(s for s in placed if model_scans(s)),
        fits=looked_at,
        shards=(shard,),
        side_files=(),
        inputs=tuple(inputs),
        fates=(),
        layer_map=(),
        architecture="",
        layers=None,
        parameters=sum(spec.numel for spec in specs),
        dtypes=(),
        bill=bill,
        notes=(),
        identity="test",
        seed=0,
    )


def run(steps, folder: Path, **options) -> dict[str, torch.Tensor]:
    """Run steps and return the tensors that were written."""
    engine = {k: options.pop(k) for k in ("allow_nonfinite", "kernel_copy") if k in options}
    folder.mkdir(parents=True, exist_ok=True)
    run_plan(plan(steps, **options), folder, **engine)
    return load_file(folder / "model.safetensors")


def weight_file(path: Path) -> WeightFile:
    """Return a file as the planner sees it."""
    stat = path.stat()
    return WeightFile(path.name, path, stat.st_size, stat.st_mtime_ns)


def plan_input(path: Path) -> PlanInput:
    """Return a file as an input of a plan."""
    return PlanInput("input-1", path.stem, path.name, path, (weight_file(path),))


__all__ = ["NAMES", "nbytes", "plan", "plan_input", "run", "step", "stored", "weight_file"]
