from __future__ import annotations

import json

import pytest
import safetensors
from hypothesis import given
from hypothesis import strategies as st

from merge_kit.core.dtypes import DTYPES
from merge_kit.core.tensors import TensorSpec
from merge_kit.errors import PlanError
from merge_kit.io import layout
from merge_kit.io.header import read_header
from merge_kit.io.layout import build_header, build_index, index_name, plan_shards, shard_names


def test_the_header_is_these_bytes():
    header, offsets = build_header([TensorSpec("a", "F32", (2, 1)), TensorSpec("é", "U8", (3,))])
    text = (
        '{"__metadata__":{"format":"pt"},'
        '"a":{"dtype":"F32","shape":[2,1],"data_offsets":[0,8]},'
        '"é":{"dtype":"U8","shape":[3],"data_offsets":[8,11]}}'
    ).encode()
    assert len(text) == 141
    assert header == (184).to_bytes(8, "little") + text + b" " * 43  # 8 + 184 = 3 * 64
    assert offsets == (192, 200)


SPECS = st.lists(
    st.builds(
        TensorSpec,
        st.text(st.characters(exclude_categories=["Cc", "Cs", "Zl", "Zp"]), max_size=8),
        st.sampled_from([name for name, dtype in DTYPES.items() if dtype.bits >= 8]),
        st.lists(st.integers(0, 3), max_size=3).map(tuple),
    ),
    unique_by=lambda spec: spec.name,
    max_size=6,
)


@given(SPECS, st.integers(1, 100))
def test_planned_shards_are_read_by_the_library_and_by_us(tmp_path_factory, specs, limit):
    path = tmp_path_factory.getbasetemp() / "planned.safetensors"
    shards = plan_shards(specs, limit)
    assert sorted(position for shard in shards for position in shard) == list(range(len(specs)))
    for shard in shards:
        tensors = [specs[position] for position in shard]
        header, offsets = build_header(tensors)
        path.write_bytes(header + bytes(sum(spec.nbytes for spec in tensors)))
        assert [t.spec for t in read_header(path).tensors if t.spec.nbytes] == [
            spec for spec in tensors if spec.nbytes
        ]
        assert len(header) % 64 == 0
        for spec, offset in zip(tensors, offsets, strict=True):
            assert offset % (DTYPES[spec.dtype].bits // 8) == 0
        with safetensors.safe_open(path, "np") as file:
            assert set(file.keys()) == {spec.name for spec in tensors}
            assert file.metadata() == {"format": "pt"}


def test_shards_are_filled_in_order_and_a_large_tensor_stands_alone():
    sizes = [4, 4, 4, 100, 2, 8]
    specs = [TensorSpec(str(i), "U8", (size,)) for i, size in enumerate(sizes)]
    assert plan_shards(specs, 10) == [[0, 1], [2], [3], [4, 5]]


def test_within_a_shard_wide_dtypes_come_first():
    specs = [TensorSpec(d, d, (1,)) for d in ("U8", "F16", "F64", "BF16", "F32")]
    assert plan_shards(specs, 1000) == [[2, 4, 1, 3, 0]]


def test_no_tensors_are_one_empty_shard():
    assert plan_shards([], 10) == [[]]
    assert build_header([])[1] == ()


def test_shard_names():
    assert shard_names("model", 1) == ["model.safetensors"]
    assert shard_names("model", 2) == [
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
    ]
    assert index_name("model") == "model.safetensors.index.json"


def test_the_index_is_this_text_whatever_the_order():
    weight_map = {"b": "model-00001-of-00002.safetensors", "a": "model-00002-of-00002.safetensors"}
    text = build_index(weight_map, 12)
    assert text == (
        '{\n  "metadata": {\n    "total_size": 12\n  },\n  "weight_map": {\n'
        '    "a": "model-00002-of-00002.safetensors",\n'
        '    "b": "model-00001-of-00002.safetensors"\n  }\n}\n'
    )
    assert build_index(dict(reversed(weight_map.items())), 12) == text
    assert json.loads(text)["metadata"]["total_size"] == 12


def test_a_header_above_the_limit_is_refused_with_an_action(monkeypatch):
    monkeypatch.setattr(layout, "MAX_HEADER_BYTES", 100)
    with pytest.raises(
        PlanError, match=r"takes 120 B, at most 100 B.*\n  hint: lower --shard-size"
    ):
        build_header([TensorSpec("a" * 20, "F32", (1,))])
