from __future__ import annotations

import os

import pytest
import torch
from safetensors.torch import save_file

import merge_kit as mk
from merge_kit.core.dtypes import DTYPES
from tests.api.conftest import SHAPES, assert_same


def test_a_folder_tells_names_shapes_and_dtypes(family):
    model = mk.load(family.path("base"))
    assert set(model.names) == set(model) == {*SHAPES, "ids"}
    assert len(model) == 6
    assert model.shape("model.layers.1.w") == (5, 7)
    assert model.shape("scale") == ()
    assert [model.dtype(n) for n in ("model.layers.0.w", "scale", "ids")] == ["BF16", "BF16", "I64"]
    assert "scale" in model
    assert "scales" not in model


def test_a_file_a_folder_and_a_mapping_give_the_same_tensors(family):
    wanted = family.base
    for source in (family.path("base"), family.path("base") / "model.safetensors", wanted):
        model = mk.load(source)
        assert_same(model.state_dict(), wanted)
        assert_same({name: model.tensor(name) for name in model}, wanted)


def test_names_of_a_mapping_come_in_the_order_of_its_file(family):
    shuffled = dict(sorted(family.base.items(), key=lambda row: row[0][::-1]))
    assert mk.load(shuffled).names == mk.load(family.path("base")).names


def test_nothing_is_read_but_headers_until_a_tensor_is_asked_for(tmp_path):
    path = tmp_path / "a.safetensors"
    save_file({"x": torch.ones(4), "y": torch.zeros(4)}, path)
    model = mk.load(path)
    content, times = bytearray(path.read_bytes()), path.stat().st_mtime_ns
    content[-32:-16] = torch.full((4,), 7.0).numpy().tobytes()  # the file of the same size
    path.write_bytes(content)
    os.utime(path, ns=(times, times))
    assert model.tensor("x").tolist() == [7.0] * 4


def test_a_file_that_changed_is_refused(tmp_path):
    path = tmp_path / "a.safetensors"
    save_file({"x": torch.ones(4)}, path)
    model = mk.load(path)
    os.truncate(path, path.stat().st_size - 4)
    with pytest.raises(mk.CheckpointError, match="changed since the plan was made"):
        model.tensor("x")


def test_a_module_stands_for_its_state_dict():
    module = torch.nn.Linear(2, 3)
    model = mk.load(module)
    assert model.names == ("bias", "weight")
    assert torch.equal(model.tensor("weight"), module.weight)
    assert not model.tensor("weight").requires_grad


def test_tensors_in_memory_are_used_where_they_are():
    tensor = torch.ones(3, 2)
    assert mk.load({"x": tensor}).tensor("x").data_ptr() == tensor.data_ptr()
    turned = mk.load({"x": tensor.T * torch.arange(3)}).tensor("x")
    assert turned.tolist() == [[0.0, 1.0, 2.0]] * 2


def test_a_loaded_model_is_loaded_once(family):
    model = mk.load(family.path("base"))
    assert mk.load(model) is model


def test_float8_is_read_as_it_is(tmp_path):
    tensor = torch.tensor([1.0, -2.0]).to(torch.float8_e4m3fn)
    save_file({"x": tensor}, tmp_path / "a.safetensors")
    found = mk.load(tmp_path / "a.safetensors").tensor("x")
    assert found.dtype == torch.float8_e4m3fn
    assert found.float().tolist() == [1.0, -2.0]


@pytest.mark.parametrize(
    ("source", "problem"),
    [
        (3, "found a value of type int, expected a model"),
        ({}, "a mapping without tensors"),
        ({"x": [1.0]}, "x: is of type list, expected a torch.Tensor"),
        ({1: torch.ones(1)}, "found the key 1"),
        ({"__metadata__": torch.ones(1)}, "found the key '__metadata__'"),
        ({"a\nb": torch.ones(1)}, "expected the name of a tensor"),
        ({"x": torch.ones(1, device="meta")}, "x: is a tensor without data"),
        ({"x": torch.ones(2).to_sparse()}, "x: is torch.sparse_coo, torch.float32"),
        ({"x": torch.ones(2, dtype=torch.complex128)}, "torch.complex128, expected a dense tensor"),
    ],
)
def test_what_is_no_model_is_a_usage_error(source, problem):
    with pytest.raises(mk.UsageError, match=problem.replace(".", r"\.")):
        mk.load(source)


def test_a_path_without_a_model_says_so(tmp_path):
    with pytest.raises(mk.CheckpointError, match="there is no such folder or file"):
        mk.load(tmp_path / "nothing")


@pytest.mark.parametrize(
    "name", ["a" * 5000, "a+" * 20 + "b", "a\0b", "~nobody/model", "~nobody+a"]
)
def test_paths_that_no_system_has_are_refused_like_others(name):
    with pytest.raises(mk.CheckpointError):
        mk.load(name)


def test_an_unknown_tensor_names_the_nearest(family):
    with pytest.raises(mk.UsageError, match="did you mean 'scale'"):
        mk.load(family.path("base")).shape("scal")


def test_every_dtype_has_its_place_in_that_order(tmp_path):
    rows = [d for d in DTYPES.values() if d.bits >= 8 and hasattr(torch, d.torch_name or "-")]
    raw = torch.zeros(8, dtype=torch.uint8)
    tensors = {d.name: raw[: d.bits // 8].clone().view(getattr(torch, d.torch_name)) for d in rows}
    assert len(tensors) > 12
    save_file(tensors, tmp_path / "a.safetensors")
    assert mk.load(tensors).names == mk.load(tmp_path / "a.safetensors").names
