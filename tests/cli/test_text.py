from __future__ import annotations

from merge_kit.cli.text import columns, paragraph_of, table
from merge_kit.plan.describe import Row


def test_a_table_aligns_its_texts_and_wraps_them_below_one_another():
    rows = [Row("a", "one two three"), Row("", "four"), Row("label", "five")]
    assert table(rows, width=15) == ("a      one two\n       three\n       four\nlabel  five")


def test_words_that_are_too_long_are_never_cut():
    path = "models/a-very-long-folder-name"
    assert table([Row("in", f"at {path}")], width=12) == f"in  at\n    {path}"


def test_an_empty_table_is_empty():
    assert table([]) == ""


def test_columns_are_as_wide_as_their_widest_cell():
    assert columns([("a", "F32", "[1]"), ("long", "I8", "[]")]) == "a     F32  [1]\nlong  I8   []"


def test_prose_is_refilled_and_formulas_keep_their_lines():
    assert paragraph_of("aaa bbb ccc ddd\neee", width=10) == "aaa bbb\nccc ddd\neee"
    assert paragraph_of("x = 1\ny = 2", width=10) == "x = 1\ny = 2"
    assert paragraph_of("out = first + second\nrest", width=14) == "out = first +\n    second\nrest"
