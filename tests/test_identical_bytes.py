"""One recipe, one output: threads, slabs, memory, places and dates change no byte of any file."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import save_file

from merge_kit.api import Merge, merge
from merge_kit.core.tensors import BLOCK
from merge_kit.plan.build import build_plan
from merge_kit.recipe.parse import recipe_from_mapping
from tests import models

SHARD_BYTES = 1_000_000
DTYPES = (torch.bfloat16, torch.float32, torch.float16, torch.bfloat16, torch.float64)
SECRET = "Xq7"  # of every folder's name here, and of no file in an output

CASES = [
    *(("linear", count) for count in (2, 8, 50)),
    ("slerp", 2),
    *(("task_arithmetic", count) for count in (2, 8, 50)),
    *(("passthrough", count) for count in (2, 8, 50)),
]


def write(folder: Path, count: int, tails: Iterable[int]) -> Path:
    """Write state dicts with tensors of a block and so many elements more."""
    folder.mkdir()
    noise = torch.randn(2 * BLOCK, generator=torch.Generator().manual_seed(0))
    for model in range(count):
        tensors = {}
        for layer, tail in enumerate(tails):
            start = (7919 * model + 104_729 * tail) % (BLOCK - 31)
            values = noise[start : start + BLOCK + tail] * (1 + 0.01 * model)
            tensors[f"layers.{layer}.weight"] = values.to(DTYPES[tail % len(DTYPES)])
        save_file(tensors, folder / f"m{model:02d}.safetensors")
    return folder


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    """Folders of models by how many are merged; each tensor ends in another place of a register."""
    root = tmp_path_factory.mktemp("inputs")
    few = write(root / f"{SECRET}-few", 8, range(1, 32))
    many = write(root / f"{SECRET}-many", 50, (1, 2, 3, 7, 8, 15, 17, 31))
    return {2: few, 8: few, 50: many}


def recipe(method: str, count: int, folder: Path | None) -> dict[str, Any]:
    """Return a recipe for the first models of a folder, beside the recipe if there is none."""
    names = [f"m{i:02d}.safetensors" for i in range(count)]
    paths = [str(folder / name) if folder else name for name in names]
    listed: list[dict[str, Any]] = [{"model": path} for path in paths]
    if method == "slerp":
        return {"base_model": paths[0], "models": listed[1:], "parameters": {"t": 0.3}}
    if method == "passthrough":
        width = 1 if count == 50 else 30 // count
        starts = [0 if count == 50 else width * i for i in range(count)]
        layers = [
            {"model": path, "layer_range": [start, start + width]}
            for path, start in zip(paths, starts, strict=True)
        ]
        dtype = {"dtype": "bfloat16"} if count == 8 else {}  # the others are copied
        return {"slices": [{"sources": [source]} for source in layers], **dtype}
    for i, entry in enumerate(listed):
        entry["parameters"] = {"weight": 0.1 + 0.013 * i}
    if method == "linear":
        return {"models": listed}
    return {"base_model": paths[0], "models": listed[1:], "parameters": {"lambda": 0.7}}


@pytest.fixture
def run(tmp_path, monkeypatch) -> Callable[..., Merge]:
    """Merge into a new folder, with slabs of so many blocks where that is said."""
    made = iter(range(100))

    def merged(what: Any, *, blocks: int | None = None, **options: Any) -> Merge:
        with monkeypatch.context() as patch:
            if blocks is not None:
                owner = sys.modules[merge.__module__]
                patch.setattr(owner, "build_plan", partial(build_plan, slab_blocks=blocks))
            output = tmp_path / f"{SECRET}-{next(made)}"
            return merge(what, output, shard_size=SHARD_BYTES, **options)

    return merged


def assert_same_files(first: Merge, other: Merge) -> None:
    """Hold two folders to the same files with the same bytes."""
    wanted, found = models.contents(first.output), models.contents(other.output)
    assert found.keys() == wanted.keys()
    assert [name for name in wanted if found[name] != wanted[name]] == []


@pytest.mark.parametrize(("method", "count"), CASES)
def test_threads_slabs_and_memory_change_no_byte(method, count, places, run):
    what = {"merge_method": method, **recipe(method, count, places[count])}
    first = run(what, threads=1)
    written = models.files(first.output)
    assert {"README.md", "merge_kit.json"} < written
    assert len([name for name in written if name.endswith(".safetensors")]) > 1
    assert_same_files(first, run(what, threads=2))
    for blocks in (1, 2, 4):
        made = run(what, threads=2, blocks=blocks)
        assert {step.slab_elements for step in made.plan.steps} == {blocks * BLOCK}
        assert_same_files(first, made)
    tight = build_plan(recipe_from_mapping(what), threads=2, slab_blocks=1).bill.peak_bytes
    for memory in (tight, 8 * tight):
        made = run(what, threads=2, memory=memory)
        assert made.plan.bill.peak_bytes <= memory
        assert_same_files(first, made)


@pytest.mark.parametrize(("method", "count"), [case for case in CASES if case[1] != 50])
def test_places_and_dates_change_no_byte_and_no_path_is_in_any_file(
    method, count, places, run, tmp_path, monkeypatch
):
    old, new = places[count], tmp_path / f"{SECRET}-moved"
    shutil.copytree(old, new)
    for path in new.iterdir():
        os.utime(path, (1_000_000_000, 1_000_000_000))
    first = run({"merge_method": method, **recipe(method, count, old)})
    moved = run({"merge_method": method, **recipe(method, count, new)})
    assert_same_files(first, moved)
    for name, content in models.contents(first.output).items():
        assert SECRET.encode() not in content, name

    content = {"merge_method": method, **recipe(method, count, None)}
    text = yaml.safe_dump(content, sort_keys=False, default_flow_style=None)
    (new / "recipe.yaml").write_text(text, encoding="utf-8")
    here = run(new / "recipe.yaml")
    monkeypatch.chdir(new)
    assert_same_files(here, run("recipe.yaml"))
    monkeypatch.chdir(tmp_path)
    assert_same_files(here, run(f"{new.name}/recipe.yaml"))
    assert_same_files(first, here)
