"""Buffers of a worker: they stay, whatever steps take turns."""

from __future__ import annotations

import torch

from merge_kit.engine.workspace import ALIGN, Workspace


def test_steps_of_different_dtypes_take_turns_in_one_buffer():
    work = Workspace()
    wide = work.rows("models", 2, 1000, torch.float64)
    place, end = wide.data_ptr(), wide.data_ptr() + wide.stride(0) * 2 * 8
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        rows = work.rows("models", 2, 1000, dtype)
        assert rows.dtype == dtype
        assert place == rows.data_ptr()
        assert rows[1].data_ptr() + 1000 * dtype.itemsize <= end


def test_rows_are_contiguous_aligned_and_apart():
    rows = Workspace().rows("models", 3, 70, torch.float32)
    for i, row in enumerate(rows):
        row.fill_(i)
        assert row.is_contiguous()
        assert row.data_ptr() % (4 * ALIGN) == 0
    assert [row.unique().tolist() for row in rows] == [[0.0], [1.0], [2.0]]


def test_what_is_lent_at_the_same_time_is_apart():
    work = Workspace()
    with work.spare(10, torch.float64) as one, work.spare(10, torch.float32) as other:
        one.fill_(1)
        other.fill_(2)
        assert one.tolist() == [1.0] * 10
    with work.spare(10, torch.float32) as again:
        assert again.data_ptr() == one.data_ptr()
