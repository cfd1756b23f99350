"""docs/adapters.md: its recipes are recipes, and its tables are those of the script."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

from merge_kit.recipe.parse import parse_recipe

ROOT = Path(__file__).resolve().parent.parent.parent
PAGE = (ROOT / "docs" / "adapters.md").read_text(encoding="utf-8")
sys.path.insert(0, str(ROOT / "scripts"))  # the scripts are programs, not a package

import evaluate_adapters  # noqa: E402


@pytest.mark.parametrize("text", re.findall(r"```yaml\n(.*?)```", PAGE, re.DOTALL))
def test_recipes_of_the_page_are_recipes(tmp_path, text):
    assert parse_recipe(text, folder=tmp_path).text


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """Return the tables, measured on a few examples."""
    bench = evaluate_adapters.Bench(tmp_path_factory.mktemp("measured"), count=20)
    return {name: make(bench) for name, make in evaluate_adapters.TABLES.items()}


def numbers(line: str) -> list[float]:
    """Return the losses of a line: numbers with three decimals."""
    return [float(cell) for cell in re.findall(r"(?<= )\d+\.\d{3}(?= )", line)]


@pytest.mark.slow
@pytest.mark.parametrize("name", evaluate_adapters.TABLES)
def test_tables_of_the_page_are_measured(measured, name):
    found = re.search(rf"<!-- {name} -->\n(.*?)\n<!-- end -->", PAGE, re.DOTALL)
    assert found is not None
    lines, wanted = (text.splitlines() for text in (found[1], measured[name]))
    assert len(lines) == len(wanted)
    for line, other in zip(lines, wanted, strict=True):
        # what is merged and how large it is; losses differ, on other examples
        assert line.split(" | ")[:2] == other.split(" | ")[:2]
        assert len(numbers(line)) == len(numbers(other))


@pytest.mark.slow
def test_merged_and_concatenated_adapters_know_the_same(measured):
    rows = {
        line.split("(")[-1].split(")")[0]: numbers(line)
        for line in measured["combinations"].splitlines()
    }
    merged, concatenated = rows["`merge_adapter.yaml`"], rows["`concat_adapters.yaml`"]
    # both are rounded to bf16 once, one of them from factors that were rounded before
    assert merged == pytest.approx(concatenated, abs=0.02)
