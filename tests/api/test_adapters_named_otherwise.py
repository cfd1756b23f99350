"""Task vectors of adapters that name one module otherwise, or say otherwise how it is stored."""

from __future__ import annotations

import pytest
import torch

import merge_kit as mk
from tests.api.low_rank import UP, Q, deltas, factors, write_adapter


def renamed(tensors, old, new):
    return {name.replace(f".{old}.layers", f".{new}.layers"): t for name, t in tensors.items()}


@pytest.mark.parametrize("new", ["model.language_model", "language_model.model", "text.model"])
def test_one_adapter_by_two_names_has_the_cosine_1(tmp_path, new):
    tensors = factors(1, Q)
    one = write_adapter(tmp_path / "one", tensors)
    other = write_adapter(tmp_path / "other", renamed(tensors, "model", new))
    vectors = [mk.TaskVector.from_adapter(path) for path in (one, other)]
    assert vectors[0].cosine(vectors[1]) == pytest.approx(1.0)
    assert vectors[0].sign_conflict(vectors[1]) == 0


def test_a_sum_has_the_names_of_the_first(tmp_path):
    first, second = factors(1, Q), factors(9, UP)
    one = write_adapter(tmp_path / "one", first)
    other = write_adapter(tmp_path / "other", renamed(second, "model", "language_model.model"))
    both = mk.TaskVector.from_adapter(one) + mk.TaskVector.from_adapter(other)
    found, wanted = both.state_dict(), deltas(first) | deltas(second)
    assert found.keys() == wanted.keys()
    assert all(torch.allclose(found[n].double(), wanted[n], atol=1e-5) for n in wanted)


def test_names_that_do_not_tell_are_refused(tmp_path):
    tensors = factors(1, Q)
    one = write_adapter(tmp_path / "one", renamed(tensors, "model", "left"))
    other = write_adapter(tmp_path / "other", renamed(tensors, "model", "right"))
    with pytest.raises(mk.MergeKitError, match="do not tell"):
        mk.TaskVector.from_adapter(one).cosine(mk.TaskVector.from_adapter(other))


@pytest.mark.parametrize("flags", [(True, False), (False, True)])
def test_the_way_a_weight_is_stored_is_no_part_of_its_change(tmp_path, flags):
    one, other = (
        mk.TaskVector.from_adapter(
            write_adapter(tmp_path / f"{flag}", factors(1, Q), fan_in_fan_out=flag)
        )
        for flag in flags
    )
    assert one.cosine(other) == pytest.approx(1.0)


def test_rows_of_a_comparison_have_the_names_of_the_first(tmp_path):
    one = write_adapter(tmp_path / "one", factors(1, Q))
    second = renamed(factors(9, UP), "model", "language_model.model")
    found = mk.compare_adapters([one, write_adapter(tmp_path / "other", second)])
    assert {row.name for row in found.modules} == {*Q, *UP}
    assert [row.name for row in found.layers] == ["model.layers.0", "model.layers.1"]
