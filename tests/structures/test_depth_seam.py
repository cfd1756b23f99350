"""Summed pairs against the equation in float64, for shares that are one number, a list, or many."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from merge_kit.errors import MergeKitError
from merge_kit.methods.depth_upscale import DepthUpscale
from merge_kit.plan.building import stage as stages
from tests import toys

SHAPES = {
    "self_attn.q_proj.weight": (6, 4),
    "mlp.up_proj.weight": (9, 4),
    "input_layernorm.weight": (4,),
    "gate": (),
}
HALF_UNIT = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8, torch.float64: 2.0**-53}
"""Most that one rounding to a dtype changes a number, relatively."""


def write(folder, layers: int, seed: int, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    tensors = {
        f"model.layers.{i}.{suffix}": torch.randn(shape, generator=generator).to(dtype)
        for i in range(layers)
        for suffix, shape in SHAPES.items()
    }
    toys.write(folder, tensors, toys.config(layers))
    return tensors


def spanned(anchors: list[float], place: int, places: int) -> float:
    """Return the value of a list at equal distances; of one place, the last."""
    x = (place / (places - 1) if places > 1 else 1.0) * (len(anchors) - 1)
    low = min(int(x), max(len(anchors) - 2, 0))
    high = anchors[min(low + 1, len(anchors) - 1)]
    return anchors[low] + (x - low) * (high - anchors[low])


def linear(low: torch.Tensor, high: torch.Tensor, t: float) -> torch.Tensor:
    return (1 - t) * low + t * high


def slerp(low: torch.Tensor, high: torch.Tensor, t: float) -> torch.Tensor:
    one, other = low.flatten(), high.flatten()
    theta = math.acos(max(-1.0, min(1.0, float(one @ other / (one.norm() * other.norm())))))
    if math.sin(theta) <= 1e-6:
        return linear(low, high, t)
    return (math.sin((1 - t) * theta) * low + math.sin(t * theta) * high) / math.sin(theta)


def assert_textbook(made, lower, upper, depths, overlap, shares, blend) -> None:
    """Hold a result to `overlap` sums between the layers of two copies."""
    n, k = depths
    for suffix in SHAPES:
        for out in range(n + k - overlap):
            found = made[f"model.layers.{out}.{suffix}"]
            j = out - (n - overlap)
            below, above = f"model.layers.{out}.{suffix}", f"model.layers.{j}.{suffix}"
            if j < 0:
                assert torch.equal(found, lower[below])
            elif j >= overlap:
                assert torch.equal(found, upper[above])
            else:
                low, high = lower[below].double(), upper[above].double()
                wanted = blend(low, high, shares[j])
                size = low.abs() + high.abs()
                # law 4, twice it where an angle is rounded; then one rounding to the dtype
                law = 2.0**-21 if blend is slerp else 2.0**-22
                bound = law * size + HALF_UNIT[found.dtype] * wanted.abs()
                assert ((found.double() - wanted).abs() <= bound).all()
    assert f"model.layers.{n + k - overlap}.gate" not in made


@pytest.mark.parametrize("blend", [linear, slerp])
@pytest.mark.parametrize("dtype", list(HALF_UNIT))
@pytest.mark.parametrize(
    ("n", "k", "overlap", "t"), [(4, 4, 2, None), (5, 3, 2, 0.2), (3, 5, 1, 1)]
)
def test_pairs_are_those_of_the_equation(tmp_path, blend, dtype, n, k, overlap, t):
    lower = write(tmp_path / "LOW", n, 1, dtype)
    upper = write(tmp_path / "HIGH", k, 2, dtype)
    share = "" if t is None else f", t: {t}"
    made = toys.merge(
        "merge_method: depth_upscale\nmodels: [{model: LOW}, {model: HIGH}]\n"
        f"parameters: {{overlap: {overlap}, overlap_mode: sum, blend: {blend.__name__}{share}}}",
        tmp_path,
    )
    shares = [0.5 if t is None else t] * overlap
    assert_textbook(made, lower, upper, (n, k), overlap, shares, blend)


@pytest.mark.parametrize("blend", [linear, slerp])
def test_pairs_of_one_model_are_those_of_the_equation(tmp_path, blend):
    model = write(tmp_path / "M", 5, 3, torch.float32)
    made = toys.merge(
        "merge_method: depth_upscale\nmodels: [{model: M}]\nbase_model: M\n"
        f"parameters: {{target_layers: 7, overlap_mode: sum, blend: {blend.__name__}, t: 0.3}}",
        tmp_path,
    )
    assert_textbook(made, model, model, (5, 5), 3, [0.3] * 3, blend)


def built(monkeypatch, folder, t: str, **parameters):
    """Return the tensors of a stage whose t the builder reads for itself."""
    method = DepthUpscale(overlap_mode="sum", **parameters)
    monkeypatch.setattr(stages, "structure_method", lambda _: method)
    text = "merge_method: depth_upscale\nmodels: [{model: LOW}, {model: HIGH}]\n"
    return toys.merge(f"{text}parameters: {{t: {t}}}\n", folder)


@pytest.mark.parametrize("blend", [linear, slerp])
@pytest.mark.parametrize("anchors", [[0.0, 1.0], [0.1, 0.9, 0.3], [0.4]])
@pytest.mark.parametrize("overlap", [1, 3])
def test_a_list_spans_the_seam(tmp_path, monkeypatch, blend, anchors, overlap):
    lower = write(tmp_path / "LOW", 4, 1, torch.float32)
    upper = write(tmp_path / "HIGH", 5, 2, torch.float32)
    made = built(monkeypatch, tmp_path, str(anchors), overlap=overlap, blend=blend.__name__)
    shares = [spanned(anchors, j, overlap) for j in range(overlap)]
    assert_textbook(made, lower, upper, (4, 5), overlap, shares, blend)


def test_a_fade_begins_with_the_lower_copy_and_ends_with_the_upper(tmp_path, monkeypatch):
    toys.toy(tmp_path / "LOW", layers=4, by_layer=1.0)
    toys.toy(tmp_path / "HIGH", layers=4, by_layer=100.0)
    made = built(monkeypatch, tmp_path, "[0, 1]", overlap=3)
    # pairs (2, 100), (3, 200), (4, 300) with shares 0, 1/2, 1
    assert toys.layers(made) == [1, 2, 101.5, 300, 400]


def test_filters_give_kinds_of_tensors_shares_of_their_own(tmp_path, monkeypatch):
    toys.toy(tmp_path / "LOW", layers=2, by_layer=1.0)
    toys.toy(tmp_path / "HIGH", layers=2, by_layer=10.0)
    t = "[{filter: mlp, value: 1}, {filter: self_attn, value: 0}]"
    made = built(monkeypatch, tmp_path, t, overlap=1)
    attention, mlp, norm = toys.SUFFIXES
    assert toys.layers(made, attention) == [1, 2, 20]
    assert toys.layers(made, mlp) == [1, 10, 20]
    assert toys.layers(made, norm) == [1, 6, 20]  # no filter of the list: the default, 0.5


def test_a_share_of_a_list_that_is_none_is_refused_where_it_stands(tmp_path, monkeypatch):
    toys.toy(tmp_path / "LOW", layers=2)
    toys.toy(tmp_path / "HIGH", layers=2)
    with pytest.raises(MergeKitError) as caught:
        built(monkeypatch, tmp_path, "[0, 1.25]", overlap=1)
    assert str(caught.value).startswith("<recipe>:3:17: t is 1.25, expected a number in [0, 1]")


def test_integers_of_a_pair_are_copied_where_they_agree(tmp_path):
    tensors = {f"model.layers.{i}.w": torch.full((2,), float(i)) for i in range(3)}
    tensors |= {f"model.layers.{i}.ids": torch.arange(3) for i in range(3)}
    toys.write(tmp_path / "M", tensors, toys.config(3))
    recipe = "merge_method: depth_upscale\nmodels: [{model: M}]\n"
    recipe += "parameters: {overlap: 2, overlap_mode: sum}\n"
    made = toys.merge(recipe, tmp_path)
    assert made["model.layers.1.ids"].tolist() == [0, 1, 2]
    assert made["model.layers.1.w"].tolist() == [0.5, 0.5]


@settings(max_examples=25, deadline=None)
@given(st.integers(2, 5), st.integers(2, 5), st.floats(0, 1), st.booleans(), st.data())
def test_equal_copies_stay_what_they_are(tmp_path_factory, n, k, t, flat, data):
    """Pairs of equal layers are that layer, at any share and by either blend."""
    folder = tmp_path_factory.mktemp("equal")
    toys.toy(folder / "LOW", 3.0, layers=n)
    toys.toy(folder / "HIGH", 3.0, layers=k)
    overlap = data.draw(st.integers(0, min(n, k) - 1))
    blend = "linear" if flat else "slerp"
    made = toys.merge(
        "merge_method: depth_upscale\nmodels: [{model: LOW}, {model: HIGH}]\n"
        f"parameters: {{overlap: {overlap}, overlap_mode: sum, blend: {blend}, t: {t!r}}}",
        folder,
    )
    # (1 - t) * 3 + t * 3: two products and a sum, each rounded to float32
    assert toys.layers(made) == pytest.approx([3.0] * (n + k - overlap), rel=2.0**-22)
