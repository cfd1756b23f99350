"""Models of other widths load in transformers, and compute and generate what they should."""

from __future__ import annotations

import narrow
import pytest
import torch
from narrow import INNER, KINDS, WIDER, change


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Let torch use one thread, which is the fastest for models as small as these."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Return a saved model of an architecture, made once."""
    made = {}

    def of(kind):
        if kind not in made:
            made[kind] = narrow.save(kind, tmp_path_factory.mktemp(kind) / kind)
        return made[kind]

    return of


def same_function(kind, before, after):
    """Hold a model to the logits of another (to rounding in float32) and to its text."""
    one, other = narrow.load(kind, before), narrow.load(kind, after)
    expected = narrow.logits(one)
    assert expected.std() > 0.05
    torch.testing.assert_close(narrow.logits(other), expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(narrow.generated(other), narrow.generated(one))


@pytest.mark.parametrize("kind", KINDS)
def test_a_padded_model_computes_what_it_did(kind, saved, tmp_path):
    change("pad", saved(kind), tmp_path / "out", **WIDER)
    same_function(kind, saved(kind), tmp_path / "out")
    config = narrow.load(kind, tmp_path / "out").config
    assert {key: getattr(config, key) for key in WIDER} == WIDER


@pytest.mark.parametrize("kind", KINDS)
def test_a_rotated_and_widened_model_computes_what_it_did(kind, saved, tmp_path):
    change("project", saved(kind), tmp_path / "out", **WIDER)
    same_function(kind, saved(kind), tmp_path / "out")


@pytest.mark.parametrize("kind", KINDS)
def test_a_rotation_alone_keeps_the_function(kind, saved, tmp_path):
    change("project", saved(kind), tmp_path / "out")
    same_function(kind, saved(kind), tmp_path / "out")


@pytest.mark.parametrize("method", ["crop", "project"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_narrowed_model_loads_and_generates(kind, method, saved, tmp_path):
    sizes = {
        "hidden_size": 20,
        "intermediate_size": 24,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
    }
    change(method, saved(kind), tmp_path / "out", **sizes)
    model = narrow.load(kind, tmp_path / "out")
    assert torch.isfinite(narrow.logits(model)).all()
    assert narrow.generated(model).shape == (2, 15)
    assert model.config.hidden_size == 20


@pytest.mark.parametrize("kind", INNER)
def test_other_architectures_take_a_wider_intermediate_size(kind, saved, tmp_path):
    change("pad", saved(kind), tmp_path / "out", intermediate_size=72)
    same_function(kind, saved(kind), tmp_path / "out")


@pytest.mark.parametrize("kind", INNER)
def test_other_architectures_take_a_narrower_intermediate_size(kind, saved, tmp_path):
    change("pad", saved(kind), tmp_path / "wide", intermediate_size=72)
    change("crop", tmp_path / "wide", tmp_path / "out", intermediate_size=48)
    same_function(kind, saved(kind), tmp_path / "out")
