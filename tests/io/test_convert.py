from __future__ import annotations

import contextlib
import io
import json
import os
import pickle
import subprocess
import sys

import pytest
import torch
from checkpoint_files import write_index, write_weights
from safetensors.torch import load_file

from merge_kit.errors import CheckpointError, OutputError, OutputExistsError
from merge_kit.io import convert as convert_module
from merge_kit.io import unpickling
from merge_kit.io.checkpoint import open_checkpoint
from merge_kit.io.convert import convert_pickled
from merge_kit.io.convert_child import main
from merge_kit.io.pickled import find_pickled
from merge_kit.io.unpickling import load_tensors


class Canary:
    """Pickled, it makes a folder when it is opened."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def save(path, content, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(content, path, **options)


@pytest.fixture
def here(monkeypatch):
    """Run the child's function in this process: importing torch takes seconds."""

    def run(arguments, **options):
        monkeypatch.setattr(sys, "stdin", io.StringIO(options["input"]))
        with contextlib.redirect_stdout(io.StringIO()) as answer:
            main()
        return subprocess.CompletedProcess(arguments, 0, answer.getvalue(), "")

    monkeypatch.setattr(convert_module.subprocess, "run", run)


def test_a_folder_is_converted_by_a_child_and_no_pickle_is_opened_here(tmp_path, monkeypatch):
    source, output = tmp_path / "old", tmp_path / "new" / "out"
    first = {"b": torch.arange(6.0).reshape(2, 3).T, "a": torch.tensor([True, False])}
    second = {"c": torch.tensor(1.5, dtype=torch.bfloat16), "d": torch.zeros(0, 4)}
    save(source / "pytorch_model-00001-of-00002.bin", first)
    save(source / "pytorch_model-00002-of-00002.bin", second)
    weight_map = dict.fromkeys(first, "pytorch_model-00001-of-00002.bin")
    weight_map |= dict.fromkeys(second, "pytorch_model-00002-of-00002.bin")
    write_index(source / "pytorch_model.bin.index.json", weight_map)
    for name in ("config.json", "tokenizer.json", "LICENSE", "README.md", "tokenizer/x.txt"):
        (source / name).parent.mkdir(exist_ok=True)
        (source / name).write_text("{}")
    (source / "modeling.py").write_text("raise SystemExit")
    save(source / "training_args.bin", {"not": "weights"})

    monkeypatch.setattr(torch, "load", None)  # in this process
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")  # must not reach the child
    done = convert_pickled(source, output, 1000)

    assert (done.output, done.tensors, done.notes) == (output, 4, ())
    assert sorted(p.relative_to(output).as_posix() for p in output.rglob("*") if p.is_file()) == [
        *("LICENSE", "README.md", "config.json", "model.safetensors"),
        *("tokenizer.json", "tokenizer/x.txt"),
    ]
    assert [path.name for path in output.parent.iterdir()] == ["out"]
    found = load_file(output / "model.safetensors")
    for name, tensor in (first | second).items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor)


def test_a_pickle_that_would_run_code_is_refused_and_does_not_run(tmp_path):
    save(tmp_path / "evil.pt", {"a": Canary(tmp_path / "canary")})
    with pytest.raises(CheckpointError, match=r"refused to open: .*mkdir") as caught:
        convert_pickled(tmp_path / "evil.pt", tmp_path / "out", 1000)
    assert caught.value.code() == 3
    assert caught.value.where == str(tmp_path / "evil.pt")
    assert "safetensors" in caught.value.hint
    assert sorted(path.name for path in tmp_path.iterdir()) == ["evil.pt"]


@pytest.mark.parametrize("protocol", [2, 4])
def test_a_bare_pickle_that_would_run_code_does_not_run(tmp_path, protocol, here):
    (tmp_path / "evil.pkl").write_bytes(pickle.dumps(Canary(tmp_path / "canary"), protocol))
    with pytest.raises(CheckpointError, match="refused to open"):
        convert_pickled(tmp_path / "evil.pkl", tmp_path / "out", 1000)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["evil.pkl"]


def test_a_child_that_dies_is_an_error_of_the_input(tmp_path, monkeypatch):
    save(tmp_path / "x.pt", {"a": torch.ones(1)})
    for boot, message in [
        ("import os; os.kill(os.getpid(), 9)", "signal 9 ended the process"),
        ("raise RuntimeError('boom')", "cannot be converted: RuntimeError: boom"),
    ]:
        monkeypatch.setattr(convert_module, "_BOOTSTRAP", boot)
        with pytest.raises(CheckpointError, match=message):
            convert_pickled(tmp_path / "x.pt", tmp_path / "out", 1000)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["x.pt"]


def test_shards_are_cut_by_size_whatever_the_pickled_files_were(tmp_path, here):
    save(tmp_path / "old" / "pytorch_model-00001-of-00002.bin", {"a": torch.ones(2)})
    save(tmp_path / "old" / "pytorch_model-00002-of-00002.bin", {"b": torch.ones(2, 2)})
    convert_pickled(tmp_path / "old", tmp_path / "one", 24)
    convert_pickled(tmp_path / "old", tmp_path / "two", 23)
    assert [f.name for f in open_checkpoint(tmp_path / "one").components[0].files] == [
        "model.safetensors"
    ]
    two = open_checkpoint(tmp_path / "two")
    assert two.warnings == ()
    assert [f.name for f in two.components[0].files] == [
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
    ]
    assert load_file(two.components[0].files[1].path)["b"].sum() == 4


def test_the_same_pickle_gives_the_same_bytes(tmp_path, here):
    save(tmp_path / "x.pt", {"b": torch.ones(2), "a": torch.ones(3, dtype=torch.float64)})
    for name in ("one", "two"):
        convert_pickled(tmp_path / "x.pt", tmp_path / name, 1000)
    one, two = ((tmp_path / n / "model.safetensors").read_bytes() for n in ("one", "two"))
    assert one == two


@pytest.mark.parametrize(
    ("config", "names"),
    [
        ({"tie_word_embeddings": True}, {"wte.weight"}),
        ({"tie_word_embeddings": False}, {"wte.weight", "lm_head.weight"}),
        ({}, {"wte.weight", "lm_head.weight"}),
    ],
)
def test_a_head_that_is_the_embedding_goes_only_if_the_config_ties_it(
    tmp_path, here, config, names
):
    weight = torch.arange(4.0).reshape(2, 2)
    save(tmp_path / "old" / "pytorch_model.bin", {"wte.weight": weight, "lm_head.weight": weight})
    (tmp_path / "old" / "config.json").write_text(json.dumps(config))
    done = convert_pickled(tmp_path / "old", tmp_path / "out", 1000)
    found = load_file(tmp_path / "out" / "model.safetensors")
    assert set(found) == names
    assert all(torch.equal(tensor, weight) for tensor in found.values())
    assert len(done.notes) == 2 - len(names)


def test_a_head_of_its_own_stays_in_a_tied_model(tmp_path, here):
    tensors = {"wte.weight": torch.zeros(2), "lm_head.weight": torch.ones(2)}
    save(tmp_path / "old" / "pytorch_model.bin", tensors)
    (tmp_path / "old" / "config.json").write_text('{"tie_word_embeddings": true}')
    convert_pickled(tmp_path / "old", tmp_path / "out", 1000)
    assert load_file(tmp_path / "out" / "model.safetensors")["lm_head.weight"].sum() == 2


def test_views_of_one_storage_are_written_each_in_full(tmp_path, here):
    whole = torch.arange(12.0).reshape(3, 4)
    save(tmp_path / "x.pt", {"all": whole, "column": whole[:, 1], "row": whole[1], "t": whole.t()})
    convert_pickled(tmp_path / "x.pt", tmp_path / "out", 1000)
    found = load_file(tmp_path / "out" / "model.safetensors")
    assert found["column"].tolist() == [1, 5, 9]
    assert found["row"].tolist() == [4, 5, 6, 7]
    assert torch.equal(found["t"], whole.t())
    assert torch.equal(found["all"], whole)


@pytest.mark.parametrize(
    "dtype",
    [
        *(torch.float64, torch.float16, torch.int64, torch.uint8, torch.complex64),
        *(torch.float8_e4m3fn, torch.float8_e8m0fnu, torch.uint16),
    ],
)
def test_every_dtype_keeps_its_bytes(tmp_path, here, dtype):
    tensor = torch.tensor([0, 1, 2, 4]).to(dtype)
    save(tmp_path / "x.pt", {"a": tensor})
    convert_pickled(tmp_path / "x.pt", tmp_path / "out", 1000)
    found = load_file(tmp_path / "out" / "model.safetensors")["a"]
    assert found.dtype == dtype
    assert torch.equal(found.view(torch.uint8), tensor.view(torch.uint8))


def test_conjugates_are_written_as_they_read(tmp_path, here):
    save(tmp_path / "x.pt", {"a": torch.tensor([1 + 2j]).conj()})
    convert_pickled(tmp_path / "x.pt", tmp_path / "out", 1000)
    assert load_file(tmp_path / "out" / "model.safetensors")["a"].tolist() == [1 - 2j]


def test_the_old_format_of_torch_is_read(tmp_path, here):
    save(tmp_path / "x.pth", {"a": torch.ones(3)}, _use_new_zipfile_serialization=False)
    convert_pickled(tmp_path / "x.pth", tmp_path / "out", 1000)
    assert load_file(tmp_path / "out" / "model.safetensors")["a"].tolist() == [1, 1, 1]


def test_the_weights_of_a_training_checkpoint_are_unwrapped_with_a_note(tmp_path, here):
    save(tmp_path / "x.ckpt", {"state_dict": {"a": torch.ones(1)}, "epoch": 3})
    done = convert_pickled(tmp_path / "x.ckpt", tmp_path / "out", 1000)
    assert list(load_file(tmp_path / "out" / "model.safetensors")) == ["a"]
    assert done.notes == ("x.ckpt: kept 'state_dict', left out 'epoch'",)


def test_pickled_components_are_converted_and_finished_ones_copied(tmp_path, here):
    source = tmp_path / "old"
    write_weights(source / "model.safetensors", "a")
    (source / "pytorch_model.bin").write_bytes(b"never opened: safetensors stand beside it")
    save(source / "2_Dense" / "pytorch_model.bin", {"linear.weight": torch.ones(2)})
    save(source / "unet" / "diffusion_pytorch_model.bin", {"conv": torch.ones(2)})
    convert_pickled(source, tmp_path / "out", 1000)
    found = open_checkpoint(tmp_path / "out")
    assert [(c.path, c.stem, list(c.tensors)) for c in found.components] == [
        ("", "model", ["a"]),
        ("2_Dense", "model", ["linear.weight"]),
        ("unet", "diffusion_pytorch_model", ["conv"]),
    ]
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == (
        source / "model.safetensors"
    ).read_bytes()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([torch.ones(1)], "holds a list, expected a mapping"),
        ({"a": torch.ones(1), "b": 3}, "holds 'b', a int, expected tensors only"),
        ({1: torch.ones(1)}, "holds 1, a Tensor, expected tensors only"),
        ({}, "holds no tensors"),
        ({"a\n": torch.ones(1)}, r"tensor 'a\\n': has a name"),
        ({"__metadata__": torch.ones(1)}, "has a name"),
        ({"a": torch.eye(2).to_sparse()}, "sparse_coo"),
        ({"a": torch.ones(1, dtype=torch.complex128)}, "complex128"),
        ({"a": torch.ones(1, device="meta")}, "no bytes"),
    ],
)
def test_what_is_no_set_of_tensors_is_refused(tmp_path, here, content, message):
    save(tmp_path / "x.pt", content)
    with pytest.raises(CheckpointError, match=message):
        convert_pickled(tmp_path / "x.pt", tmp_path / "out", 1000)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("content", [b"", b"not a pickle at all", b"PK\x03\x04 half a zip"])
def test_a_damaged_pickle_is_an_error_with_a_reason(tmp_path, content):
    (tmp_path / "x.pt").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"refused to open: \w+"):
        load_tensors(tmp_path / "x.pt")


def test_a_torch_whose_unpickler_is_not_safe_is_refused(tmp_path, monkeypatch):
    save(tmp_path / "x.pt", {"a": torch.ones(1)})
    monkeypatch.setattr(unpickling.torch, "__version__", "2.5.1+cpu")
    with pytest.raises(CheckpointError, match=r"torch 2.5.1\+cpu cannot .* 2.6 or later"):
        load_tensors(tmp_path / "x.pt")


def test_shards_and_index_are_checked_against_one_another(tmp_path, here):
    first, second = (f"pytorch_model-0000{i}-of-00002.bin" for i in (1, 2))
    for name in (first, second):
        save(tmp_path / "old" / name, {"a": torch.ones(1)})
    with pytest.raises(CheckpointError, match=rf"in two shards: a \({first} and {second}\)"):
        convert_pickled(tmp_path / "old", tmp_path / "out", 1000)
    save(tmp_path / "old" / second, {"b": torch.ones(1)})
    write_index(tmp_path / "old" / "pytorch_model.bin.index.json", {"a": first, "c": second})
    with pytest.raises(CheckpointError, match=rf"not in the shard it names: c \({second}\)"):
        convert_pickled(tmp_path / "old", tmp_path / "out", 1000)
    (tmp_path / "old" / second).unlink()
    with pytest.raises(CheckpointError, match=f"shards are missing: {second}"):
        convert_pickled(tmp_path / "old", tmp_path / "out", 1000)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ([], "no pickled weights"),
        (["model.safetensors"], "no pickled weights"),
        (["optimizer.pt", "training_args.bin"], "no pickled weights"),
        (["one.pt", "two.pt"], "several sets of weights, expected one: one.pt, two.pt"),
        (["model.pt", "model.bin"], "two sets of the same weights"),
        (["pytorch_model-00001-of-00002.bin"], "1 of 2 shards, absent are 2"),
    ],
)
def test_a_folder_without_one_set_of_pickles_is_refused(tmp_path, files, message):
    for name in files:
        (tmp_path / name).write_bytes(b"")
    with pytest.raises(CheckpointError, match=message):
        find_pickled(tmp_path)


def test_files_that_are_not_there_or_no_pickles_are_refused(tmp_path):
    with pytest.raises(CheckpointError, match="no such folder or file"):
        find_pickled(tmp_path / "x.bin")
    (tmp_path / "x.txt").write_text("")
    with pytest.raises(CheckpointError, match=r"ends in .bin, .pt"):
        find_pickled(tmp_path / "x.txt")


def test_an_output_that_is_there_or_inside_the_input_is_never_touched(tmp_path, here):
    save(tmp_path / "old" / "pytorch_model.bin", {"a": torch.ones(1)})
    (tmp_path / "out").mkdir()
    (tmp_path / "link").symlink_to("nothing")
    for output in (tmp_path / "out", tmp_path / "link", tmp_path / "old" / "x", tmp_path / "old"):
        with pytest.raises(OutputExistsError) as caught:
            convert_pickled(tmp_path / "old", output, 1000)
        assert caught.value.code() == 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["link", "old", "out"]


def test_a_write_that_fails_leaves_nothing(tmp_path, here, monkeypatch):
    save(tmp_path / "old" / "pytorch_model.bin", {"a": torch.ones(1)})
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="cannot write: "):
        convert_pickled(tmp_path / "old", tmp_path / "file" / "out", 1000)

    def full(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(OutputError, match=r"No space left on device\n  hint: free some space"):
        convert_pickled(tmp_path / "old", tmp_path / "out", 1000)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "old"]
