"""Rows 1 to 21 and 27 to 31 of the table of bad inputs and faults, through the command line.

Each row ends with its exit code and a message that names what is wrong and what to do; nothing
that looks like an output is left. Adapters and the Hub have tests of their own.
"""

from __future__ import annotations

import json
import os
import pickle
import resource
from functools import partial
from pathlib import Path

import pytest
import torch
from bench_of_faults import RECIPE, WEIGHTS, Bench, edit_header
from safetensors.torch import load_file, save_file

from merge_kit.engine.run import peak_bytes
from merge_kit.plan.process import process_bytes

FIRST, SECOND = (f"model-0000{i}-of-00002.safetensors" for i in (1, 2))
INDEX = "model.safetensors.index.json"


@pytest.fixture
def bench(tmp_path, monkeypatch, capsys) -> Bench:
    monkeypatch.chdir(tmp_path)
    return Bench(tmp_path, capsys)


@pytest.fixture
def shards(bench) -> Path:
    """Return the folder of model b, made of two shards: x (8 bytes) and y (16), then z (8)."""
    for name in ("a", "b"):
        (bench / name / WEIGHTS).unlink()
        save_file({"x": torch.zeros(2), "y": torch.zeros(4)}, bench / name / FIRST)
        save_file({"z": torch.ones(2)}, bench / name / SECOND)
        index(bench / name, {"x": FIRST, "y": FIRST, "z": SECOND}, {"total_size": 32})
    return bench / "b"


def index(folder: Path, weight_map: dict[str, str], metadata: dict | None) -> None:
    content = {"weight_map": weight_map} | ({} if metadata is None else {"metadata": metadata})
    (folder / INDEX).write_text(json.dumps(content))


# rows 1 to 7: one file ---------------------------------------------------------------------------

LM_HEAD, EMBED = "lm_head.weight", "model.embed_tokens.weight"


def entry(**change):
    """Return an edit of the header's entry of lm_head.weight (F32, [4], bytes 0 to 16)."""
    return partial(edit_header, change=lambda h: h | {LM_HEAD: h[LM_HEAD] | change})


def header(text: bytes):
    return partial(edit_header, change=lambda _: text)


def twice(file):
    edit_header(file, lambda h: json.dumps(h)[:-1].encode() + b', "lm_head.weight": {}}')


def cut(file):
    os.truncate(file, file.stat().st_size - 3)


def trailing(file):
    file.write_bytes(file.read_bytes() + b"..")


def long_header(length):
    def fault(file):
        file.write_bytes(length.to_bytes(8, "little") + file.read_bytes()[8:])

    return fault


FILES = {
    "1 truncated": (cut, ["truncated: expected ", " bytes, found "]),
    "1 empty": (lambda file: os.truncate(file, 0), ["holds 0 bytes"]),
    "2 length of 2^40": (long_header(1 << 40), ["1099511627776 bytes"]),
    "2 length above 100 MB": (long_header(100_000_001), ["100000001 bytes", "100000000"]),
    "3 overlap": (
        partial(edit_header, change=lambda h: h | {EMBED: h[EMBED] | {"data_offsets": [8, 24]}}),
        [f"8 bytes are shared by tensor '{LM_HEAD}' and tensor '{EMBED}'"],
    ),
    "3 hole": (
        partial(edit_header, change=lambda h: {k: v for k, v in h.items() if k != LM_HEAD}),
        ["16 bytes between the header and tensor"],
    ),
    "3 trailing": (trailing, ["trailing bytes after tensor '", "found "]),
    "4 twice": (twice, [f"key '{LM_HEAD}' appears twice"]),
    "5 unknown dtype": (entry(dtype="F33"), [LM_HEAD, "dtype is 'F33'"]),
    "6 overflow": (entry(shape=[2**62, 2**62]), [LM_HEAD, "overflows"]),
    "6 negative": (entry(shape=[-4]), [LM_HEAD, "shape is [-4]"]),
    "6 bool": (entry(shape=[4, True]), [LM_HEAD, "shape is [4, True]"]),
    "6 float": (entry(shape=[4.0]), [LM_HEAD, "shape is [4.0]"]),
    "7 not UTF-8": (header(b'{"\xff": 1}'), ["header is not UTF-8"]),
    "7 list": (header(b"[1]"), ["header starts with"]),
    "7 nested": (header(b'{"a":' + b"[" * 200_000), ["nested too deeply"]),
}


@pytest.mark.parametrize("row", FILES)
def test_a_broken_file_is_refused_with_its_name(bench, row):
    fault, parts = FILES[row]
    fault(bench / "b" / WEIGHTS)
    bench.refused(3, f"b/{WEIGHTS}", *parts)


def test_row_2_a_length_bomb_takes_no_memory(bench):
    long_header(1 << 40)(bench / "b" / WEIGHTS)
    before = peak_bytes()
    bench.refused(3, "1099511627776")
    assert peak_bytes() - before < 20_000_000


def scaled(bits_and_dtype):
    dtype, nbytes = bits_and_dtype
    entries = {"x": {"dtype": dtype, "shape": [8], "data_offsets": [0, nbytes]}}
    text = json.dumps(entries).encode()
    return len(text).to_bytes(8, "little") + text + b"\x11" * nbytes


@pytest.mark.parametrize("kind", [("F6_E2M3", 6), ("F4", 4), ("F8_E4M3", 8)])
def test_row_5_values_without_scales_are_copied_but_not_merged(bench, kind):
    for name in "ab":
        (bench / name / WEIGHTS).write_bytes(scaled(kind))
    bench.refused(3, "x: ", kind[0], "scales", "convert", "passthrough can copy")
    bench.recipe("merge_method: passthrough\nmodels: [{model: b}]\n")
    assert bench.run().code == 0
    assert (bench / "out" / WEIGHTS).read_bytes().endswith(b"\x11" * kind[1])


# rows 8 to 11: shards and their index ------------------------------------------------------------


def index_names(shard):
    return lambda folder: index(folder, {"x": shard, "y": FIRST, "z": SECOND}, None)


def leaving_link(folder):
    (folder / FIRST).rename(folder.parent / FIRST)
    (folder / FIRST).symlink_to(f"../{FIRST}")


def in_two_shards(folder):
    save_file({"x": torch.zeros(2), "z": torch.ones(2)}, folder / SECOND)


def not_in_the_index(folder):
    index(folder, {"x": FIRST, "z": SECOND}, None)


SHARDS = {
    "8 parent": (index_names(f"../{FIRST}"), [INDEX, f"../{FIRST}", "outside the model's folder"]),
    "8 absolute": (index_names(f"/{FIRST}"), [INDEX, "outside the model's folder"]),
    "8 link": (leaving_link, [FIRST, "a link that leaves the folder"]),
    "9 no shard": (lambda folder: (folder / SECOND).unlink(), [INDEX, "1 of its 2", SECOND]),
    "9 not in its shard": (
        lambda folder: save_file({"w": torch.ones(2)}, folder / SECOND),
        [INDEX, f"1 tensors are not in the shard it names: z ({SECOND})"],
    ),
    "9 not in the index": (not_in_the_index, [INDEX, f"not in the index: y ({FIRST})"]),
    "10 in two shards": (in_two_shards, ["b: ", f"in two shards: x ({FIRST} and {SECOND})"]),
}


@pytest.mark.parametrize("row", SHARDS)
def test_shards_that_do_not_fit_are_refused(bench, shards, row):
    fault, parts = SHARDS[row]
    fault(shards)
    bench.known(FIRST)
    bench.refused(3, *parts)


def test_row_8_links_into_the_cache_of_the_hub_are_followed(bench):
    snapshot = bench / "models--org--b/snapshots/abc"
    blobs = snapshot.parent.parent / "blobs"
    for folder in (snapshot, blobs):
        folder.mkdir(parents=True)
    for file in (WEIGHTS, "config.json"):
        (bench / "b" / file).rename(blobs / file)
        (snapshot / file).symlink_to(f"../../blobs/{file}")
    bench.recipe(RECIPE.replace("model: b", f"model: {snapshot}"))
    assert set(bench.merged()[LM_HEAD].tolist()) == {2.0}


def test_row_9_the_first_five_tensors_are_named(bench):
    names = [f"t{i}" for i in range(7)]
    save_file({name: torch.zeros(1) for name in names}, bench / "b" / WEIGHTS)
    index(bench / "b", {"t6": WEIGHTS}, None)
    done = bench.refused(3, "6 tensors of the shards are not in the index", "t4", ", ...")
    assert "t5" not in done.err


@pytest.mark.parametrize(
    ("metadata", "note"),
    [(None, "states no metadata.total_size"), ({"total_size": 33}, "the shards hold 32")],
)
def test_row_11_a_wrong_size_in_the_index_is_a_note(bench, shards, metadata, note):
    index(shards, {"x": FIRST, "y": FIRST, "z": SECOND}, metadata)
    done = bench.run()
    assert done.code == 0
    assert note in " ".join(done.out.split())
    assert sum(p.stat().st_size for p in (bench / "out").glob("*.safetensors")) > 32


# rows 12 to 16: values, shapes, names ------------------------------------------------------------


def test_row_12_a_nan_of_an_input_is_refused_or_counted(bench):
    tensors = {"x": torch.ones(6), "y": torch.ones(3)}
    save_file(tensors, bench / "a" / WEIGHTS)
    tensors["x"][2], tensors["x"][4] = float("nan"), float("inf")
    save_file(tensors, bench / "b" / WEIGHTS)
    found = ["x: 2 NaN or infinite values", "2 in input-2:b", "--allow-nonfinite"]
    bench.refused(3, *found, words=("--threads", "1"))
    done = bench.run("--allow-nonfinite")
    assert done.code == 0
    assert "warning: 2 NaN or infinities in 1 tensor, the first is x" in done.err
    assert "**2 values are NaN or infinite**, in `x`" in (bench / "out/README.md").read_text()
    assert json.loads((bench / "out/merge_kit.json").read_text())["nonfinite"] == {"x": 2}


def test_row_13_what_the_output_dtype_cannot_hold_is_refused_or_counted(bench):
    for name in "ab":
        half = torch.full((3,), 65504.0, dtype=torch.float16)
        save_file({"x": half}, bench / name / WEIGHTS)
    bench.recipe(RECIPE + "parameters: {normalize: false}\n")
    double = ("--set", "models.1.parameters.weight=1.5")
    bench.refused(3, "x: the merge makes 3 values", "too large for F16", words=double)
    done = bench.run(*double, "--allow-nonfinite")
    assert done.code == 0
    assert "warning: 3 values beyond the output dtype in 1 tensor" in done.err
    assert json.loads((bench / "out/merge_kit.json").read_text())["saturated"] == {"x": 3}


def test_row_14_shapes_that_differ_are_both_named(bench):
    save_file({"embed": torch.zeros(6, 4)}, bench / "a" / WEIGHTS)
    save_file({"embed": torch.zeros(8, 4)}, bench / "b" / WEIGHTS)
    bench.refused(3, "embed: input-1:a has shape [6, 4], input-2:b [8, 4]", "vocabularies")


def test_row_15_missing_tensors_are_listed(bench):
    tensors = {"embed": torch.zeros(2), "norm": torch.zeros(2)}
    save_file(tensors, bench / "a" / WEIGHTS)
    save_file({"embed": torch.zeros(2), "norn": torch.zeros(2)}, bench / "b" / WEIGHTS)
    done = bench.refused(3, "error: 2 problems", "input-2:b: lacks 1 tensors", "has: norm")
    assert "input-1:a: lacks 1 tensors that input-2:b has: norn" in done.err


def test_row_16_a_tied_head_is_its_embedding_and_a_note_says_so(bench):
    config = json.loads((bench / "b/config.json").read_text())
    (bench / "b/config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))
    matrices = {EMBED: torch.full((4, 4), 1.0), LM_HEAD: torch.full((4, 4), 2.0)}
    save_file(matrices, bench / "a" / WEIGHTS)
    save_file({EMBED: torch.full((4, 4), 5.0)}, bench / "b" / WEIGHTS)
    done = bench.run()
    assert done.code == 0, done.err
    assert "the tied head of input-2:b is its embedding" in " ".join(done.out.split())
    merged = load_file(bench / "out" / WEIGHTS)
    assert (float(merged[EMBED][0, 0]), float(merged[LM_HEAD][0, 0])) == (3.0, 3.5)
    assert not json.loads((bench / "out/config.json").read_text())["tie_word_embeddings"]


# rows 17 to 19: the recipe -----------------------------------------------------------------------

BOMB = "a0: &a0 [x, x]\n" + "".join(
    f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 9)
)
RECIPES = {
    "17 unknown key": (RECIPE + "out_dtyp: float16\n", ["recipe.yaml:5:1: ", "'out_dtype'?"]),
    "17 unknown parameter": (RECIPE.replace("weight", "wieght", 1), [":3:29: ", "'weight'?"]),
    "17 wrong type": (RECIPE.replace("0.5", "half", 1), [":3:37: ", "weight is 'half'"]),
    "17 unknown method": (RECIPE.replace("linear", "liner"), [":1:15: ", "'linear'"]),
    "18 duplicate key": (RECIPE + "models: []\n", ["recipe.yaml:5:1: ", "first in line 2"]),
    "18 tag": (RECIPE + "seed: !!python/object/apply:os.system [touch canary]\n", [":5:7: "]),
    "18 alias bomb": (RECIPE + BOMB, ["aliases expand to more than"]),
    "18 above 1 MB": (RECIPE + "#" * 1_000_000, ["recipe.yaml:1:1: ", "larger than 1 MB"]),
    "18 nested": (RECIPE + "seed: " + "[" * 100_000, [":5:", "nested more than"]),
    "18 not UTF-8": (RECIPE + "# \udcff", [":5:3: ", "0xFF"]),
    "19 weights sum to 0": (RECIPE.replace("0.5", "-0.5", 1), ["weight"]),
    "19 nan": (RECIPE.replace("0.5", ".nan", 1), [":3:37: ", "finite"]),
    "19 infinite": (RECIPE.replace("0.5", "1e999", 1), [":3:37: ", "finite"]),
    "19 empty list": ("merge_method: linear\nmodels: []\n", [":1:1: ", "models"]),
}


@pytest.mark.parametrize("row", RECIPES)
def test_a_wrong_recipe_is_refused_at_its_place(bench, row):
    text, parts = RECIPES[row]
    (bench / "recipe.yaml").write_bytes(text.encode("utf-8", "surrogateescape"))
    done = bench.run()
    done.refuses(2, *parts, hint=False)
    assert bench.left() == set()


# rows 20 and 21: code ----------------------------------------------------------------------------


class Canary:
    """Pickled, it makes a folder when it is opened."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "weights.ckpt"])
def test_row_20_a_pickle_is_refused_unopened(bench, name):
    (bench / "b" / WEIGHTS).unlink()
    (bench / "b" / name).write_bytes(pickle.dumps(Canary(bench / "canary")))
    bench.refused(3, f"b: holds pickled weights only ({name})", "mergekit convert b -o OUT")
    pickle.loads((bench / "b" / name).read_bytes())
    assert (bench / "canary").exists()  # it would have sung


def test_row_21_code_of_a_model_is_neither_run_nor_copied(bench):
    config = json.loads((bench / "a/config.json").read_text())
    config["auto_map"] = {"AutoModelForCausalLM": "modeling_x.Model"}
    (bench / "a/config.json").write_text(json.dumps(config))
    (bench / "a/modeling_x.py").write_text("import os\nos.mkdir('canary')\n")
    done = bench.child("run", "recipe.yaml", "-o", "out")
    assert done.code == 0, done.err
    assert "modeling_x.py is left out: code is not copied" in " ".join(done.out.split())
    assert bench.left() == {"out"}
    assert not list((bench / "out").rglob("*.py"))


# rows 27 to 29: the place of the output ----------------------------------------------------------


def test_row_27_an_output_with_something_in_it_is_kept_or_replaced_whole(bench):
    (bench / "out").mkdir()
    (bench / "out/mine.txt").write_text("mine")
    bench.known("out")
    bench.refused(2, "out: is there already and is not empty", "--overwrite")
    assert (bench / "out/mine.txt").read_text() == "mine"
    bench.merged("--overwrite")
    assert not (bench / "out/mine.txt").exists()
    assert bench.left() == set()


INPUTS = {
    "a": "a: is the input a",
    "b/": "b: is the input b",
    "a/sub/out": "a/sub/out: lies inside the input a",
    "link": "link: is the input a",
    "link/out": "link/out: lies inside the input a",
    ".": ".: holds the input a",
    "../": "holds the input a",
}


@pytest.mark.parametrize("place", INPUTS)
@pytest.mark.parametrize("more", [(), ("--overwrite",)])
def test_row_27_no_input_is_touched(bench, place, more):
    (bench / "link").symlink_to("a")
    bench.known("link")
    before = {path: path.stat().st_mtime_ns for path in bench.folder.rglob("*")}
    bench.do("run", "recipe.yaml", "-o", place, *more).refuses(2, INPUTS[place], "never touched")
    assert {path: path.stat().st_mtime_ns for path in bench.folder.rglob("*")} == before


@pytest.mark.parametrize("place", ["a.txt/out", "/proc/out", "/sys/out", "/dev/null"])
def test_row_28_a_place_that_cannot_be_written_is_refused_before_weights_are_read(
    bench, monkeypatch, place
):
    (bench / "a.txt").write_text("")
    bench.known("a.txt")
    monkeypatch.setattr("merge_kit.engine.run.run_plan", None)
    done = bench.do("run", "recipe.yaml", "-o", place)
    done.refuses(4)
    assert bench.left() == set()


def test_row_28_a_parent_that_is_missing_is_made(bench):
    assert bench.do("run", "recipe.yaml", "-o", "deep/er/out").code == 0
    assert (bench / "deep/er/out" / WEIGHTS).exists()


def test_row_29_the_second_of_two_runs_is_refused_by_the_number_of_the_first(bench):
    for name in "ab":  # as many tensors as their progress needs to fill the pipe
        save_file({f"t{i:04}": torch.ones(2) for i in range(1500)}, bench / name / WEIGHTS)
    with bench.start("run", "recipe.yaml", "-o", "out", "--json-progress") as first:
        first.stdout.readline()
        bench.known("out.partial", "out.partial.lock")
        bench.refused(4, f"out: is locked by process {first.pid}", "another folder")
        assert len(first.stdout.readlines()) == 1500
    assert first.returncode == 0
    assert bench.left() == {"out"}


# rows 30 and 31: inputs that change, memory ------------------------------------------------------


def changed(file):
    raw = file.read_bytes()
    file.write_bytes(raw[:-1] + bytes([raw[-1] ^ 1]))


@pytest.mark.parametrize(
    ("fault", "part"), [(cut, "changed since the plan was made"), (changed, "changed since")]
)
def test_row_30_an_input_that_changes_after_the_plan_is_refused(bench, monkeypatch, fault, part):
    from merge_kit.engine import run as engine  # noqa: PLC0415

    run_plan = engine.run_plan

    def late(*args, **more):
        fault(bench / "b" / WEIGHTS)
        return run_plan(*args, **more)

    monkeypatch.setattr(engine, "run_plan", late)
    bench.refused(3, f"b/{WEIGHTS}", part)


def test_row_30_an_input_truncated_while_it_is_read_is_refused_without_sigbus(bench, monkeypatch):
    from merge_kit.io.reader import Reader  # noqa: PLC0415

    read_into, count = Reader.read_into, 0

    def cutting(self, path, start, buffer):
        nonlocal count
        count += 1
        if count == 6:
            os.truncate(bench / "b" / WEIGHTS, 100)
        read_into(self, path, start, buffer)

    monkeypatch.setattr(Reader, "read_into", cutting)
    done = bench.run("--threads", "1")
    done.refuses(3, f"b/{WEIGHTS}: ends at byte")
    assert bench.left() <= {"out.partial"}


def test_row_31_a_tensor_above_the_budget_goes_through_in_slabs(bench):
    for name, value in (("a", 1.0), ("b", 3.0)):
        save_file({"x": torch.full((20_000_000,), value)}, bench / name / WEIGHTS)  # 80 MB
    budget = process_bytes() + 6_000_000
    done = bench.child("run", "recipe.yaml", "-o", "out", "--memory", str(budget), "--json")
    assert done.code == 0, done.err
    assert json.loads(done.out)["peak_bytes"] < budget
    assert load_file(bench / "out" / WEIGHTS)["x"].unique().tolist() == [2.0]


def test_row_31_too_small_a_budget_is_refused_by_the_plan(bench):
    bench.refused(
        2, "the budget is 50 MB, and the run needs", "--memory", words=("--memory", "50MB")
    )


def test_row_31_a_system_without_memory_is_an_error_in_words(bench):
    for name in "ab":
        save_file({"x": torch.ones(4_000_000)}, bench / name / WEIGHTS)

    def little():
        resource.setrlimit(resource.RLIMIT_AS, (150_000_000, 150_000_000))

    done = bench.child("plan", "recipe.yaml", before=little)
    assert done.code in {0, 4}, done.err
    assert "Traceback" not in done.err
