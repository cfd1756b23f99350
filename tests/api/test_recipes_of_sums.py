"""Recipes of the repository and the same thing as arithmetic."""

from __future__ import annotations

from pathlib import Path

import pytest

import merge_kit as mk
from tests.api.conftest import assert_same

RECIPES = Path(mk.__file__).parent.parent / "recipes"
BASE, ADD, SORT, TRANSLATE = (
    RECIPES / "demo" / name for name in ("base", "add", "sort", "translate")
)


def skill(path: Path):
    return mk.TaskVector(path, BASE)


def model(path: Path):
    return mk.load(path)


@pytest.mark.parametrize(
    ("name", "same"),
    [
        ("analogy", lambda: model(SORT) + model(ADD) - model(BASE)),
        ("forget", lambda: model(BASE) + skill(ADD) - 0.3 * skill(SORT)),
        ("last_checkpoints", lambda: mk.linear([ADD, SORT, TRANSLATE])),
        ("federated_averaging", lambda: mk.linear([ADD, SORT, TRANSLATE], weight=[3, 2, 1])),
    ],
)
def test_a_recipe_is_the_same_as_arithmetic(tmp_path, name, same):
    mk.merge(RECIPES / f"{name}.yaml", tmp_path / "out")
    assert_same(mk.load(tmp_path / "out").state_dict(), same().state_dict(dtype="bfloat16"))
