from __future__ import annotations

import json

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from merge_kit.errors import CheckpointError, MergeKitError
from merge_kit.io.index import Index, check_tensors, few, read_index, size_warning

SHARD = "model-00001-of-00001.safetensors"


def read(folder, content):
    path = folder / "model.safetensors.index.json"
    path.write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
    return read_index(path)


def test_an_index_is_read(tmp_path):
    weight_map = {"b": "m-10.safetensors", "a": "m-9.safetensors", "c": "m-10.safetensors"}
    index = read(tmp_path, {"metadata": {"total_size": 7}, "weight_map": weight_map, "more": 1})
    assert index == Index(tmp_path / "model.safetensors.index.json", weight_map, 7)
    assert index.shards == ("m-9.safetensors", "m-10.safetensors")


BROKEN = {
    "no weight_map": ({}, "weight_map is None"),
    "empty weight_map": ({"weight_map": {}}, "weight_map is {}"),
    "weight_map a list": ({"weight_map": [SHARD]}, "weight_map is"),
    "shard a number": ({"weight_map": {"a": 1}}, "names 1, expected the name of a file"),
    "shard a list": ({"weight_map": {"a": [SHARD]}}, "expected the name of a file"),
    "parent": ({"weight_map": {"a": f"../{SHARD}"}}, "outside the model's folder"),
    "absolute": ({"weight_map": {"a": f"/tmp/{SHARD}"}}, "outside the model's folder"),
    "subfolder": ({"weight_map": {"a": f"sub/{SHARD}"}}, "outside the model's folder"),
    "backslash": ({"weight_map": {"a": f"..\\{SHARD}"}}, "outside the model's folder"),
    "pickle": ({"weight_map": {"a": "pytorch_model.bin"}}, "ends in .safetensors"),
    "NUL in a shard": ({"weight_map": {"a": "a\0.safetensors"}}, "is no weight file"),
    "NUL in a tensor": ({"weight_map": {"a\0": SHARD}}, "control character"),
    "duplicate tensor": (b'{"weight_map":{"a":"x","a":"y"}}', "key 'a' appears twice"),
    "NaN": (b'{"metadata":{"total_size":NaN}}', "NaN is no JSON number"),
    "not UTF-8": (b'{"\xff":1}', "index is not UTF-8"),
    "list": (b"[]", "holds a JSON list"),
    "deep": (b'{"a":' * 100_000, "nested too deeply"),
    "empty": (b"", "not valid JSON"),
}


@pytest.mark.parametrize("fault", BROKEN)
def test_broken_indexes_are_refused_with_their_path(tmp_path, fault):
    content, message = BROKEN[fault]
    with pytest.raises(CheckpointError, match=message) as caught:
        read(tmp_path, content)
    assert caught.value.where == str(tmp_path / "model.safetensors.index.json")
    assert caught.value.hint


def test_an_index_above_the_size_limit_is_not_read(tmp_path):
    path = tmp_path / "model.safetensors.index.json"
    with path.open("wb") as file:
        file.truncate(100_000_001)
    with pytest.raises(CheckpointError, match="100000001 bytes, expected at most 100000000"):
        read_index(path)


@pytest.mark.parametrize(
    ("total", "warning"),
    [(None, "states no"), (7, "7 bytes, the shards hold 8"), (8, ""), (8.0, "")],
)
def test_a_wrong_size_is_a_warning(tmp_path, total, warning):
    index = Index(tmp_path / "x.index.json", {"a": SHARD}, total)
    found = size_warning(index, 8)
    assert warning in found
    assert bool(found) == bool(warning)


def test_the_first_five_tensors_are_named(tmp_path):
    index = Index(tmp_path / "i", {f"t{i}": SHARD for i in range(7)}, None)
    with pytest.raises(CheckpointError, match="7 tensors") as caught:
        check_tensors(index, {SHARD: set()})
    assert f"t4 ({SHARD}), ..." in caught.value.problem
    assert "t5" not in caught.value.problem
    assert few("abcde") == "a, b, c, d, e"


VALID = json.dumps({"metadata": {"total_size": 8}, "weight_map": {"a": SHARD, "b": SHARD}}).encode()
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.just(SHARD),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=2), inner),
    max_leaves=5,
)


@given(
    st.lists(st.tuples(st.integers(0, len(VALID) - 1), st.integers(0, 255)), min_size=1, max_size=3)
)
@example([(0, 0)])
def test_mutated_indexes_give_an_index_or_our_error(tmp_path_factory, changes):
    content = bytearray(VALID)
    for place, byte in changes:
        content[place] = byte
    assert_index_or_our_error(tmp_path_factory.getbasetemp(), bytes(content))


@given(st.fixed_dictionaries({"weight_map": VALUES}, optional={"metadata": VALUES}))
def test_built_indexes_give_an_index_or_our_error(tmp_path_factory, index):
    assert_index_or_our_error(tmp_path_factory.getbasetemp(), index)


def assert_index_or_our_error(folder, content):
    try:
        index = read(folder, content)
    except MergeKitError:
        return
    assert index.weight_map
    assert all(name.endswith(".safetensors") and "/" not in name for name in index.shards)
