"""TIES and its kin by hand."""

from __future__ import annotations

import weakref

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import merge_kit as mk
from merge_kit.errors import MergeKitError
from merge_kit.methods import consensus
from merge_kit.methods.base import PerModel
from merge_kit.methods.ties import Ties
from tests.methods.slabs import slab_of

BASE = torch.tensor([10.0, 10.0, 10.0, 10.0])
A = BASE + torch.tensor([1.0, -4.0, 2.0, 0.0])
B = BASE + torch.tensor([3.0, 1.0, -2.0, 0.0])


def merged(method, *models, base=BASE, **parameters):
    parameters = {"weight": 1.0, **parameters}
    return mk.merge_tensors(method, list(models), base=base, **parameters)


def delta(method, *models, **parameters):
    return (merged(method, *models, **parameters) - BASE).tolist()


def test_what_agrees_is_averaged():
    assert delta("ties", A, B) == [2.0, -4.0, 2.0, 0.0]  # 2 - 2 counts as plus


def test_what_agrees_is_summed():
    assert delta("ties", A, B, normalize=False) == [4.0, -4.0, 2.0, 0.0]


def test_the_largest_of_what_agrees():
    assert delta("ties", A, B, disjoint="max") == [3.0, -4.0, 2.0, 0.0]


def test_weights_vote_and_divide():
    """0.5 * 1 + 1 * 3 over 1.5; 0.5 * -4 + 1 is minus; 1 - 2 is minus, divided by its own 1."""
    found = delta("ties", A, B, weight=[0.5, 1.0])
    assert found == pytest.approx([3.5 / 1.5, -4.0, -2.0, 0.0], rel=1e-6)


def test_the_papers_vote_has_no_weights():
    found = delta("ties", A, B, weight=[0.5, 1.0], variant="paper")
    # the third: nobody wins, two elements of the model went plus and minus: no majority is minus
    assert found == pytest.approx([(0.5 + 3) / 2, -2.0, -2.0, 0.0], rel=1e-6)


def test_the_papers_majority_decides_where_nobody_wins():
    first = BASE + torch.tensor([1.0, 4.0, 2.0, 0.0])
    assert delta("ties", first, B, variant="paper") == [2.0, 2.5, 2.0, 0.0]


def test_a_vote_by_count():
    third = BASE + torch.tensor([-1.0, 1.0, -1.0, 5.0])
    assert delta("ties", A, B, third, elect="count") == [2.0, 1.0, -1.5, 5.0]
    assert delta("ties", A, B, third) == [2.0, -4.0, -1.5, 5.0]


def test_only_the_largest_are_kept():
    assert delta("ties", A, B, density=0.5) == [3.0, -4.0, 2.0, 0.0]
    assert delta("magnitude", A, B, density=0.5) == [3.0, -4.0, 0.0, 0.0]
    assert delta("magnitude", A, B, density=0.25) == [3.0, -4.0, 0.0, 0.0]


def test_a_density_keeps_at_least_one_element_and_zero_none():
    assert delta("ties", A, density=0.01) == [0.0, -4.0, 0.0, 0.0]
    assert delta("ties", A, density=0.0) == [0.0, 0.0, 0.0, 0.0]
    assert delta("ties", A, density=1.0) == [1.0, -4.0, 2.0, 0.0]


def test_a_negative_weight_removes():
    """Where it is alone too: elsewhere -d / -w adds the task vector."""
    assert delta("ties", A, weight=-1.0) == [-1.0, 4.0, -2.0, 0.0]
    assert delta("ties", A, B, weight=[-1.0, 1.0]) == [3.0, 2.5, -2.0, 0.0]


def test_weights_that_cancel_stay_small():
    """Elsewhere the difference of the weights divides: 1.7e7 times the task vector."""
    other = BASE - torch.tensor([1.0, -4.0, 2.0, 0.0])
    found = torch.tensor(delta("ties", A, other, weight=[1.0, -0.9999999]))
    torch.testing.assert_close(found, torch.tensor([1.0, -4.0, 2.0, 0.0]))


def test_three_to_one_in_the_mean():
    one, three = BASE + 1, BASE + 1
    assert delta("ties", three, one, weight=[3.0, 1.0]) == [1.0] * 4  # peft: 2


def test_lambda_scales_what_is_merged():
    assert delta("ties", A, B, lambda_=0.5) == [1.0, -2.0, 1.0, 0.0]


def test_rescaling_restores_the_l1_norm():
    """|A| is 7, what is left of it 6; |B| is 6, left 5."""
    assert delta("magnitude", A, density=0.5, rescale=True) == pytest.approx(
        [0.0, -4.0 * 7 / 6, 2.0 * 7 / 6, 0.0], rel=1e-6
    )
    assert delta("ties", B, density=0.5, rescale=True) == pytest.approx(
        [3.0 * 6 / 5, 0.0, -2.0 * 6 / 5, 0.0], rel=1e-6
    )


def test_the_whole_model_is_ranked_at_once():
    """At scales 1 and 0.1 the whole model keeps of the large tensor only."""
    generator = torch.Generator().manual_seed(0)
    large = torch.randn(1000, generator=generator)
    base = {"large": torch.zeros(1000), "small": torch.zeros(1000)}
    model = {"large": large, "small": 0.1 * torch.rand(1000, generator=generator)}
    for scope, counts in (("tensor", [200, 200]), ("model", [400, 0])):
        lazy = mk.ties([model], base=base, density=0.2, scope=scope, weight=1.0)
        result = lazy.state_dict()
        assert [int(result[n].count_nonzero()) for n in ("large", "small")] == counts
    paper = mk.ties([model], base=base, density=0.2, variant="paper", weight=1.0).state_dict()
    assert paper["small"].count_nonzero() == 0


def test_breadcrumbs_remove_the_largest_and_the_smallest():
    base = torch.zeros(10)
    model = torch.tensor([1.0, -2, 3, -4, 5, -6, 7, -8, 9, -10])
    found = merged("breadcrumbs", model, base=base, density=0.5, gamma=0.2)
    assert found.tolist() == [0, 0, 0, -4, 5, -6, 7, -8, 0, 0]
    assert (
        merged("breadcrumbs", model, base=base, density=1.0, gamma=0.2).tolist() == model.tolist()
    )
    few = merged("breadcrumbs", model, base=base, density=0.5, gamma=0.01)  # 0.1 of an element
    assert few.tolist() == [0, 0, 0, 0, 0, -6, 7, -8, 9, -10]
    both = merged("breadcrumbs", model, base=base, density=0.9, gamma=0.3)  # only one is removed
    assert both.tolist() == [1, -2, 3, -4, 5, -6, 7, -8, 9, 0]


def test_breadcrumbs_of_the_paper_rank_rows():
    base = torch.zeros(2, 5)
    model = torch.tensor([[1.0, -2, 3, -4, 5], [50.0, 40, -30, 20, 10]])
    found = merged("breadcrumbs", model, base=base, density=0.4, gamma=0.2, variant="paper")
    assert found.tolist() == [[0, 0, 3, -4, 0], [0, 40, -30, 0, 0]]
    whole = merged("breadcrumbs", model, base=base, density=1.0, gamma=0.2, variant="paper")
    assert whole.tolist() == [[1, -2, 3, -4, 0], [0, 40, -30, 20, 10]]  # only the largest go
    number = merged(
        "breadcrumbs", torch.tensor(3.0), base=torch.tensor(1.0), density=0.5, variant="paper"
    )
    assert number == 3.0


def test_breadcrumbs_vote():
    base, one = torch.zeros(4), torch.tensor([8.0, 3, 2, 1])
    other = torch.tensor([8.0, -1, 3, 2])
    found = merged("breadcrumbs_ties", one, other, base=base, density=0.5, gamma=0.25)
    assert found.tolist() == [0, 3, 5, 2]
    mean = merged(
        "breadcrumbs_ties", one, other, base=base, density=0.5, gamma=0.25, normalize=True
    )
    assert mean.tolist() == [0, 3, 2.5, 2]


@pytest.mark.parametrize("method", ["ties", "magnitude", "breadcrumbs", "breadcrumbs_ties"])
@pytest.mark.parametrize("density", [-0.1, 1.5, 20.0])
def test_densities_beyond_their_range_are_refused(method, density):
    with pytest.raises(MergeKitError, match=r"density is .*, expected a number in \[0, 1\]"):
        merged(method, A, density=density)


@pytest.mark.parametrize("parameter", ["scope", "elect", "disjoint", "variant"])
def test_a_choice_is_one_of_its_texts(parameter):
    with pytest.raises(MergeKitError, match=f"{parameter} is 'modle', expected "):
        merged("ties", A, **{parameter: "modle"})


@pytest.mark.parametrize("size", [2, 200_000])
@pytest.mark.parametrize("disjoint", ["mean", "sum", "max"])
def test_infinity_that_is_outvoted_is_found(size, disjoint):
    """Two count minus, one plus: without a trim nothing else would look at what lost."""
    ones = torch.ones(size)
    bad = ones.clone()
    bad[1] = float("inf")
    with pytest.raises(MergeKitError, match="1 in input-1"):
        merged(
            "ties", bad, -ones, -ones, base=0 * ones, elect="count", disjoint=disjoint, density=1.0
        )


@pytest.mark.parametrize("elect", ["mass", "count"])
def test_a_vote_takes_no_more_memory_for_more_models(elect):
    """What is billed holds float64 (more than 4 models) too."""
    slab = slab_of(torch.ones(30, 2 * consensus.PIECE, dtype=torch.float64))
    method = Ties(weight=PerModel([0.5] * 30), elect=elect)
    with Allocated() as allocated:
        method.merge(slab, {})
    assert 0 < allocated.most <= method.scratch_bytes(30, 2 * consensus.PIECE)


class Allocated(TorchDispatchMode):
    """Counts the bytes of tensors that operations make, as long as they live."""

    def __init__(self):
        super().__init__()
        self.now = self.most = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        del types
        result = func(*args, **(kwargs or {}))
        if (
            isinstance(result, torch.Tensor)
            and not func.is_view
            and not is_given(result, args, kwargs)
        ):
            size = result.untyped_storage().nbytes()
            self.now += size
            self.most = max(self.most, self.now)
            weakref.finalize(result, self._freed, size)
        return result

    def _freed(self, size):
        self.now -= size


def is_given(result, args, kwargs):
    """Return whether an operation wrote into what it was given."""
    given = (*args, *(kwargs or {}).values())
    return any(isinstance(g, torch.Tensor) and g.data_ptr() == result.data_ptr() for g in given)


def test_signs_and_merges_by_themselves():
    rows = torch.tensor([[1.0, -2.0, 0.0], [-1.0, -1.0, 0.0]])
    sign = consensus.signs(rows, [1.0, 1.0], "mass")
    assert sign.tolist() == [1, -1, 1]
    assert consensus.disjoint(rows, [1.0, 1.0], sign, "mean").tolist() == [1, -1.5, 0]


@pytest.mark.parametrize("size", [2, 200_000])
@pytest.mark.parametrize("bad", [float("inf"), float("nan")])
def test_what_is_not_finite_is_found_in_tensors_of_every_size(size, bad):
    model = torch.ones(size)
    model[1] = bad
    with pytest.raises(MergeKitError, match="1 in input-1"):
        merged("magnitude", model, base=torch.zeros(size), density=0.5)
