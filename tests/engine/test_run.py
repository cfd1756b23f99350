"""A run: what it writes, what stops it, and how the next one goes on."""

from __future__ import annotations

import json
import os
import resource
import threading
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import xxhash
from safetensors.torch import load_file

from merge_kit.core.tensors import BLOCK
from merge_kit.engine import pool
from merge_kit.engine.run import run_plan
from merge_kit.errors import (
    CheckpointError,
    InterruptedRun,
    MismatchError,
    NonFiniteError,
    OutputError,
)
from merge_kit.methods.base import PerModel
from merge_kit.methods.linear import Linear
from merge_kit.methods.passthrough import Passthrough
from merge_kit.methods.rounding import round_into
from merge_kit.plan.values import Step
from tests.engine.handmade import plan, plan_input, run, step, stored

HALF = Linear(weight=PerModel((1.0, 1.0)))
GENERATOR = torch.Generator().manual_seed(5)


def normal(*shape, dtype=torch.float32):
    return torch.randn(*shape, generator=GENERATOR).to(dtype)


def copy_step(source, dtype, name="x") -> Step:
    made = step(Passthrough(), [source], dtype=dtype, name=name)
    return replace(made, action="copy", method=None)


def mean_step(folder, tensors, *, dtype="F32", name="x"):
    sources = [stored(folder, f"{name}-{i}", t) for i, t in enumerate(tensors)]
    return step(HALF, sources, dtype=dtype, name=name)


@pytest.mark.parametrize("target", [torch.bfloat16, torch.float16])
def test_float64_is_rounded_once(target):
    exact = torch.tensor([1.0, 1.5, -3.25, 30_000.0, 1e-8], dtype=torch.float64)
    steps = torch.tensor([0.0, 2.0**-8, -(2.0**-8), 2.0**-11, -(2.0**-11)], dtype=torch.float64)
    tiny = torch.tensor([0.0, 2.0**-40, -(2.0**-40)], dtype=torch.float64)
    values = (exact[:, None] * (1 + steps)[None]).flatten()[:, None] * (1 + tiny)[None]
    values = values.flatten()
    out = torch.empty(len(values), dtype=target)
    round_into(values, out)
    bits = {torch.bfloat16: 7, torch.float16: 10}[target]
    for value, got in zip(values.tolist(), out.double().tolist(), strict=True):
        if abs(value) < 6.2e-5 and target == torch.float16:
            quantum = 2.0**-24
        else:
            quantum = 2.0 ** (np.frexp(value)[1] - 1 - bits)
        low = np.floor(value / quantum)
        rest = value / quantum - low
        up = rest > 0.5 or (rest == 0.5 and low % 2 == 1)
        assert got == (low + up) * quantum


def test_nan_and_infinity_survive_rounding():
    values = torch.tensor([float("nan"), float("inf"), -float("inf"), 1e300], dtype=torch.float64)
    out = torch.empty(4, dtype=torch.bfloat16)
    round_into(values, out)
    assert out.isnan().tolist() == [True, False, False, False]
    assert out[1:].tolist() == [float("inf"), -float("inf"), float("inf")]


def test_copies_are_the_same_bytes_with_and_without_the_kernel(tmp_path):
    x = torch.randint(0, 255, (3_000_001,), generator=GENERATOR, dtype=torch.uint8)
    steps = [copy_step(stored(tmp_path, "x", x), "U8")]
    for kernel_copy in (True, False):
        result = run(steps, tmp_path / str(kernel_copy), kernel_copy=kernel_copy)
        assert torch.equal(result["x"], x)


def test_a_system_without_kernel_copies_falls_back(tmp_path, monkeypatch):
    def refuse(*args, **kwargs):
        raise OSError(18, "Invalid cross-device link")

    monkeypatch.setattr(os, "copy_file_range", refuse)
    x = normal(2, BLOCK + 3)
    result = run([copy_step(stored(tmp_path, "x", x), "F32")], tmp_path / "out")
    assert torch.equal(result["x"], x)


def test_hashes_are_over_digests_of_blocks(tmp_path):
    x = normal(2, BLOCK)
    one = plan([copy_step(stored(tmp_path, "x", x), "F32")])
    (tmp_path / "out").mkdir()
    report = run_plan(one, tmp_path / "out")
    raw, step_bytes = x.numpy().tobytes(), 4 * BLOCK
    joined = b"".join(
        xxhash.xxh3_128_digest(raw[i : i + step_bytes]) for i in range(0, len(raw), step_bytes)
    )
    assert report.hashes == {"x": xxhash.xxh3_128_hexdigest(joined)}


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_value_that_is_not_finite_names_model_tensor_and_count(tmp_path, bad):
    a, b = normal(3 * BLOCK), normal(3 * BLOCK)
    b[2 * BLOCK + 5] = b[7] = bad
    with pytest.raises(NonFiniteError) as caught:
        run([mean_step(tmp_path, [a, b], name="w")], tmp_path / "out")
    assert str(caught.value).startswith("w: 2 NaN or infinite values in the inputs: 2 in input-2")


def test_values_too_large_for_the_output_are_refused_or_counted(tmp_path):
    a = torch.tensor([65504.0, 1.0]).half()
    sources = [stored(tmp_path, "a", a), stored(tmp_path, "b", a)]
    add = Linear(weight=PerModel((1.0, 1.0)), normalize=False)
    one = step(add, sources, dtype="F16")
    with pytest.raises(NonFiniteError, match="too large for F16"):
        run([one], tmp_path / "out")
    (tmp_path / "allowed").mkdir()
    report = run_plan(plan([one]), tmp_path / "allowed", allow_nonfinite=True)
    assert report.saturated == {"x": 1}
    assert report.nonfinite == {}


def test_large_finite_values_are_no_problem(tmp_path):
    a = torch.full((BLOCK,), 3e38)
    result = run([mean_step(tmp_path, [a, a])], tmp_path / "out")
    assert torch.equal(result["x"], a)


def test_integers_that_differ_stop_the_run_before_anything_is_written(tmp_path):
    a, b = torch.arange(4), torch.arange(4)
    b[3] = 9
    first, second = stored(tmp_path, "a", a), stored(tmp_path, "b", b)
    one = copy_step(first, "I64")
    one = replace(one, agree=(second,), agree_models=("input-2",))
    with pytest.raises(MismatchError, match="differ between input-1 and input-2"):
        run([mean_step(tmp_path, [normal(5), normal(5)], name="w"), one], tmp_path / "out")
    journal = (tmp_path / "out/.merge_kit/journal.jsonl").read_text()
    assert journal == ""


def test_empty_and_0d_tensors_merge(tmp_path):
    steps = [
        mean_step(tmp_path, [torch.zeros(0, 4), torch.zeros(0, 4)], name="empty"),
        mean_step(tmp_path, [torch.tensor(1.0), torch.tensor(2.0)], name="scalar"),
    ]
    result = run(steps, tmp_path / "out")
    assert result["empty"].shape == (0, 4)
    assert result["scalar"] == 1.5


def test_a_truncated_input_is_an_error_not_a_signal(tmp_path):
    a, b = normal(BLOCK), normal(BLOCK)
    one = mean_step(tmp_path, [a, b])
    path = tmp_path / "x-1.safetensors"
    os.truncate(path, path.stat().st_size - 8)
    with pytest.raises(CheckpointError, match="ends at byte"):
        run([one], tmp_path / "out")


def test_an_input_that_changed_since_the_plan_is_refused(tmp_path):
    one = mean_step(tmp_path, [normal(9), normal(9)])
    path = tmp_path / "x-1.safetensors"
    inputs = [plan_input(path)]
    os.utime(path, ns=(1, 1))
    with pytest.raises(CheckpointError, match="changed since the plan was made"):
        run([one], tmp_path / "out", inputs=inputs)


def test_an_input_that_changes_while_it_is_read_is_refused(tmp_path):
    one = mean_step(tmp_path, [normal(9), normal(9)])
    path = tmp_path / "x-1.safetensors"
    made = plan([one], inputs=[plan_input(path)])
    (tmp_path / "out").mkdir()
    with pytest.raises(CheckpointError, match="changed since the plan was made"):
        run_plan(made, tmp_path / "out", on_progress=lambda _: os.utime(path, ns=(1, 1)))


def many(tmp_path, count=40):
    return [mean_step(tmp_path, [normal(50), normal(50)], name=f"t{i}") for i in range(count)]


def test_a_run_that_was_stopped_goes_on_from_its_journal(tmp_path):
    steps, stop = many(tmp_path), threading.Event()
    made = plan(steps)
    clean, broken = tmp_path / "clean", tmp_path / "broken"
    clean.mkdir()
    broken.mkdir()
    wanted = run_plan(made, clean)
    seen = Counter()

    def after_ten(progress):
        seen[progress.tensor] += 1
        if len(seen) == 10:
            stop.set()

    with pytest.raises(InterruptedRun):
        run_plan(made, broken, on_progress=after_ten, stop=stop)
    report = run_plan(made, broken)
    assert 0 < report.resumed < 40
    assert report.hashes == wanted.hashes
    one, other = (p / "model.safetensors" for p in (clean, broken))
    assert one.read_bytes() == other.read_bytes()


def test_a_finished_step_whose_bytes_changed_is_done_again(tmp_path):
    made, out = plan(many(tmp_path, 3)), tmp_path / "out"
    out.mkdir()
    run_plan(made, out)
    path = out / "model.safetensors"
    wanted = path.read_bytes()
    target = made.steps[1].outputs[0]
    with path.open("r+b") as file:
        file.seek(target.offset)
        file.write(b"\xff\xff\xff\x7f")
    with (out / ".merge_kit/journal.jsonl").open("a") as journal:
        journal.write('{"step": 2, "ha')  # a line that a crash tore
    assert run_plan(made, out).resumed == 2
    assert path.read_bytes() == wanted


def test_the_journal_is_whole_lines_after_a_torn_one(tmp_path):
    made, out = plan(many(tmp_path, 3)), tmp_path / "out"
    (out / ".merge_kit").mkdir(parents=True)
    journal = out / ".merge_kit/journal.jsonl"
    journal.write_text('{"step": 0')
    run_plan(made, out)
    lines = journal.read_text().splitlines()
    assert lines[0] == '{"step": 0'
    assert sorted(json.loads(line)["step"] for line in lines[1:]) == [0, 1, 2]


def test_a_disk_that_is_full_is_an_output_error(tmp_path, monkeypatch):
    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(OutputError, match="No space left") as caught:
        run([mean_step(tmp_path, [normal(9), normal(9)])], tmp_path / "out")
    assert caught.value.code() == 4


def test_progress_ends_at_the_total(tmp_path):
    events = []
    (tmp_path / "out").mkdir()
    made = plan(many(tmp_path, 5))
    run_plan(made, tmp_path / "out", on_progress=events.append)
    assert events[-1].done_bytes == events[-1].total_bytes == made.bill.written_bytes


def test_torch_threads_are_given_back(tmp_path):
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        run(many(tmp_path, 2), tmp_path / "out")
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def test_the_first_error_of_a_pool_is_raised_after_all_threads_ended():
    order = []

    def slow(work):
        time.sleep(0.05)
        order.append("slow")
        return ()

    def broken(work):
        raise ValueError("broken")

    with pytest.raises(ValueError, match="broken"):
        pool.Pool(2, threading.Event()).run([slow, broken, slow, slow])
    assert order == ["slow"]
    assert not [t for t in threading.enumerate() if t.name.startswith("merge-")]


def test_what_a_task_leads_to_goes_first():
    order = []

    def parent(work):
        order.append("parent")
        return [lambda w: order.append("child 1") or (), lambda w: order.append("child 2") or ()]

    def last(work):
        order.append("last")
        return ()

    pool.Pool(1, threading.Event()).run([parent, last])
    assert order == ["parent", "child 1", "child 2", "last"]


def test_written_files_load_with_safetensors(tmp_path):
    run(many(tmp_path, 3), tmp_path / "out")
    assert set(load_file(tmp_path / "out/model.safetensors")) == {"t0", "t1", "t2"}


def test_more_files_than_the_soft_limit_are_opened(tmp_path):
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    sources = [stored(tmp_path, f"m{i}", normal(3)) for i in range(120)]
    paths = [tmp_path / f"m{i}.safetensors" for i in range(120)]
    mean = Linear(weight=PerModel([1.0] * 120))
    one = step(mean, sources, compute="F64")
    few = len(list(Path("/proc/self/fd").iterdir())) + 60
    resource.setrlimit(resource.RLIMIT_NOFILE, (few, hard))
    try:
        result = run([one], tmp_path / "out", inputs=[plan_input(p) for p in paths])
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert result["x"].shape == (3,)
