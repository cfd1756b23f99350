"""nuslerp: worked by hand, against the equation vector by vector, and what a vector is."""

from __future__ import annotations

from math import pi, sin, sqrt

import numpy as np
import pytest
import torch

from merge_kit.core.tensors import BLOCK
from merge_kit.methods import arcs
from merge_kit.methods.base import PerModel
from merge_kit.methods.nuslerp import NuSlerp
from tests.methods.vectors import KINDS, exact, length, merged, numbers, within_law_4

MODES = {
    "flat": {},
    "last axis": {"nuslerp_flatten": False},
    "first axis": {"nuslerp_flatten": False, "nuslerp_row_wise": True},
}
HALF = sin(pi / 4)


def make(*weights, **more):
    return NuSlerp(weight=PerModel(weights), **more)


def arc(one, other, t):
    """Return the terms of one arc between two vectors."""
    u, v = one / length(one), other / length(other)
    theta = 2 * np.arctan2(length(u - v), length(u + v))
    if np.sin(theta) <= 1e-6:
        return (1 - t) * one, t * other
    return np.sin((1 - t) * theta) / np.sin(theta) * one, np.sin(t * theta) / np.sin(theta) * other


def terms(models, base, t, mode):
    one, other = models if base is None else (x - base for x in models)
    shape = one.shape
    if mode == "flat":
        one, other = one.reshape(1, -1), other.reshape(1, -1)
    elif mode == "last axis":
        one, other = one.reshape(-1, shape[-1]), other.reshape(-1, shape[-1])
    else:
        one, other = one.reshape(shape[0], -1).T, other.reshape(shape[0], -1).T
    pairs = [arc(u, v, t) for u, v in zip(one, other, strict=True)]
    parts = [np.stack(side) for side in zip(*pairs, strict=True)]
    parts = [p.T.reshape(shape) if mode == "first axis" else p.reshape(shape) for p in parts]
    return parts if base is None else [base, *parts]


@pytest.mark.parametrize(
    ("weights", "t"),
    [
        ((1.0, 1.0), 0.5),
        ((3.0, 1.0), 0.25),
        ((0.0, 2.0), 1.0),
        ((2.0, -1.0), -1.0),
        ((0.0, 0.0), 0.5),
        ((1.0, -1.0), 0.5),
    ],
)
def test_the_share_of_the_second_model_is_t(tmp_path, weights, t):
    result = merged(make(*weights), [[2.0, 0.0], [0.0, 4.0]], None, tmp_path)
    wanted = [2 * sin((1 - t) * pi / 2), 4 * sin(t * pi / 2)]
    assert result.tolist() == pytest.approx(wanted, abs=1e-6)


def test_what_a_vector_is(tmp_path):
    one = [[1.0, 0.0], [0.0, 0.0]]
    other = [[0.0, 1.0], [1.0, 0.0]]
    found = {
        name: merged(make(1.0, 1.0, **mode), [one, other], None, tmp_path / name).tolist()
        for name, mode in MODES.items()
    }
    # rows: (1, 0) and (0, 1) at right angles; (0, 0) and (1, 0), linear
    assert found["last axis"] == [pytest.approx([HALF, HALF]), [0.5, 0.0]]
    # columns: (1, 0) and (0, 1) at right angles; (0, 0) and (1, 0), linear
    assert found["first axis"] == [pytest.approx([HALF, 0.5]), pytest.approx([HALF, 0.0])]
    # whole: at right angles, of lengths 1 and sqrt(2)
    assert found["flat"] == [pytest.approx([HALF, HALF]), pytest.approx([HALF, 0.0])]


def test_row_wise_means_nothing_where_tensors_are_flat(tmp_path):
    base, *models = numbers("independent", 2, (6, 5))
    one = merged(make(1.0, 2.0, nuslerp_row_wise=True), models, base, tmp_path / "a")
    assert torch.equal(one, merged(make(1.0, 2.0), models, base, tmp_path / "b"))


def test_with_a_base_task_vectors_turn(tmp_path):
    result = merged(make(1.0, 1.0), [[12.0, 5.0], [10.0, 9.0]], [10.0, 5.0], tmp_path)
    assert result.tolist() == pytest.approx([10 + 2 * HALF, 5 + 4 * HALF])


@pytest.mark.parametrize("has_base", [False, True])
@pytest.mark.parametrize("kind", ["independent", "fine-tunes", "mixed sizes", "unequal"])
@pytest.mark.parametrize("mode", MODES)
def test_against_the_equation(tmp_path, mode, kind, has_base):
    base, *models = numbers(kind, 2, (70, 130))
    base = base if has_base else None
    method = make(2.0, 1.0, **MODES[mode])
    result = merged(method, models, base, tmp_path)
    ground = None if base is None else exact(base)
    within_law_4(method, result, terms([exact(m) for m in models], ground, 1 / 3, mode))


@pytest.mark.parametrize("shape", [(2, 3, 4), (1, 5), (5, 1), (7,), (2, 2 * arcs.PIECE + 5)])
@pytest.mark.parametrize("mode", MODES)
def test_shapes_against_the_equation(tmp_path, mode, shape):
    _, *models = numbers("independent", 2, shape)
    method = make(2.0, 1.0, **MODES[mode])
    result = merged(method, models, None, tmp_path)
    within_law_4(method, result, terms([exact(m) for m in models], None, 1 / 3, mode))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("shape", [(), (1,), (0,), (0, 3), (3, 0)])
def test_every_shape_is_merged(tmp_path, mode, shape):
    for base in (None, torch.ones(shape)):
        folder = tmp_path / str(base is None)
        result = merged(
            make(1.0, 1.0, **MODES[mode]), [torch.full(shape, 2.0), torch.full(shape, 4.0)],
            base, folder,
        )  # fmt: skip
        assert torch.equal(result, torch.full(shape, 3.0))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("scale", [1.0, 1e-9, 1e-37])
def test_degenerate_pairs_are_linear(tmp_path, mode, scale):
    pairs = {
        "opposite": ([[scale, scale]], [[-scale, -scale]], 0.4),
        "zero": ([[0.0, 0.0]], [[scale, scale]], 0.3),
        "parallel": ([[scale, scale]], [[2 * scale, 2 * scale]], 1.3),
    }
    for name, (one, other, wanted) in pairs.items():
        result = merged(make(0.7, 0.3, **MODES[mode]), [one, other], None, tmp_path / name)
        assert result.tolist()[0] == pytest.approx([wanted * scale] * 2, rel=1e-6, abs=1e-44)


@pytest.mark.parametrize("mode", MODES)
def test_short_vectors_have_their_angle(tmp_path, mode):
    one, other = ([[1e-20], [0.0]], [[0.0], [1e-20]])
    if mode == "last axis":
        one, other = [[1e-20, 0.0]], [[0.0, 1e-20]]
    result = merged(make(1.0, 1.0, **MODES[mode]), [one, other], None, tmp_path).flatten()
    assert (result / 1e-20).tolist() == pytest.approx([HALF, HALF])


@pytest.mark.parametrize("mode", ["last axis", "first axis"])
@pytest.mark.parametrize("shape", [(7, 30_011), (40_000, 4)])
def test_slab_size_and_threads_change_no_bit(tmp_path, mode, shape):
    base, *models = numbers("fine-tunes", 2, shape)
    method = make(1.0, 2.0, **MODES[mode])
    results = [
        merged(method, models, base, tmp_path / f"{b}{w}", blocks=b, workers=w)
        for b, w in ((1, 1), (2, 2), (5, 2))
    ]
    assert all(torch.equal(results[0], other) for other in results[1:])


@pytest.mark.parametrize("columns", [1, 3, 37, arcs.PIECE + 1])
@pytest.mark.parametrize("transposed", [False, True])
def test_the_angle_of_a_vector_is_the_same_alone_and_among_others(columns, transposed):
    left, right = numbers("independent", 1, (7, columns))
    if transposed:
        left, right = (x.t().contiguous().t() for x in (left, right))
    together = arcs.angles(left, right)
    for i in range(7):
        assert arcs.angles(left[i : i + 1], right[i : i + 1]) == [together[i]]
        assert arcs.angles(left[i:], right[i:])[0] == together[i]


def test_groups_of_vectors_hold_a_block_at_most():
    for vectors, elements in ((10**6, 1), (100, 1000), (5, 10**6), (3, 0)):
        runs = [range(vectors)[run] for run in arcs.groups(vectors, elements)]
        assert [i for run in runs for i in run] == list(range(vectors))
        longest = max(len(run) for run in runs)
        assert longest * min(elements, arcs.PIECE) <= BLOCK


def test_each_kind_is_another_result(tmp_path):
    _, *models = numbers(KINDS[0], 2, (9, 8))
    found = [merged(make(1.0, 2.0, **m), models, None, tmp_path / k) for k, m in MODES.items()]
    assert not torch.allclose(found[0], found[1])
    assert not torch.allclose(found[1], found[2])
    transposed = merged(
        make(1.0, 2.0, **MODES["last axis"]), [m.t() for m in models], None, tmp_path / "t"
    )
    torch.testing.assert_close(transposed.t(), found[2])


def test_opposite_vectors_pass_through_zero(tmp_path):
    models = [[3.0, 4.0], [-3.0, -4.0]]
    for i, weight in enumerate((0.25, 0.5, 0.3)):
        result = merged(make(1 - weight, weight), models, None, tmp_path / str(i))
        assert float(result.norm()) == pytest.approx(5 * (1 - 2 * weight), abs=1e-6)
    assert sqrt(3.0**2 + 4.0**2) == 5
