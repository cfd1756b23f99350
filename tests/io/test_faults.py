"""The rows of the table of bad inputs that concern opening a checkpoint."""

from __future__ import annotations

import json
import os
import pickle

import pytest
from checkpoint_files import write_index, write_sharded, write_weights

from merge_kit.errors import CheckpointError
from merge_kit.io.checkpoint import open_checkpoint

FIRST, SECOND = (f"model-0000{i}-of-00002.safetensors" for i in (1, 2))
INDEX = "model.safetensors.index.json"


def edit(path, change):
    """Rewrite a header with `change` applied to its JSON object, or replaced by bytes."""
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = change(json.loads(content[8 : 8 + length]))
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + content[8 + length :])


def with_tensor(**change):
    """Return an edit of tensor b of the first shard (F32, shape [2], bytes 8 to 16)."""
    return lambda folder: edit(folder / FIRST, lambda h: h | {"b": h["b"] | change})


def truncated(folder):
    os.truncate(folder / FIRST, (folder / FIRST).stat().st_size - 3)


def long_header(folder):
    content = (folder / FIRST).read_bytes()
    (folder / FIRST).write_bytes((1 << 40).to_bytes(8, "little") + content[8:])


def trailing(folder):
    (folder / FIRST).write_bytes((folder / FIRST).read_bytes() + b"..")


def twice_in_header(folder):
    edit(folder / FIRST, lambda h: json.dumps(h)[:-1].encode() + b', "a": 1}')


def not_utf8(folder):
    edit(folder / FIRST, lambda h: b'{"\xff": 1}')


def list_root(folder):
    edit(folder / FIRST, lambda h: b"[1]")


def nested(folder):
    edit(folder / FIRST, lambda h: b'{"a":' + b"[" * 200_000)


def index_points_to(shard):
    return lambda folder: write_index(folder / INDEX, {"a": shard, "b": FIRST, "c": SECOND})


def leaving_link(folder):
    (folder / FIRST).rename(folder.parent / FIRST)
    (folder / FIRST).symlink_to(f"../{FIRST}")


def missing_shard(folder):
    (folder / SECOND).unlink()


def tensor_not_in_shard(folder):
    write_weights(folder / SECOND, "d")


def tensor_not_in_index(folder):
    write_index(folder / INDEX, {"a": FIRST, "c": SECOND})


def in_two_shards(folder):
    write_weights(folder / SECOND, "a", "c")


class Canary:
    """Pickled, it makes a file when it is opened."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def pickle_only(folder):
    for path in folder.iterdir():
        path.unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Canary(folder / "canary")))


ROWS = [
    (1, truncated, rf"{FIRST}: truncated: expected \d+ bytes, found \d+"),
    (2, long_header, f"{FIRST}: says its header has 1099511627776 bytes"),
    (3, with_tensor(data_offsets=[4, 12]), "4 bytes are shared by tensor 'a' and tensor 'b'"),
    (3, with_tensor(data_offsets=[12, 20]), "4 bytes between tensor 'a' and tensor 'b'"),
    (3, trailing, "trailing bytes after tensor 'b'"),
    (4, twice_in_header, "key 'a' appears twice"),
    (5, with_tensor(dtype="F33"), "tensor 'b': dtype is 'F33'"),
    (6, with_tensor(shape=[2**62, 2**62]), "tensor 'b': shape .* overflows"),
    (6, with_tensor(shape=[-2]), r"tensor 'b': shape is \[-2\]"),
    (6, with_tensor(shape=[2, True]), r"tensor 'b': shape is \[2, True\]"),
    (6, with_tensor(shape=[2.0]), r"tensor 'b': shape is \[2.0\]"),
    (7, not_utf8, "header is not UTF-8"),
    (7, list_root, "header starts with"),
    (7, nested, "nested too deeply"),
    (8, index_points_to(f"../{FIRST}"), "outside the model's folder"),
    (8, index_points_to(f"/tmp/{FIRST}"), "outside the model's folder"),
    (8, leaving_link, "a link that leaves the folder"),
    (9, missing_shard, f"1 of its 2 shards are missing: {SECOND}"),
    (9, tensor_not_in_shard, rf"1 tensors are not in the shard it names: c \({SECOND}\)"),
    (9, tensor_not_in_index, rf"1 tensors of the shards are not in the index: b \({FIRST}\)"),
    (10, in_two_shards, rf"1 tensors are in two shards: a \({FIRST} and {SECOND}\)"),
    (20, pickle_only, "never opens pickles.*\n  hint: convert them first: mergekit convert"),
]


@pytest.mark.parametrize(("row", "fault", "message"), ROWS)
def test_the_fault_is_refused_as_a_bad_input(tmp_path, row, fault, message):
    folder = tmp_path / "model"
    folder.mkdir()
    write_sharded(folder)
    assert open_checkpoint(folder).components  # it is the fault that is refused
    fault(folder)
    with pytest.raises(CheckpointError, match=message) as caught:
        open_checkpoint(folder)
    assert caught.value.code() == 3
    assert caught.value.where.startswith(str(folder))
    assert not (folder / "canary").exists()


def test_the_canary_sings_where_pickles_are_opened(tmp_path):
    pickle.loads(pickle.dumps(Canary(tmp_path / "canary")))
    assert (tmp_path / "canary").exists()


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"metadata": None}, "states no metadata.total_size"),
        ({"metadata": {"total_size": 25}}, "total_size of 25 bytes, the shards hold 24"),
    ],
)
def test_row_11_a_wrong_size_in_the_index_is_a_warning(tmp_path, more, message):
    write_sharded(tmp_path)
    write_index(tmp_path / INDEX, {"a": FIRST, "b": FIRST, "c": SECOND}, **more)
    (warning,) = open_checkpoint(tmp_path).warnings
    assert message in warning
