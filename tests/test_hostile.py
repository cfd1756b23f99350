"""Models, options and names that mean harm: a result or an error in words, no wreck."""

from __future__ import annotations

import json
import math
import os
import threading
import time
from pathlib import Path

import pytest
import torch
from bench_of_faults import RECIPE, WEIGHTS, Bench
from safetensors.torch import save_file

from merge_kit import api
from merge_kit.errors import CheckpointError, InterruptedRun, NonFiniteError
from merge_kit.io.component import read_weights
from merge_kit.io.reader import Reader
from merge_kit.plan.process import process_bytes

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
    budget = str(process_bytes() + 50_000_000)
    assert bench.merged("--memory", budget)["x"].shape == (0, 2**40)


@pytest.mark.parametrize("types", [[{}, {}], [[], []], [None, 1], [1.5, "x"]])
def test_layer_types_of_any_kind_are_no_traceback(bench, types):
    config = json.loads((bench / "a/config.json").read_text())
    (bench / "a/config.json").write_text(json.dumps(config | {"layer_types": types}))
    bench.recipe(STACK)
    assert bench.do("plan", "recipe.yaml").code in {0, 2, 3}


def in_few_seconds(bench, code, *parts):
    """Check that a recipe is refused soon, on the slowest machine too."""
    begun = time.monotonic()
    bench.refused(code, *parts)
    assert time.monotonic() - begun < 60  # not without end


def test_a_config_cannot_keep_the_reader_busy(bench):
    keys = ",".join(f'"k{i}":1' for i in range(100_000))
    (bench / "a/config.json").write_text(f'{{{keys},"k99999":2}}')
    in_few_seconds(bench, 3, "input-1:a/config.json: key 'k99999' appears twice")


def test_a_config_cannot_keep_the_editor_busy(bench):
    parts = {f"x{i}_config": {"dtype": "float16"} for i in range(5000)}
    (bench / "a/config.json").write_text(json.dumps(parts))
    bench.recipe(RECIPE + "dtype: bfloat16\n")
    in_few_seconds(bench, 3, "5,000 values would have to be changed")


def test_a_tokenizer_of_gigabytes_is_not_read(bench):
    for name in "ab":
        (bench / name / "tokenizer.json").write_text("{}")
    os.truncate(bench / "b/tokenizer.json", 1 << 40)
    in_few_seconds(bench, 3, "b/tokenizer.json: holds 1099511627776 bytes")


def test_a_broken_tokenizer_is_said_to_be_one_of_two(bench):
    for name, text in (("a", "{}"), ("b", "{")):
        (bench / name / "tokenizer.json").write_text(text)
    bench.refused(3, "tokenizer.json", "of input-1:a or input-2:b: ")


# what lies in a model's folder -------------------------------------------------------------------


def pipe(path):
    path.unlink(missing_ok=True)
    os.mkfifo(path)


def to_itself(path):
    path.unlink(missing_ok=True)
    path.symlink_to(path.name)


def endless(path):
    path.unlink(missing_ok=True)
    path.symlink_to("/dev/zero")


@pytest.mark.parametrize("name", ["config.json", WEIGHTS, WEIGHTS + ".index.json"])
@pytest.mark.parametrize("fault", [pipe, to_itself, endless])
def test_what_is_no_file_is_refused_unopened(bench, name, fault):
    fault(bench / "a" / name)
    bench.refused(3, f"a/{name}: is ", "expected a file inside the model's folder")


def test_a_file_beside_the_weights_that_cannot_be_read_is_refused_by_the_plan(bench, monkeypatch):
    (bench / "a/notes.txt").write_text("mine")
    monkeypatch.setattr(os, "access", lambda path, mode: not str(path).endswith("notes.txt"))
    bench.do("plan", "recipe.yaml").refuses(3, "a/notes.txt: cannot be read", "permissions")


STRANGE = [b"new\nline.json", b"not-utf8-\xff.json", b"folder-\xff/x.json", b"\x1b[31m.txt"]
PLAIN = {"a/b/c/d/e/f.txt", "README.md/x", "merge_kit.json/x", ".merge_kit/journal.jsonl", ".git/x"}


def test_no_name_in_a_folder_breaks_or_enters_an_output(bench):
    for name in (*STRANGE, *(name.encode() for name in PLAIN)):
        path = Path(os.fsdecode(os.fsencode(bench / "a") + b"/" + name))
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("{}")
    for name in ("TOKENIZER.json", "tokenizer.json", "CONFIG.JSON"):  # two of them one on a Mac
        (bench / "a" / name).write_text("{}")
    bench.merged()
    files = {str(p.relative_to(bench / "out")) for p in (bench / "out").rglob("*") if p.is_file()}
    own = {"README.md", "merge_kit.json", "config.json", WEIGHTS}
    assert files == own | {"TOKENIZER.json", "tokenizer.json", "CONFIG.JSON"}
    assert bench.do("verify", "out").code == 0


@pytest.mark.parametrize("name", ["b\nhint: run rm", "b`|<x>", "- b", "b\u202ex"])
def test_a_strange_name_of_a_model_stays_a_name(bench, name):
    (bench / "b").rename(bench / name)
    bench.known(name)
    bench.recipe(RECIPE.replace("model: b", f"model: {json.dumps(name)}"))
    bench.merged()
    assert bench.do("verify", "out").code == 0
    assert bench.left() == {"out"}


TENSORS = ["", "a/b", "../../x", "/etc/x", "a\\b", "x" * 10_000, "-1", "0", "layers.0", "\u0663.w"]


def test_names_of_tensors_are_names_and_nothing_else(bench):
    for name, value in (("a", 1.0), ("b", 3.0)):
        save_file({t: torch.full((2,), value) for t in TENSORS}, bench / name / WEIGHTS)
    merged = bench.merged()
    assert set(merged) == set(TENSORS)
    assert all(tensor.tolist() == [2.0, 2.0] for tensor in merged.values())
    assert bench.left() == {"out"}


@pytest.mark.parametrize("name", ["a\nb", "a\x00b", "\x1b[31m", "\u2028"])
def test_a_tensor_whose_name_writes_to_the_terminal_is_refused(bench, name):
    save_file({name: torch.ones(2)}, bench / "a" / WEIGHTS)
    done = bench.refused(3, f"a/{WEIGHTS}: tensor name ", "holds a control character")
    assert name not in done.err


@pytest.mark.parametrize("shape", [[], [0], [0, 2**40], [1] * 2000, [3, 0, 5]])
def test_odd_shapes_are_merged(bench, shape):
    count = math.prod(shape)
    text = json.dumps({"x": {"dtype": "F32", "shape": shape, "data_offsets": [0, 4 * count]}})
    for name in "ab":
        raw = len(text).to_bytes(8, "little") + text.encode() + b"\0" * 4 * count
        (bench / name / WEIGHTS).write_bytes(raw)
    assert list(bench.merged()["x"].shape) == shape


def test_a_folder_of_thousands_of_files_keeps_them_all(bench):
    for i in range(1000):
        (bench / "a" / f"f{i}.txt").write_text(str(i))
    bench.merged()
    assert (bench / "out/f999.txt").read_text() == "999"


def test_fifty_models_are_averaged(bench):
    for i in range(50):
        (bench / f"m{i}").mkdir()
        save_file({"x": torch.full((3,), float(i))}, bench / f"m{i}" / WEIGHTS)
    models = "".join(f"- {{model: m{i}, parameters: {{weight: 1}}}}\n" for i in range(50))
    bench.recipe("merge_method: linear\nmodels:\n" + models)
    assert bench.merged()["x"].tolist() == [24.5] * 3


# references -------------------------------------------------------------------------------------


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


def test_a_hint_does_not_list_thousands_of_names(bench):
    for name in "ab":
        save_file({f"t{i}": torch.ones(1) for i in range(3000)}, bench / name / WEIGHTS)
    bench.recipe("base_model: a\ntensors: [{match: nowhere*, copy: b}]\n")
    done = bench.refused(2, "no tensor is left for 'nowhere*'", " and 2,960 more")
    assert len(done.err) < 1000


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


# inputs that change ------------------------------------------------------------------------------


def test_nobody_gets_to_read_a_file_that_has_changed(bench):
    file = bench / "a" / WEIGHTS
    (planned,) = read_weights([(WEIGHTS, file)])
    file.write_bytes(file.read_bytes() + b"..")
    with Reader([planned]) as reader:
        for _ in range(2):  # the second worker must not find what the first one opened
            with pytest.raises(CheckpointError, match="changed since the plan was made"):
                reader.descriptor(file)


def stop_at(name):
    """Return what stops a run when it has done a tensor, as arguments."""
    stop = threading.Event()

    def after(progress):
        if progress.tensor == name:
            stop.set()

    return {"on_progress": after, "stop": stop, "threads": 1}


def test_a_run_does_not_go_on_with_another_model_of_the_same_size_and_time(bench):
    for name, value in (("a", 1.0), ("b", 3.0), ("c", 101.0)):
        (bench / name).mkdir(exist_ok=True)
        save_file({f"t{i}": torch.full((3,), value) for i in range(9)}, bench / name / WEIGHTS)
        os.utime(bench / name / WEIGHTS, (0, 0))  # as archives and images unpack them
    with pytest.raises(InterruptedRun):
        api.merge("recipe.yaml", "out", **stop_at("t4"))
    (bench / "a").rename(bench / "old")
    (bench / "c").rename(bench / "a")
    merged = bench.merged()
    assert {float(tensor[0]) for tensor in merged.values()} == {52.0}


def test_a_name_of_unfinished_work_is_no_name_of_an_output(bench):
    for name in ("out.partial", "x/out.partial/", "out.partial.lock"):
        done = bench.do("run", "recipe.yaml", "-o", name, "--overwrite")
        done.refuses(2, "has the name of an unfinished output")
    assert bench.left() == set()


# NaN and a run that was stopped ------------------------------------------------------------------


@pytest.fixture
def stopped(bench) -> Bench:
    """Stop a run that may write NaN after it has written the one there is, in t00."""
    for name in "ab":
        tensors = {f"t{i:02}": torch.ones(3) for i in range(40)}
        tensors["t00"][1] = float("nan")
        save_file(tensors, bench / name / WEIGHTS)
    with pytest.raises(InterruptedRun):
        api.merge("recipe.yaml", "out", allow_nonfinite=True, **stop_at("t02"))
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
