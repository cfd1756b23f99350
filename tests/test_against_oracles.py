"""Whole merges against oracles in extended precision and in fractions, on hostile numbers."""

from __future__ import annotations

import json
from fractions import Fraction
from math import copysign, floor, frexp, inf

import numpy as np
import pytest
import torch

from merge_kit.errors import MismatchError, NonFiniteError
from tests.toys import merge, plan, write

SIZE = 515
WIDE = np.longdouble
NAMES = {torch.float32: "float32", torch.float64: "float64"}
LEAST = {torch.float32: 2.0**-149, torch.float64: 2.0**-1074}


@pytest.fixture
def folder(tmp_path):
    return tmp_path


def merged(folder, tensors, method: str, *, weights=None, base=False, parameters=None, **more):
    """Return the merge of tensors, one a model; the first is the base if there is one."""
    for i, tensor in enumerate(tensors):
        if not (folder / f"m{i}").exists():
            write(folder / f"m{i}", {"x": tensor}, None)
    models = [{"model": f"m{i}"} for i in range(base, len(tensors))]
    for model, weight in zip(models, weights or (), strict=False):
        model["parameters"] = {"weight": weight}
    more = {"base_model": "m0", **more} if base else more
    recipe = {"merge_method": method, "models": models, "parameters": parameters or {}, **more}
    return merge(json.dumps(recipe), folder)["x"]


def exact(tensor):
    return tensor.double().numpy().ravel().astype(WIDE)


def summed(tensors, weights, *, normalize):
    """Return sum(w x) and sum(|w x|), both divided by sum(w) if they are normalised."""
    factors = [WIDE(w) for w in weights]
    total = sum(factors) if normalize else WIDE(1)
    terms = [w / total * exact(t) for w, t in zip(factors, tensors, strict=True)]
    return sum(terms), sum(np.abs(t) for t in terms)


def task_vectors(base, tensors, weights, factor):
    """Return base + factor * sum(w (x - base)), and what rounding is measured by."""
    start, pairs = exact(base), list(zip(weights, map(exact, tensors), strict=True))
    result = start + sum(WIDE(factor) * WIDE(w) * (x - start) for w, x in pairs)
    return result, np.abs(start) + sum(
        abs(factor * w) * (np.abs(x) + np.abs(start)) for w, x in pairs
    )


def arc(base, other, t):
    """Return the point at t of the arc between two vectors, and what rounding is measured by."""
    b, x, t = exact(base), exact(other), WIDE(t)
    lengths = np.sqrt(np.sum(b * b)), np.sqrt(np.sum(x * x))
    factors = 1 - t, t
    if min(lengths) > 0:
        u, v = b / lengths[0], x / lengths[1]
        theta = 2 * np.arctan2(np.sqrt(np.sum((u - v) ** 2)), np.sqrt(np.sum((u + v) ** 2)))
        if np.sin(theta) > WIDE("1e-6"):
            factors = np.sin((1 - t) * theta) / np.sin(theta), np.sin(t * theta) / np.sin(theta)
    return (
        factors[0] * b + factors[1] * x,
        np.abs(factors[0] * b) + np.abs(factors[1] * x),
    )


def is_close(result, wanted, mass, factor=1.0) -> bool:
    """Return whether the result is within law 4's measure, or the least number's rounding."""
    error = np.abs(exact(result) - wanted)
    return bool(np.all(error <= 2.0**-22 * factor * mass + 2 * len(wanted) * LEAST[result.dtype]))


def numbers(count: int, size: float, dtype, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shape = (count, SIZE)
    values = torch.randn(shape, generator=generator, dtype=torch.float64).clamp(-1, 1) * size
    return list(values.to(dtype))


SIZES = {
    torch.float32: (1.0, 1e-41, 3.4e38),
    torch.bfloat16: (1.0, 1e-40, 3.38e38),
    torch.float16: (1.0, 1e-7, 65504.0),
    torch.float64: (1.0, 1e-310, 1.7e308),
}
CASES = [(dtype, size) for dtype, sizes in SIZES.items() for size in sizes]


@pytest.mark.parametrize("count", [2, 5, 50])
@pytest.mark.parametrize(("dtype", "size"), CASES)
def test_averages_of_tiny_and_huge_numbers(folder, dtype, size, count):
    tensors = numbers(count, size, dtype)
    weights = [0.1 + 0.9 * i / count for i in range(count)]
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    result = merged(folder, tensors, "linear", weights=weights, dtype=NAMES[wide])
    assert is_close(result, *summed(tensors, weights, normalize=True))


@pytest.mark.parametrize("count", [2, 5, 50])
@pytest.mark.parametrize(("dtype", "size"), CASES)
def test_task_vectors_of_tiny_and_huge_numbers(folder, dtype, size, count):
    base, *tensors = numbers(count, size / 3 if size > 1e30 else size, dtype)
    weights = [(0.1 + 0.9 * i / count) / count for i in range(count - 1)]
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    result = merged(
        folder,
        [base, *tensors],
        "task_arithmetic",
        weights=weights,
        base=True,
        parameters={"lambda": -0.7},
        dtype=NAMES[wide],
    )
    assert is_close(result, *task_vectors(base, tensors, weights, -0.7), 2.0)


@pytest.mark.parametrize("count", [2, 4, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sums_that_cancel(folder, dtype, count):
    (first,) = numbers(1, 1.0, torch.float64)
    tensors = [(first * (1 + 1e-6 * i)).to(dtype) for i in range(count)]
    weights = [(-1.0) ** i * (1 + i * 1e-7) for i in range(count)]
    options = {"parameters": {"normalize": False}, "dtype": "float32"}
    result = merged(folder, tensors, "linear", weights=weights, **options)
    assert is_close(result, *summed(tensors, weights, normalize=False))


@pytest.mark.parametrize(
    "weights",
    [(1e-30, 1e30), (1e30, 1e-30), (1e-30, 1e-30), (1e-40, 1e-40), (1e-40, 1.0), (1e39, 1e-5)],
)
@pytest.mark.parametrize("normalize", [True, False])
def test_weights_beyond_float32(folder, weights, normalize):
    """What one weight makes tiny is all there is where the other model is zero."""
    left, right = numbers(2, 10.0, torch.float32)
    left[1::2], right[::2] = 0, 0
    left, right = (
        tensor * (1e30 if weight < 1 else 1e-35)
        for tensor, weight in zip((left, right), weights, strict=True)
    )
    options = {"parameters": {"normalize": normalize}, "dtype": "float32"}
    result = merged(folder, [left, right], "linear", weights=weights, **options)
    assert is_close(result, *summed([left, right], weights, normalize=normalize))


def test_weights_that_overflow_are_an_error_in_words(folder):
    tensors = numbers(2, 1.0, torch.float32)
    options = {"parameters": {"normalize": False}}
    with pytest.raises(NonFiniteError, match="too large for F32"):
        merged(folder, tensors, "linear", weights=(1.0, 1e300), **options)


ANGLES = (1.5, 0.1, 1e-3, 1e-5, 3e-6, 1.1e-6, 9e-7, 1e-7, 1e-8, 0.0)


@pytest.mark.parametrize("flatten", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("sign", [1, -1])
def test_arcs_at_all_angles(folder, sign, dtype, flatten):
    """Close to parallel and close to opposite, inside the arc and beyond its ends."""
    for angle in ANGLES:
        base, side = numbers(2, 1.0, torch.float64, seed=int(angle * 1e9) % 1000)
        side -= base * (base @ side) / (base @ base)
        side *= base.norm() / side.norm()
        other = sign * 1.7 * (base * np.cos(angle) + side * np.sin(angle))
        tensors = [base.to(dtype), other.to(dtype)]
        for t in (0.3, -0.5, 1.5):
            place = folder / f"{angle}-{t}"
            place.mkdir()
            options = {"parameters": {"t": t, "flatten": flatten}, "dtype": NAMES[dtype]}
            result = merged(place, tensors, "slerp", base=True, **options)
            assert is_close(result, *arc(*tensors, t), 2.0), (angle, t)


@pytest.mark.parametrize(
    ("dtype", "size"), [c for c in CASES if c[0] != torch.float64] + [(torch.float64, 1e150)]
)
@pytest.mark.parametrize("t", [0.0, 0.3, 1.0])
def test_arcs_of_tiny_and_huge_numbers(folder, dtype, size, t):
    base, other = numbers(2, size / 2 if size > 1 else size, dtype)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    options = {"parameters": {"t": t}, "dtype": NAMES[wide]}
    result = merged(folder, [base, other], "slerp", base=True, **options)
    assert is_close(result, *arc(base, other, t), 2.0)


@pytest.mark.parametrize("flatten", [True, False])
def test_an_arc_is_a_line_where_float64_loses_the_length(folder, flatten):
    base, other = numbers(2, 1e-200, torch.float64)
    options = {"parameters": {"t": 0.25, "flatten": flatten}}
    result = merged(folder, [base, other], "slerp", base=True, **options)
    assert torch.equal(result, other * 0.25 + base * 0.75)


MIXED = [
    (torch.float64, torch.bfloat16, torch.float64),
    (torch.bfloat16, torch.float64, torch.float64),
    (torch.float16, torch.bfloat16, torch.float32),
    (torch.float32, torch.float16, torch.float32),
]


@pytest.mark.parametrize(("left", "right", "out"), MIXED)
def test_inputs_of_two_dtypes_are_promoted(folder, left, right, out):
    tensors = [numbers(1, 1.0, left)[0], numbers(1, 1.0, right, seed=1)[0]]
    average = merged(folder, tensors, "linear", weights=[0.3, 0.9])
    assert average.dtype == out
    assert is_close(average, *summed(tensors, [0.3, 0.9], normalize=True))
    added = merged(folder, tensors, "task_arithmetic", weights=[0.3], base=True)
    assert added.dtype == out
    assert is_close(added, *task_vectors(*tensors[:1], tensors[1:], [0.3], 1.0), 2.0)
    between = merged(folder, tensors, "slerp", base=True, parameters={"t": 0.3})
    assert between.dtype == out
    assert is_close(between, *arc(*tensors, 0.3), 2.0)


# One rounding, checked in fractions.

FORMATS = {"bfloat16": (8, -126, 127), "float16": (11, -14, 15), "float32": (24, -126, 127)}
"""Bits of the significand, least and greatest exponent of normal numbers."""


def rounded(value: float, dtype: str) -> float:
    """Return a number rounded to nearest, ties to even, by exact arithmetic."""
    bits, low, high = FORMATS[dtype]
    if value == 0:
        return value
    quantum = Fraction(2) ** (max(frexp(value)[1] - 1, low) - bits + 1)
    steps = abs(Fraction(value)) / quantum
    whole = floor(steps)
    rest = steps - whole
    whole += rest > Fraction(1, 2) or (rest == Fraction(1, 2) and whole % 2)
    found = whole * quantum
    return copysign(inf if found >= Fraction(2) ** (high + 1) else float(found), value)


def hostile(dtype: str, wide: torch.dtype) -> torch.Tensor:
    """Return numbers at and beside the ties of a dtype, tiny, huge and of random bits."""
    bits, low, high = FORMATS[dtype]
    ties = [(1 + (k + 0.5) * 2.0 ** (1 - bits)) for k in (0, 1, 2, 5)]
    places = (0, 3, low, low - bits // 2, low - bits + 1, low - bits, high - 1)
    beside = (0.0, 2.0**-20, -(2.0**-20), 2.0**-30, -(2.0**-30), 2.0**-51, -(2.0**-51))
    values = [t * (1 + b) * 2.0**p for t in ties for b in beside for p in places]
    kind = torch.int64 if wide == torch.float64 else torch.int32
    generator = torch.Generator().manual_seed(1)
    info = torch.iinfo(kind)
    random = torch.randint(info.min, info.max, (3000,), dtype=kind, generator=generator).view(wide)
    largest = (2.0 - 2.0 ** (1 - bits)) * 2.0**high
    everything = torch.cat([torch.tensor(values, dtype=torch.float64).to(wide), random])
    everything = torch.cat([everything, -everything, torch.tensor([0.0, -0.0, largest]).to(wide)])
    return everything[everything.abs() <= largest]


@pytest.mark.parametrize("wide", [torch.float32, torch.float64])
@pytest.mark.parametrize("dtype", FORMATS)
@pytest.mark.parametrize("method", ["convert", "scale"])
def test_the_result_is_rounded_once(folder, method, dtype, wide):
    values = hostile(dtype, wide)
    scale = {"scale": 0.75} if method == "scale" else {}
    exactly = merged(folder, [values], "passthrough", parameters=scale, dtype=NAMES[wide])
    result = merged(folder, [values], "passthrough", parameters=scale, dtype=dtype)
    wanted = torch.tensor([rounded(v, dtype) for v in exactly.tolist()], dtype=torch.float64)
    assert torch.equal(result.double().view(torch.int64), wanted.view(torch.int64))


@pytest.mark.parametrize("count", [3, 20])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_sum_of_many_models_is_rounded_once(folder, dtype, count):
    """In float64 above four models: float32 in between would round ties twice."""
    (large,) = numbers(1, 1.0, torch.float32)
    large = torch.tensor([rounded(v, dtype) for v in large.tolist()])
    tie = large * 2.0 ** -FORMATS[dtype][0]
    small = [torch.full((SIZE,), 2.0**-40 * (-1) ** i) for i in range(SIZE)][: count - 2]
    tensors, weights = [large, tie, *small], [1.0] * count
    options = {"weights": weights, "parameters": {"normalize": False}}
    result = merged(folder, tensors, "linear", dtype=dtype, **options)
    wide = "float32" if count <= 4 else "float64"
    exactly = merged(folder, tensors, "linear", dtype=wide, **options)
    assert result.tolist() == [rounded(v, dtype) for v in exactly.tolist()]


def test_the_largest_float16_and_what_rounds_beyond_it(folder):
    values = torch.tensor([65504.0, 65519.996, -65519.996])
    write(folder / "a", {"x": values}, None)
    text = "{{merge_method: passthrough, models: [{{model: {}}}], dtype: float16}}"
    assert merge(text.format("a"), folder)["x"].tolist() == [65504, 65504, -65504]
    write(folder / "b", {"x": torch.tensor([65520.0])}, None)
    with pytest.raises(NonFiniteError, match="too large for F16"):
        merge(text.format("b"), folder)


# What is copied keeps every bit.

PAYLOADS = {
    torch.float64: (torch.int64, [0x7FF0000000000001, 0x7FF8DEADBEEF0000, -1, -(2**63), 1]),
    torch.float32: (torch.int32, [0x7F800001, 0x7FC0BEEF, -1, -(2**31), 1]),
    torch.float16: (torch.int16, [0x7C01, 0x7E0F, -1, -(2**15), 1]),
    torch.bfloat16: (torch.int16, [0x7F81, 0x7FC5, -1, -(2**15), 1]),
}


@pytest.mark.parametrize("dtype", PAYLOADS)
def test_a_copy_keeps_nan_payloads_minus_zero_and_denormals(folder, dtype):
    kind, bits = PAYLOADS[dtype]
    values = torch.tensor(bits, dtype=kind).view(dtype)
    assert torch.equal(merged(folder, [values], "passthrough").view(kind), values.view(kind))


def test_an_average_of_minus_zeros_is_minus_zero(folder):
    zeros = torch.full((40,), -0.0)
    result = merged(folder, [zeros, zeros], "linear", weights=[0.5, 0.5], dtype="bfloat16")
    assert torch.signbit(result).all()


def test_nan_is_refused_and_says_where_it_came_from(folder):
    tensors = numbers(2, 1.0, torch.float32)
    tensors[1][7] = float("nan")
    with pytest.raises(NonFiniteError, match=r"1 NaN or infinite .* input-2:m1"):
        merged(folder, tensors, "linear", weights=[1.0, 0.0])


INTEGERS = [
    torch.int8,
    torch.int16,
    torch.int32,
    torch.int64,
    torch.uint8,
    torch.uint16,
    torch.uint32,
    torch.uint64,
    torch.bool,
]


@pytest.mark.parametrize("kind", INTEGERS)
def test_integers_of_every_dtype_are_copied_or_refused(folder, kind):
    for name, last in (("a", 1), ("b", 1), ("c", 0)):
        numbers = {"x": torch.tensor([0, 1, last]).to(kind)}
        more = {"none": torch.zeros(0, 3).to(kind), "one": torch.tensor(1).to(kind)}
        write(folder / name, {**numbers, **more, "w": torch.ones(2)}, None)
    two = (
        "{{merge_method: linear, models: [{{model: a}}, {{model: {}}}], parameters: {{weight: 1}}}}"
    )
    result = merge(two.format("b"), folder)
    assert {tensor.dtype for name, tensor in result.items() if name != "w"} == {kind}
    assert result["x"].long().tolist() == [0, 1, 1]
    assert result["none"].shape == (0, 3)
    assert result["one"].item() == 1
    with pytest.raises(MismatchError, match="values differ between input-1:a and input-2:c"):
        merge(two.format("c"), folder)
    scaled = "{merge_method: passthrough, models: [{model: a}], parameters: {scale: 3}}"
    assert merge(scaled, folder)["x"].long().tolist() == [0, 1, 1]
    assert plan(scaled, folder).counts() == (1, 3, 0)
