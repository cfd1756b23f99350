"""The library in six lines, as a notebook would have it."""

from __future__ import annotations

import pytest
import torch

import merge_kit as mk
from tests.api.conftest import assert_same
from tests.toys import toy


def test_six_lines_do_what_they_say(tmp_path, monkeypatch):
    numbers = (("base", 1.0), ("code", 2.0), ("math", 4.0), ("toxic", 1.5))
    for name, value in numbers:
        toy(tmp_path / name, value)
    monkeypatch.chdir(tmp_path)

    base, code, math = map(mk.load, ("base", "code", "math"))
    task = (
        mk.TaskVector(code, base) + 0.5 * mk.TaskVector(math, base) - mk.TaskVector("toxic", base)
    )
    (base + 0.8 * task).save("merged")
    elected = mk.ties(base, [code, math], density=0.2).state_dict()
    a, b = torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0])
    between = mk.merge_tensors("slerp", [a, b], t=0.3)

    merged = mk.load("merged").tensor("lm_head.weight")
    assert merged.tolist() == pytest.approx([1 + 0.8 * (1 + 0.5 * 3 - 0.5)] * 4, rel=2.0**-23)
    assert_same(elected, mk.ties([code, math], base=base, weight=1.0, density=0.2).state_dict())
    # Of four elements one is kept (at least one): the first, and there 1 + (1 + 3) / 2.
    assert elected["lm_head.weight"].tolist() == [3.0, 1.0, 1.0, 1.0]
    assert between.norm() == pytest.approx(1.0, rel=2.0**-22)
