from __future__ import annotations

import pytest
import torch

import merge_kit as mk
from tests.api.conftest import assert_same


def models(*numbers: float) -> list[dict[str, torch.Tensor]]:
    return [{"w": torch.tensor([number])} for number in numbers]


def near(goal: float, seen: list[float] | None = None):
    """Return a score: the closer the number, the higher."""

    def score(merge) -> float:
        number = merge.state_dict()["w"].item()
        if seen is not None:
            seen.append(number)
        return -abs(number - goal)

    return score


def test_models_are_taken_from_the_best_down_if_they_help():
    seen: list[float] = []
    soup = mk.greedy_soup(models(8.0, 1.0, 3.0, 5.0), near(4.5, seen))
    # alone: -3.5, -3.5, -1.5, -0.5; then 5+3 -> 4 is no better, 5+8 -> 6.5 is worse, 5+1 -> 3
    assert seen == [8.0, 1.0, 3.0, 5.0, 4.0, 6.5, 3.0]
    assert soup.chosen == (3,)
    assert [one.position for one in soup.tastings] == [3, 2, 0, 1]  # 0 before 1 at equal scores
    assert [one.accepted for one in soup.tastings] == [True, False, False, False]
    assert [one.score for one in soup.tastings] == [-0.5, -0.5, -2.0, -1.5]
    assert [one.alone for one in soup.tastings] == [-0.5, -1.5, -3.5, -3.5]
    assert soup.score == -0.5


def test_an_equal_score_is_not_enough_and_a_better_one_goes_on():
    soup = mk.greedy_soup(models(5.0, 5.0, 2.0, 6.0), near(4.0))
    # 5; 5+5 -> 5 equal, no; 2 is tried before 6 (both are 2 away): 3.5; 5+2+6 -> 13/3
    assert soup.chosen == (0, 2, 3)
    assert soup.merge.state_dict()["w"].item() == pytest.approx(13 / 3, rel=2.0**-23)
    assert soup.score == pytest.approx(-1 / 3, abs=1e-6)


def test_the_average_is_that_of_the_originals_to_the_bit(family, tmp_path):
    soup = mk.greedy_soup([family.path("code"), family.path("math")], lambda merge: 0.0)
    assert_same(soup.merge.state_dict(), family.code)
    scores = iter([1.0, 1.0, 2.0])
    soup = mk.greedy_soup([family.path("code"), family.path("math")], lambda merge: next(scores))
    assert_same(soup.merge.state_dict(), mk.linear([family.code, family.math]).state_dict())
    assert (soup.merge.save(tmp_path / "out") / "merge_kit.json").is_file()


def test_with_a_base_task_vectors_are_averaged(family):
    scores = iter([1.0, 1.0, 2.0])
    sources = [family.code, family.math]
    soup = mk.greedy_soup(sources, lambda merge: next(scores), base=family.base)
    wanted = mk.task_arithmetic(family.base, sources, normalize=True)
    assert_same(soup.merge.state_dict(), wanted.state_dict())


def test_scores_may_be_tensors_of_one_number():
    soup = mk.greedy_soup(models(1.0), lambda merge: merge.state_dict()["w"])
    assert soup.score == 1.0


@pytest.mark.parametrize(
    ("call", "problem"),
    [
        (lambda a: mk.greedy_soup([], near(1.0)), "found no models"),
        (lambda a: mk.greedy_soup(a, near(1.0)), "expected a list"),
        (lambda a: mk.greedy_soup([a, a], near(1.0)), "stands twice"),
        (lambda a: mk.greedy_soup([a], near(1.0), base=a), "the base is among the models"),
        (lambda a: mk.greedy_soup([a], lambda merge: None), "the score is of type NoneType"),
        (lambda a: mk.greedy_soup([a], near(float("nan"))), "the score is NaN"),
    ],
)
def test_mistakes_are_told(call, problem):
    with pytest.raises(mk.UsageError, match=problem):
        call({"w": torch.ones(1)})
