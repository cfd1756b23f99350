"""Inputs, options and surroundings that mean harm: a result or an error in words, no wreck."""

from __future__ import annotations

import json
import threading

import pytest
import torch
from bench_of_faults import RECIPE, WEIGHTS, Bench
from safetensors.torch import save_file

from merge_kit import api
from merge_kit.errors import CheckpointError, InterruptedRun, NonFiniteError
from merge_kit.io.component import read_weights
from merge_kit.io.reader import Reader

STACK = """\
merge_method: passthrough
slices:
  - sources: [{model: a, layer_range: [0, 2]}]
  - sources: [{model: b, layer_range: [0, 1]}]
"""


@pytest.fixture
def bench(tmp_path, monkeypatch, capsys) -> Bench:
    monkeypatch.chdir(tmp_path)
    return Bench(tmp_path, capsys)


# what a model says of itself ---------------------------------------------------------------------


@pytest.mark.parametrize("count", [0, -1, -(10**30)])
def test_a_config_without_layers_is_not_stacked(bench, count):
    config = json.loads((bench / "a/config.json").read_text())
    (bench / "a/config.json").write_text(json.dumps(config | {"num_hidden_layers": count}))
    bench.recipe(STACK)
    bench.refused(2, f"counts {count} layers, expected at least 1")


def test_two_tensors_of_one_name_are_refused_and_neither_is_lost(bench):
    for name in "ab":
        (bench / name / "unet").mkdir()
        save_file({"unet/x": torch.zeros(2), "y": torch.zeros(2)}, bench / name / WEIGHTS)
        save_file({"x": torch.ones(2)}, bench / name / "unet" / WEIGHTS)
    bench.refused(3, "a: tensor 'unet/x' is both in the root and in unet")


def test_rows_without_end_in_an_empty_tensor_take_no_memory(bench):
    text = json.dumps({"x": {"dtype": "F32", "shape": [0, 2**40], "data_offsets": [0, 0]}})
    for name in "ab":
        raw = len(text).to_bytes(8, "little") + text.encode()
        (bench / name / WEIGHTS).write_bytes(raw)
    bench.recipe(
        "merge_method: slerp\nbase_model: a\nmodels: [{model: b}]\n"
        "parameters: {t: 0.5, flatten: false}\n"
    )
    assert bench.merged("--memory", "300MB")["x"].shape == (0, 2**40)


# references --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("x" * 300, "File name too long"),
        ("x" * 5000, "File name too long"),
        ("~nobody-of-this-name/x", "Could not determine home directory"),
        ("a/" + WEIGHTS + "/x", "no folder or file"),
    ],
)
def test_a_reference_that_no_file_can_have_is_an_error_in_words(bench, name, part):
    bench.recipe(RECIPE.replace("model: b", f"model: {name}"))
    done = bench.refused(3, "recipe.yaml:4:13: ", part)
    assert len(done.err) < 1000


def test_only_what_may_be_an_id_of_the_hub_is_offered_as_one(bench):
    bench.recipe(RECIPE.replace("model: b", "model: org/name"))
    bench.refused(3, "hf download org/name --local-dir DIR")
    bench.recipe(RECIPE.replace("model: b", "model: $(reboot)"))
    assert "hf download" not in bench.refused(3, "'$(reboot)'").err


# options -----------------------------------------------------------------------------------------

NINES = "9" * 400
OPTIONS = {
    ("--memory", NINES): "is no size",
    ("--shard-size", NINES + "GB"): "is no size",
    ("--memory", "0"): "is no size",
    ("--memory", "-1GB"): "is no size",
    ("--memory", "\uff11GB"): "is no size",
    ("--memory", "1"): "the budget is 1 B",
    ("--threads", "0"): "--threads",
    ("--threads", "-1"): "--threads",
    ("--threads", "100000"): "expected 1 to 1024",
    ("--seed", "-1"): "the seed is -1",
    ("--seed", str(2**64)): "expected a whole number",
    ("--set", ""): "expected key=value",
    ("--set", "models.9.model=x"): "indices 0 to 1",
    ("--set", "models.0.parameters=&a [*a]"): "an alias within itself",
    ("--set", "models.0.parameters.weight=" + "[" * 50_000): "nested more than 64 levels deep",
}


@pytest.mark.parametrize("words", OPTIONS, ids=lambda words: " ".join(words)[:30])
def test_an_absurd_option_is_refused_in_few_words(bench, words):
    done = bench.run(*words)
    done.refuses(2, OPTIONS[words], hint=False)
    assert len(done.err) < 1500
    assert bench.left() == set()


def test_a_name_too_long_for_an_output_is_an_error_of_the_system(bench):
    for name in ("x" * 300, "x" * 250):  # the second is too long with .partial.lock
        bench.do("run", "recipe.yaml", "-o", name).refuses(4, "File name too long", "shorter name")
    assert bench.left() == set()


def test_a_record_that_is_not_there_is_named(bench):
    bench.do("verify", "nowhere/out").refuses(3, "nowhere/out: there is no merge_kit.json")


# threads -----------------------------------------------------------------------------------------


def start_at_most(monkeypatch, count):
    """Let the system start so many threads, and no more."""
    start, started = threading.Thread.start, []

    def limited(thread):
        if len(started) >= count:
            raise RuntimeError("can't start new thread")
        started.append(thread)
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", limited)


def test_a_run_makes_do_with_fewer_threads_than_asked_for(bench, monkeypatch):
    start_at_most(monkeypatch, 1)
    assert set(bench.merged("--threads", "4")["model.norm.weight"].tolist()) == {2.0}


def test_a_system_that_starts_no_thread_is_an_error_in_words(bench, monkeypatch):
    start_at_most(monkeypatch, 0)
    bench.refused(4, "starts no more threads", "ulimit -u")


# inputs that change ------------------------------------------------------------------------------


def test_nobody_gets_to_read_a_file_that_has_changed(bench):
    file = bench / "a" / WEIGHTS
    (planned,) = read_weights([(WEIGHTS, file)])
    file.write_bytes(file.read_bytes() + b"..")
    with Reader([planned]) as reader:
        for _ in range(2):  # the second worker must not find what the first one opened
            with pytest.raises(CheckpointError, match="changed since the plan was made"):
                reader.descriptor(file)


# NaN and a run that was stopped ------------------------------------------------------------------


@pytest.fixture
def stopped(bench) -> Bench:
    """Stop a run that may write NaN after it has written the one there is, in t00."""
    for name in "ab":
        tensors = {f"t{i:02}": torch.ones(3) for i in range(40)}
        tensors["t00"][1] = float("nan")
        save_file(tensors, bench / name / WEIGHTS)
    stop = threading.Event()

    def after_three(progress):
        if progress.tensor == "t02":
            stop.set()

    with pytest.raises(InterruptedRun):
        api.merge(
            "recipe.yaml",
            "out",
            allow_nonfinite=True,
            threads=1,
            on_progress=after_three,
            stop=stop,
        )
    assert (bench / "out.partial").exists()
    return bench


def test_a_nan_that_was_allowed_once_is_not_allowed_when_the_run_goes_on(stopped):
    with pytest.raises(NonFiniteError, match="t00: 2 NaN or infinite values"):
        api.merge("recipe.yaml", "out", threads=1)
    assert not (stopped / "out").exists()


def test_a_nan_stands_in_card_and_record_of_a_run_that_went_on(stopped):
    resumed = api.merge("recipe.yaml", "out", allow_nonfinite=True)
    clean = api.merge("recipe.yaml", "clean", allow_nonfinite=True)
    assert resumed.report.resumed > 0
    assert resumed.report.nonfinite == clean.report.nonfinite == {"t00": 1}
    for name in ("README.md", "merge_kit.json", WEIGHTS):
        assert (stopped / "out" / name).read_bytes() == (stopped / "clean" / name).read_bytes()
