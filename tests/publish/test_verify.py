from __future__ import annotations

import tracemalloc
from dataclasses import replace

import numpy as np
import pytest
from safetensors.numpy import save_file

from merge_kit.core.hashing import digests, tensor_hash
from merge_kit.errors import CheckpointError
from merge_kit.plan.values import Shard, SideFile
from merge_kit.publish import verify as verify_module
from merge_kit.publish.manifest import manifest
from merge_kit.publish.verify import verify

DTYPES = {np.dtype("float32"): "F32", np.dtype("float16"): "F16", np.dtype("int64"): "I64"}


def hash_of(array):
    return tensor_hash(digests(array.tobytes(), DTYPES[array.dtype]))


@pytest.fixture
def folder(tmp_path, make_plan, recipe):
    """A merge of two shards in a component and in the root, with a side file."""
    random = np.random.default_rng(0)
    files = {
        "model.safetensors": {
            "norm": random.random(7, dtype=np.float32),
            "big": random.random((300, 1000), dtype=np.float32).astype(np.float16),
            "empty": np.zeros((0, 4), np.float32),
        },
        "unet/model.safetensors": {"norm": np.arange(70_000)},
    }
    (tmp_path / "unet").mkdir()
    hashes, shards = {}, []
    for name, tensors in files.items():
        save_file(tensors, tmp_path / name)
        shards.append(Shard(name, b"", (tmp_path / name).stat().st_size))
        prefix = name.removesuffix("model.safetensors")
        hashes |= {prefix + key: hash_of(array) for key, array in tensors.items()}
    (tmp_path / "config.json").write_text("{}")
    plan = replace(
        make_plan(), shards=tuple(shards), side_files=(SideFile("config.json", text="{}"),)
    )
    text = manifest(
        plan, recipe_text=recipe, hashes=hashes, nonfinite={}, saturated={}, versions={}
    )
    (tmp_path / "merge_kit.json").write_text(text)
    return tmp_path


def flip(path, at):
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)


def test_an_untouched_merge_is_intact(folder):
    found = verify(folder)
    assert set(found.ok) == {"norm", "big", "empty", "unet/norm"}
    assert found.is_intact


@pytest.mark.parametrize("chunks", [1, 3])
def test_the_hash_does_not_depend_on_how_much_is_read_at_once(folder, monkeypatch, chunks):
    monkeypatch.setattr(verify_module, "_CHUNKS", chunks)
    assert verify(folder).is_intact


@pytest.mark.parametrize("at", [-1, -500_000])
def test_one_flipped_bit_is_found(folder, at):
    flip(folder / "unet/model.safetensors", at)
    found = verify(folder)
    assert found.differing == ("unet/norm",)
    assert set(found.ok) == {"norm", "big", "empty"}
    assert not found.is_intact


def test_a_missing_file_and_its_tensors_are_named(folder):
    (folder / "unet/model.safetensors").unlink()
    (folder / "config.json").unlink()
    found = verify(folder)
    assert found.missing == ("unet/norm",)
    assert found.files == ("unet/model.safetensors: missing", "config.json: missing")


def test_a_truncated_file_is_named_and_does_not_hide_the_others(folder):
    path = folder / "unet/model.safetensors"
    path.write_bytes(path.read_bytes()[:-8])
    found = verify(folder)
    assert found.missing == ("unet/norm",)
    assert set(found.ok) == {"norm", "big", "empty"}
    assert any("truncated" in line for line in found.files)
    assert any("bytes, expected" in line for line in found.files)


def test_what_the_record_does_not_know_is_unexpected(folder):
    save_file({"norm": np.arange(70_000), "new": np.arange(2)}, folder / "unet/model.safetensors")
    save_file({"x": np.arange(2)}, folder / "extra.safetensors")
    found = verify(folder)
    assert found.unexpected == ("unet/new",)
    assert "extra.safetensors: unexpected" in found.files
    assert found.differing == found.missing == ()


def test_a_changed_dtype_differs(folder):
    save_file({"norm": np.arange(70_000).view(np.float64)}, folder / "unet/model.safetensors")
    assert verify(folder).is_intact  # the same bytes in chunks of the same size
    save_file({"norm": np.arange(70_000).view(np.float32)}, folder / "unet/model.safetensors")
    assert verify(folder).differing == ("unet/norm",)


def test_memory_does_not_grow_with_the_model(tmp_path, make_plan, recipe):
    header = b'{"big":{"dtype":"F32","shape":[33554432],"data_offsets":[0,134217728]}}'
    with (tmp_path / "model.safetensors").open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(8 + len(header) + (128 << 20))  # zeros that take no room on the disk
    zeros = digests(bytes(4 << 16), "F32")
    plan = make_plan(shards=(Shard("model.safetensors", b"", 8 + len(header) + (128 << 20)),))
    options = {"nonfinite": {}, "saturated": {}, "versions": {}}
    hashes = {"big": tensor_hash(zeros * 512)}
    text = manifest(replace(plan, side_files=()), recipe_text=recipe, hashes=hashes, **options)
    (tmp_path / "merge_kit.json").write_text(text)
    tracemalloc.start()
    try:
        assert verify(tmp_path).is_intact
        peak_bytes = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak_bytes < 24 << 20  # 8 MiB of buffer, its first zeros, and what is imported


def test_a_file_that_ends_while_it_is_read_differs(folder, monkeypatch):
    monkeypatch.setattr(verify_module.os, "preadv", lambda *arguments: 0)
    assert set(verify(folder).ok) == {"empty"}


def test_a_disk_that_fails_is_an_error_in_words(folder, monkeypatch):
    def failing(*arguments):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(verify_module.os, "preadv", failing)
    with pytest.raises(CheckpointError, match=r"model\.safetensors: cannot read: Input/output"):
        verify(folder)


def test_names_of_files_cannot_write_to_the_terminal(folder):
    (folder / "\x1b[2J.safetensors").touch()
    assert verify(folder).files == ("\ufffd[2J.safetensors: unexpected",)


def test_without_a_record_there_is_nothing_to_compare(folder):
    (folder / "merge_kit.json").unlink()
    with pytest.raises(CheckpointError, match=r"no merge_kit\.json"):
        verify(folder)


def test_a_record_cannot_point_out_of_the_folder(folder):
    path = folder / "merge_kit.json"
    path.write_text(path.read_text().replace('"unet/model.safetensors"', '"../model.safetensors"'))
    with pytest.raises(CheckpointError, match="is not in the folder"):
        verify(folder)
