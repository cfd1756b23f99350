from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from merge_kit.core.tensors import ByteSpan, TensorSpec
from merge_kit.io.values import WeightFile
from merge_kit.methods.base import PerModel
from merge_kit.methods.task_arithmetic import TaskArithmetic
from merge_kit.plan.sources import Stored
from merge_kit.plan.values import (
    Bill,
    Fate,
    Plan,
    PlanInput,
    Shard,
    SideFile,
    Step,
    Target,
)

RECIPE = """\
# of alice, in her folder /home/alice
merge_method: task_arithmetic
base_model: /home/alice/models/base
models:
  - {model: org/code, parameters: {weight: 0.5}}
parameters: {lambda: 1.0}
output: /home/alice/merged/out
"""


def stored(start: int) -> Stored:
    return Stored(ByteSpan(Path("/home/alice/models/base"), start, start + 8), "F32", (2,))


@pytest.fixture(scope="session")
def recipe() -> str:
    return RECIPE


@pytest.fixture(scope="session")
def make_plan():
    """Return a plan of two models, one merged and one copied tensor; keywords replace fields."""

    def make(**changes) -> Plan:
        file = WeightFile("model.safetensors", Path("/home/alice/models/base/m"), 1_500_000, 7)
        base = PlanInput(
            "input-1",
            "base",
            "/home/alice/models/base",
            Path("/home/alice/models/base"),
            (file,),
            is_base=True,
        )
        code = PlanInput(
            "input-2", "code", "org/code", Path("/cache/code"), (file,), "org/code", "abc123"
        )
        up = Target("layers.0.up", TensorSpec("layers.0.up", "F32", (2,)), 0, 100)
        norm = Target("norm", TensorSpec("norm", "F32", (2,)), 0, 108)
        plan = Plan(
            method="task_arithmetic",
            steps=(
                Step(
                    "merge",
                    (up,),
                    (stored(0),),
                    ("input-2",),
                    TaskArithmetic(weight=PerModel((0.5,))),
                    base=stored(0),
                ),
                Step("copy", (norm,), (stored(8),), ("input-1",)),
            ),
            shards=(Shard("model.safetensors", b"", 116),),
            side_files=(SideFile("config.json", text="{}\n"), SideFile("vocab", Path("/x/vocab"))),
            inputs=(base, code),
            fates=(
                Fate("input-1", "layers.0.up", "merged"),
                Fate("input-1", "norm", "copied"),
                Fate("input-2", "layers.0.up", "merged"),
                Fate("input-2", "extra", "dropped", "a rule says so"),
            ),
            layer_map=(),
            architecture="llama",
            layers=1,
            parameters=4,
            dtypes=(("F32", 2),),
            bill=Bill(1, 1, 0, 1, 1),
            notes=(),
            identity="id",
            seed=3,
        )
        return replace(plan, **changes)

    return make
