"""The rank of a sum of adapters, its mean, and the sum of factors."""

from __future__ import annotations

import pytest
import torch

from merge_kit.errors import ParameterError
from merge_kit.methods.base import PerModel
from merge_kit.methods.lora_linear import LoraLinear
from tests.methods.factor_slabs import close, diagonal, factor_slab, pair, summed, total


def test_adapters_that_share_a_factor_come_out_at_the_rank_of_one():
    (a, b), (_, other) = pair(4, (40, 30)), pair(4, (40, 30), seed=1)
    for pairs in ([(a, b), (a, other)], [(a, b), (other.T[:, :30], b)]):
        slab = factor_slab(pairs, (0.5, -2.0), (4,), "F32")
        assert LoraLinear().fit(slab, {})[0].rank == 4
        found, wanted = summed(LoraLinear(), pairs, (0.5, -2.0), 4), total(pairs, (0.5, -2.0))
        assert close(found, wanted, float(wanted.norm()))


def test_what_differs_by_the_rounding_of_float32_counts_as_shared():
    a, b = pair(4, (40, 30))
    again = ((a / 3).float().double(), (b * 3).float().double())
    slab = factor_slab([(a, b), again], (1.0, 1.0), dtype="F32")
    assert LoraLinear().fit(slab, {})[0].rank == 4
    apart = (a + 1e-5 * torch.randn(a.shape, generator=torch.Generator().manual_seed(1)), b)
    slab = factor_slab([(a, b), apart], (1.0, -1.0), dtype="F32")
    assert LoraLinear().fit(slab, {})[0].rank == 4  # a small difference is one


def test_float64_keeps_what_float32_would_round_away():
    pairs = [diagonal(1.0, 2.0**-30, 2.0**-50)]
    ranks = [
        LoraLinear().fit(factor_slab(pairs, (1.0,), dtype=d), {})[0].rank for d in ("F32", "F64")
    ]
    assert ranks == [1, 2]


def test_the_mean_divides_by_the_sum_of_all_weights():
    method = LoraLinear(weight=PerModel([3.0, 1.0]), normalize=True)
    assert method.coefficients((3.0, 1.0)) == (0.75, 0.25)
    assert LoraLinear().coefficients((3.0, 1.0)) == (3.0, 1.0)
    assert method.coefficients((0.0, 0.0)) == (0.0, 0.0)
    with pytest.raises(ParameterError, match="sums to 0"):
        method.coefficients((1.0, -1.0))
    with pytest.raises(ParameterError, match="sums to 0"):
        LoraLinear(weight=PerModel([1.0, -1.0]), normalize=True)


def test_the_variant_of_peft_adds_factors_and_so_all_cross_terms():
    (a, b), (c, d) = pair(4, (40, 30)), pair(4, (40, 30), seed=1)
    found = summed(LoraLinear(variant="peft"), [(a, b), (c, d)], (0.25, -4.0), 4)
    wanted = 0.25 * b @ a - 4.0 * d @ c - b @ c + d @ a  # sqrt(0.25 * 4) = 1
    assert close(found, wanted, float(wanted.norm()))


def test_the_variant_of_peft_wants_one_rank_and_scales_in_both_factors():
    method = LoraLinear(variant="peft")
    assert method.splits_scales()
    assert not method.is_fitted()
    assert method.rank_bound((4, 4), (40, 30)) == 4
    with pytest.raises(ParameterError, match="4, 8") as caught:
        method.rank_bound((4, 8), (40, 30))
    assert "exact" in caught.value.hint
