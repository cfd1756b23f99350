from __future__ import annotations

import json
import os
import struct
from pathlib import Path

import pytest
import safetensors
from hypothesis import example, given
from hypothesis import strategies as st

from merge_kit.core.tensors import ByteSpan, StoredTensor, TensorSpec
from merge_kit.errors import CheckpointError, MergeKitError
from merge_kit.io.header import parse_header, read_header

F32 = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}


def raw_file(header: object, payload: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + payload


def entry(dtype="F32", shape=(1,), offsets=(0, 4)):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


def read(folder: Path, content: bytes):
    path = folder / "x.safetensors"
    path.write_bytes(content)
    return read_header(path)


def test_tensors_come_in_the_order_of_their_bytes(tmp_path):
    header = {
        "__metadata__": {"format": "pt"},
        "late": entry("F32", (1, 2), (2, 10)),
        "early": entry("BF16", (), (0, 2)),
        "nothing": entry("I64", (0, 3), (2, 2)),
    }
    content = raw_file(header, bytes(10))
    found, path = read(tmp_path, content), tmp_path / "x.safetensors"
    start = len(content) - 10
    assert found.tensors == (
        StoredTensor(TensorSpec("early", "BF16", ()), ByteSpan(path, start, start + 2)),
        StoredTensor(TensorSpec("nothing", "I64", (0, 3)), ByteSpan(path, start + 2, start + 2)),
        StoredTensor(TensorSpec("late", "F32", (1, 2)), ByteSpan(path, start + 2, start + 10)),
    )
    assert found.metadata == {"format": "pt"}


@pytest.mark.parametrize(
    ("dtype", "shape", "nbytes"), [("F4", (2, 3), 3), ("F6_E2M3", (4,), 3), ("C64", (2,), 16)]
)
def test_packed_dtypes_count_bits(tmp_path, dtype, shape, nbytes):
    content = raw_file({"a": entry(dtype, shape, (0, nbytes))}, bytes(nbytes))
    assert read(tmp_path, content).tensors[0].spec.nbytes == nbytes


BROKEN = {
    "empty file": (b"", "holds 0 bytes"),
    "seven bytes": (b"1234567", "holds 7 bytes"),
    "header of 2^40 bytes": (struct.pack("<Q", 1 << 40) + b"{}", "at most 100000000"),
    "header beyond the file": (struct.pack("<Q", 50) + b"{}", "at least 58 bytes, found 10"),
    "truncated": (raw_file({"a": F32}, b"123"), "truncated: expected 73 bytes, found 72"),
    "trailing": (raw_file({"a": F32}, b"12345"), "trailing bytes after tensor 'a'"),
    "hole": (
        raw_file({"a": F32, "b": entry(offsets=(6, 10))}, bytes(10)),
        "2 bytes between tensor 'a' and tensor 'b'",
    ),
    "hole at the start": (
        raw_file({"a": entry(offsets=(4, 8))}, bytes(8)),
        "4 bytes between the header and tensor 'a'",
    ),
    "overlap": (
        raw_file({"a": F32, "b": entry(offsets=(2, 6))}, bytes(6)),
        "2 bytes are shared by tensor 'a' and tensor 'b'",
    ),
    "duplicate tensor": (
        raw_file(b'{"a":%b,"a":%b}' % ((json.dumps(F32).encode(),) * 2), bytes(4)),
        "key 'a' appears twice",
    ),
    "unknown dtype": (raw_file({"a": entry("F33")}, bytes(4)), "dtype is 'F33'.*'F32'"),
    "dtype no text": (raw_file({"a": entry([1])}, bytes(4)), r"dtype is \[1\]"),
    "negative size": (raw_file({"a": entry(shape=(-1, -1))}, bytes(4)), r"shape is \[-1, -1\]"),
    "minus zero": (raw_file(json.dumps({"a": F32}).replace("[1]", "[-0]").encode()), "-0"),
    "bool size": (raw_file({"a": entry(shape=(True,))}, bytes(4)), r"shape is \[True\]"),
    "float size": (raw_file({"a": entry(shape=(1.0,))}, bytes(4)), r"shape is \[1.0\]"),
    "shape no list": (raw_file({"a": {**F32, "shape": "1"}}, bytes(4)), "shape is '1'"),
    "overflow": (raw_file({"a": entry(shape=(1 << 40, 1 << 40))}, bytes(4)), "overflows"),
    "overflow times zero": (raw_file({"a": entry("F32", (1 << 63, 2, 0), (0, 0))}), "overflows"),
    "endless shape": (raw_file({"a": entry(shape=(2,) * 300_000)}, bytes(4)), "overflows"),
    "span too long": (raw_file({"a": entry(offsets=(0, 8))}, bytes(8)), "needs 4 bytes.* span 8"),
    "offsets reversed": (raw_file({"a": entry(offsets=(4, 0))}, bytes(4)), "data_offsets"),
    "offsets of three": (raw_file({"a": entry(offsets=(0, 4, 4))}, bytes(4)), "data_offsets"),
    "half a byte": (raw_file({"a": entry("F4", (3,), (0, 2))}, bytes(2)), "ends within a byte"),
    "unknown key": (raw_file({"a": {**F32, "scale": 2}}, bytes(4)), "is described by"),
    "missing key": (raw_file({"a": {"dtype": "F32"}}, bytes(4)), "is described by"),
    "entry no object": (raw_file({"a": 3}), "is described by 3"),
    "not UTF-8": (raw_file(b'{"\xff":1}'), "not UTF-8, at its byte 2"),
    "UTF-16": (raw_file("{}".encode("utf-16")), "header starts with"),
    "list": (raw_file(b"[]"), "header starts with"),
    "deep": (raw_file(b'{"a":' + b"[" * 200_000), "nested too deeply"),
    "NaN": (raw_file(b'{"a":NaN}'), "NaN is no JSON number"),
    "infinity": (raw_file(b'{"a":-Infinity}'), "-Infinity is no JSON number"),
    "huge integer": (raw_file(b'{"a":' + b"9" * 5000 + b"}"), "not valid JSON"),
    "no JSON": (raw_file(b"{a:1}"), "not valid JSON"),
    "metadata no text": (raw_file({"__metadata__": {"a": 1}}), "expected a string"),
    "metadata no object": (raw_file({"__metadata__": None}), "expected an object"),
    "metadata no unicode": (raw_file(b'{"__metadata__":{"a":"\\ud800"}}'), "expected a string"),
    "NUL in a name": (raw_file({"a\0": F32}, bytes(4)), r"'a\\x00' holds a control character"),
    "escape in a name": (raw_file({"\x1b[2J": F32}, bytes(4)), "holds a control character"),
    "name no unicode": (raw_file(b'{"\\udc00":{}}'), "holds a control character"),
    "Git LFS": (b"version https://git-lfs.github.com/spec/v1", "is a Git LFS pointer"),
    "zip": (b"PK\x03\x04" + bytes(30), "is a zip archive"),
}


@pytest.mark.parametrize("fault", BROKEN)
def test_broken_files_are_refused_with_their_path(tmp_path, fault):
    content, message = BROKEN[fault]
    with pytest.raises(CheckpointError, match=message) as caught:
        read(tmp_path, content)
    assert caught.value.where.startswith(str(tmp_path / "x.safetensors"))
    assert caught.value.hint
    assert len(str(caught.value)) < 1000


def test_the_error_of_one_tensor_names_it(tmp_path):
    with pytest.raises(CheckpointError) as caught:
        read(tmp_path, raw_file({"layer.0": entry("F33")}, bytes(4)))
    assert caught.value.where == f"{tmp_path / 'x.safetensors'}, tensor 'layer.0'"


def test_pipes_are_refused_without_waiting(tmp_path):
    os.mkfifo(tmp_path / "x.safetensors")
    with pytest.raises(CheckpointError, match="no regular file"):
        read_header(tmp_path / "x.safetensors")


def test_a_missing_file_is_no_traceback(tmp_path):
    with pytest.raises(CheckpointError, match="cannot open: No such file"):
        read_header(tmp_path / "x.safetensors")


def test_ten_thousand_tensors_parse():
    names = (f"model.layers.{i // 100}.mlp.experts.{i % 100}.up_proj.weight" for i in range(10_000))
    header = {
        name: entry("BF16", (64, 256), (32_768 * i, 32_768 * (i + 1)))
        for i, name in enumerate(names)
    }
    raw = json.dumps(header).encode()
    found = parse_header(raw, 8 + len(raw), 8 + len(raw) + 32_768 * 10_000, Path("x"))
    assert len(found.tensors) == 10_000


def outcome(read_it):
    try:
        return read_it()
    except Exception as exc:  # noqa: BLE001
        return exc


def is_worse_than_the_library(path: Path) -> bool:
    """Return whether the library rejects a file that we accept."""
    ours = outcome(lambda: read_header(path))
    assert not isinstance(ours, Exception) or isinstance(ours, MergeKitError), ours

    def theirs():
        with safetensors.safe_open(path, "np") as file:
            return list(file.keys())

    return isinstance(outcome(theirs), Exception) and not isinstance(ours, Exception)


SIZES = st.one_of(st.integers(0, 3), st.sampled_from([-1, -0.0, 1.0, True, None, 2**31, 2**63, []]))
ENTRIES = st.one_of(
    st.builds(
        entry,
        st.sampled_from(["F32", "F4", "F6_E2M3", "BF16", "U8", "f32", ""]),
        st.lists(SIZES, max_size=3),
        st.lists(st.integers(0, 12) | SIZES, min_size=2, max_size=2),
    ),
    st.recursive(st.none() | st.integers() | st.text(max_size=3), st.lists, max_leaves=3),
)
HEADERS = st.dictionaries(
    st.text(max_size=3) | st.just("__metadata__"),
    ENTRIES | st.dictionaries(st.text(max_size=2), st.text(max_size=2), max_size=2),
    max_size=3,
)
VALID = raw_file(
    {"__metadata__": {"format": "pt"}, "a": F32, "b-0": entry("F16", (2, 0), (4, 4))}, bytes(4)
)


@given(HEADERS, st.integers(0, 16))
def test_built_headers_give_a_header_or_our_error(tmp_path_factory, header, payload):
    path = tmp_path_factory.getbasetemp() / "built.safetensors"
    path.write_bytes(raw_file(header, bytes(payload)))
    assert not is_worse_than_the_library(path)


@given(
    st.lists(
        st.tuples(st.integers(0, len(VALID) - 1), st.integers(0, 255)), min_size=1, max_size=3
    ),
    st.integers(-6, 6),
)
@example([(0, 0)], 0)
def test_mutated_files_give_a_header_or_our_error(tmp_path_factory, changes, longer):
    content = bytearray(VALID)
    for place, byte in changes:
        content[place] = byte
    content = content[:longer] if longer < 0 else content + bytes(longer)
    path = tmp_path_factory.getbasetemp() / "mutated.safetensors"
    path.write_bytes(content)
    assert not is_worse_than_the_library(path)


@given(st.text(alphabet='{}[]",:0123-.eabtrufalsn\\d8 ', max_size=40))
@example('{"a":{"dtype":"F32","shape":[-0],"data_offsets":[0,0]}}')
@example('{"\\ud800":{"dtype":"F32","shape":[0],"data_offsets":[0,0]}}')
@example('{"a":{"dtype":"F32","shape":[9223372036854775808,2,0],"data_offsets":[0,0]}}')
def test_text_that_resembles_json_gives_a_header_or_our_error(tmp_path_factory, text):
    path = tmp_path_factory.getbasetemp() / "text.safetensors"
    path.write_bytes(raw_file(text.encode()))
    assert not is_worse_than_the_library(path)


def test_the_intact_file_is_accepted_by_both(tmp_path):
    path = tmp_path / "x.safetensors"
    path.write_bytes(VALID)
    assert [t.spec.name for t in read_header(path).tensors] == ["a", "b-0"]
    with safetensors.safe_open(path, "np") as file:
        assert sorted(file.keys()) == ["a", "b-0"]
