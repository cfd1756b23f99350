"""An edit changes the characters of one value and nothing else."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from merge_kit.architecture.config import Edit, edit_config
from merge_kit.architecture.json_text import members, skip
from merge_kit.errors import CheckpointError

SPACES = st.sampled_from(["", " ", "\n", "\n    ", "\t", " \r\n  "])
KEYS = st.text(max_size=4)
SCALARS = st.none() | st.booleans() | st.integers() | st.floats(-1e9, 1e9) | st.text(max_size=6)
VALUES = st.recursive(
    SCALARS, lambda v: st.lists(v, max_size=3) | st.dictionaries(KEYS, v, max_size=3), max_leaves=8
)
OBJECTS = st.dictionaries(KEYS, VALUES, max_size=5)


@st.composite
def written(draw: Any, value: Any) -> str:
    """Return JSON of a value with random white space around every token."""

    def space() -> str:
        return str(draw(SPACES))

    if isinstance(value, dict):
        inner = [
            f"{space()}{draw(written(k))}{space()}:{draw(written(v))}" for k, v in value.items()
        ]
        return "{" + (",".join(inner) or space()) + "}"
    if isinstance(value, list):
        return "[" + (",".join(draw(written(v)) for v in value) or space()) + "]"
    plain = json.dumps(value, ensure_ascii=draw(st.booleans()))
    return plain if isinstance(value, str) else space() + plain + space()


@st.composite
def files(draw: Any) -> str:
    return draw(SPACES) + str(draw(written(draw(OBJECTS)))) + draw(SPACES)


def common(before: str, after: str) -> tuple[str, str]:
    """Return what differs, after the longest common beginning and end are cut off."""
    start = next((i for i, (a, b) in enumerate(zip(before, after, strict=False)) if a != b), None)
    start = min(len(before), len(after)) if start is None else start
    old, new = before[start:], after[start:]
    stop = 0
    while stop < min(len(old), len(new)) and old[-1 - stop] == new[-1 - stop]:
        stop += 1
    return old[: len(old) - stop], new[: len(new) - stop]


@given(files(), st.data())
def test_a_replaced_value_changes_only_its_own_characters(text, data):
    before = json.loads(text)
    if not before:
        return
    key, value = data.draw(st.sampled_from(sorted(before))), data.draw(VALUES)
    (span,) = (m for m in members(text, skip(text, 0)) if m.key == key)
    assert json.loads(text[span.start : span.stop]) == before[key]
    after = edit_config(text, [Edit((key,), value)])
    lead, tail = text[: span.start], text[span.stop :]
    assert after.startswith(lead)
    assert after.endswith(tail)
    assert json.loads(after[len(lead) : len(after) - len(tail)]) == value
    assert json.loads(after) == before | {key: value}
    assert list(json.loads(after)) == list(before)


@given(files(), KEYS, VALUES)
def test_an_inserted_key_leaves_every_old_character(text, key, value):
    before = json.loads(text)
    if key in before:
        return
    after = edit_config(text, [Edit((key,), value)])
    assert json.loads(after) == before | {key: value}
    assert common(text, after)[0] == ""


@given(files(), st.data())
def test_a_removed_key_only_takes_characters_away(text, data):
    before = json.loads(text)
    if not before:
        return
    key = data.draw(st.sampled_from(sorted(before)))
    after = edit_config(text, [Edit((key,), remove=True)])
    assert json.loads(after) == {k: v for k, v in before.items() if k != key}
    assert common(text, after)[1] == ""


@given(files(), KEYS, KEYS, VALUES)
def test_inserting_and_removing_a_key_gives_the_members_back(text, outer, inner, value):
    before = json.loads(text)
    if outer in before:
        return
    there = edit_config(text, [Edit((outer, inner), value)])
    assert json.loads(there) == before | {outer: {inner: value}}
    assert json.loads(edit_config(there, [Edit((outer,), remove=True)])) == before


def test_number_formats_escapes_and_the_last_newline_stay():
    text = '{\n  "eps": 1e-05,\n  "name": "caf\\u00e9",\n  "n": 3\n}\n'
    expected = '{\n  "eps": 1e-05,\n  "name": "caf\\u00e9",\n  "n": 40\n}\n'
    assert edit_config(text, [Edit(("n",), 40)]) == expected


def test_a_new_key_takes_the_indentation_of_its_siblings():
    text = '{\r\n\t"a": {\r\n\t\t"b": 1\r\n\t}\r\n}'
    expected = (
        '{\r\n\t"a": {\r\n\t\t"b": 1,\r\n\t\t"c": [\r\n\t\t\t1,\r\n\t\t\t2\r\n\t\t]\r\n\t}\r\n}'
    )
    assert edit_config(text, [Edit(("a", "c"), [1, 2])]) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('{"a":1}', '{"a":1,"z":[1,2]}'),
        ('{"a": 1}', '{"a": 1, "z": [1, 2]}'),
        ("{}", '{"z": [1, 2]}'),
        ('{ "a": 1 }', '{ "a": 1, "z": [1, 2] }'),
    ],
)
def test_a_new_key_in_one_line_takes_its_separators(text, expected):
    assert edit_config(text, [Edit(("z",), [1, 2])]) == expected


def test_an_empty_object_of_an_indented_file_is_opened():
    text = '{\n  "a": {}\n}\n'
    assert edit_config(text, [Edit(("a", "b"), 1)]) == '{\n  "a": {\n    "b": 1\n  }\n}\n'


def test_a_list_keeps_its_line_or_its_lines():
    text = '{\n  "a": [1, 2],\n  "b": [\n    1\n  ]\n}'
    edits = [Edit(("a",), [3, 4, 5]), Edit(("b",), [6, 7])]
    assert edit_config(text, edits) == '{\n  "a": [3, 4, 5],\n  "b": [\n    6,\n    7\n  ]\n}'


def test_removing_what_is_not_there_changes_nothing():
    text = '{"a": 1}'
    assert edit_config(text, [Edit(("b",), remove=True), Edit(("a", "c"), remove=True)]) == text


def test_a_path_through_a_number_is_refused():
    with pytest.raises(CheckpointError, match="a is no object that can hold b"):
        edit_config('{"a": 1}', [Edit(("a", "b"), 2)])
