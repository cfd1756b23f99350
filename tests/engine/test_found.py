"""What was found is read back as it was written, or not at all."""

from __future__ import annotations

import pytest
import torch

from merge_kit.engine.found import read_found, write_found
from merge_kit.errors import OutputError

FOUND = {
    "rows": torch.arange(6.0).view(2, 3),
    "order": torch.tensor([2, 0, 1]),
    "none": torch.ones(0),
}


def test_what_is_written_is_read(tmp_path):
    path = tmp_path / "found-a.safetensors"
    assert read_found(path) is None
    write_found(path, FOUND | {"turned": FOUND["rows"].T})
    read = read_found(path)
    assert read is not None
    assert torch.equal(read.pop("turned"), FOUND["rows"].T)
    assert read.keys() == FOUND.keys()
    assert all(torch.equal(read[name], tensor) for name, tensor in FOUND.items())
    assert [one.name for one in tmp_path.iterdir()] == [path.name]


def test_any_bit_that_is_changed_is_noticed(tmp_path):
    path = tmp_path / "found-a.safetensors"
    write_found(path, FOUND)
    raw = path.read_bytes()
    for place in range(len(raw)):
        path.write_bytes(raw[:place] + bytes([raw[place] ^ 4]) + raw[place + 1 :])
        read = read_found(path)
        same = read is not None and all(torch.equal(read[n], FOUND[n]) for n in FOUND)
        assert read is None or same, place  # the header has spaces that mean nothing


def test_a_disk_that_refuses_is_an_error_with_an_action(tmp_path):
    with pytest.raises(OutputError, match=r"found-a.safetensors: cannot write: .*\n  hint: check"):
        write_found(tmp_path / "missing" / "found-a.safetensors", FOUND)
