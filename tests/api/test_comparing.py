from __future__ import annotations

import pytest
import torch

import merge_kit as mk
from tests.api.conftest import SHAPES


def task(**tensors: list[float]) -> mk.TaskVector:
    names = {name.replace("__", "."): torch.tensor(row) for name, row in tensors.items()}
    return mk.TaskVector(names, {name: torch.zeros_like(row) for name, row in names.items()})


ONE = task(h__2__w=[3.0, 4.0], h__10__w=[1.0, 0.0], h__2__b=[0.0], head=[2.0, -2.0])
OTHER = task(h__2__w=[3.0, -4.0], h__10__w=[0.0, 1.0], h__2__b=[5.0], head=[-1.0, 1.0])


def test_lengths_by_tensor_and_by_layer_worked_by_hand():
    by_tensor = {"h.2.b": 0.0, "h.2.w": 5.0, "h.10.w": 1.0, "head": 8**0.5}
    assert ONE.norms() == by_tensor
    assert list(ONE.norms()) == list(by_tensor)  # 2 before 10
    assert OTHER.norms(by="layer") == {"h.2": 50**0.5, "h.10": 1.0, "head": 2**0.5}
    assert ONE.norm() == pytest.approx((25 + 1 + 8) ** 0.5, rel=1e-15)
    with pytest.raises(mk.UsageError, match="by is 'row', expected 'tensor' or 'layer'"):
        ONE.norms(by="row")


def test_a_comparison_has_rows_by_tensor_by_layer_and_in_all():
    found = ONE.compare(OTHER)
    rows = {row.name: (row.norms, row.cosine, row.sign_conflict) for row in found.tensors}
    assert rows == {
        "h.2.b": ((0.0, 5.0), None, None),
        "h.2.w": ((5.0, 5.0), pytest.approx((9 - 16) / 25, abs=1e-15), 0.5),
        "h.10.w": ((1.0, 1.0), 0.0, None),
        "head": ((8**0.5, 2**0.5), pytest.approx(-1.0, abs=1e-15), 1.0),
    }
    assert [(r.name, r.elements, r.sign_conflict) for r in found.layers] == [
        ("h.2", 3, 0.5),
        ("h.10", 2, None),
        ("head", 2, 1.0),
    ]
    assert (found.total.both, found.total.conflicts, found.total.elements) == (4, 3, 7)
    assert found.total.cosine == ONE.cosine(OTHER)


def test_a_comparison_is_a_table_as_text():
    lines = str(ONE.compare(OTHER)).splitlines()
    assert lines[0].split() == ["norm", "other", "cosine", "sign", "conflict"]
    assert lines[1].split() == ["h.2", "5", "7.071", "-0.1980", "0.5000"]
    assert lines[2].split() == ["h.10", "1", "1", "0.0000", "-"]
    assert lines[4].split()[0] == "all"
    assert len(lines) == 5


def test_conflicts_of_signs_of_two_and_of_three():
    assert ONE.sign_conflict(OTHER) == 0.75
    assert ONE.sign_conflict(ONE) == 0.0
    assert ONE.sign_conflict() == 0.0
    first, second, third = (
        task(w=row) for row in ([1.0, 1.0, 0.0], [2.0, 0.0, 0.0], [1.0, -1.0, 3.0])
    )
    assert first.sign_conflict(second, third) == 0.5  # agree, differ, only one is not zero
    assert first.sign_conflict(-1 * second) == 1.0


def test_counts_are_exact_over_many_blocks(family):
    one, other = mk.TaskVector(family.code, family.base), mk.TaskVector(family.math, family.base)
    found = one.compare(other).total
    pairs = [
        (
            family.code[n].float() - family.base[n].float(),
            family.math[n].float() - family.base[n].float(),
        )
        for n in SHAPES
    ]
    assert found.both == sum(int(((a != 0) & (b != 0)).sum()) for a, b in pairs)
    assert found.conflicts == sum(int((a * b < 0).sum()) for a, b in pairs)
    on_disk = mk.TaskVector(family.path("code"), family.path("base")).compare(
        mk.TaskVector(family.path("math"), family.path("base"))
    )
    assert on_disk == one.compare(other)


def test_pruned_task_vectors_are_compared_too():
    kept = task(w=[1.0, -4.0, 2.0, 0.5]).prune(0.5)
    assert kept.norm() == pytest.approx(20**0.5, rel=1e-15)
    assert kept.sign_conflict(task(w=[-1.0, 4.0, 1.0, 1.0])) == 0.5


def test_what_is_pruned_over_the_whole_model_is_measured(tmp_path):
    kept = task(a=[3.0, 4.0], b=[1.0, 1.0]).prune(0.5, scope="model")
    assert kept.norm() == 5.0
    assert kept.norms() == {"a": 5.0, "b": 0.0}
    assert mk.TaskVector.load(kept.save(tmp_path / "d")).norm() == 5.0
