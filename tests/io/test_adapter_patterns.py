from __future__ import annotations

import json
import re
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from merge_kit.core import patterns as limits
from merge_kit.core.pattern_states import MAX_COST, MAX_STEPS
from merge_kit.core.patterns import MAX_LETTERS, MAX_PATTERNS, NamePatterns
from merge_kit.errors import CheckpointError

PROJECTIONS = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj")
NAMES = [
    f"model.layers.{layer}.{module}"
    for layer in range(714)
    for module in (*PROJECTIONS, "mlp.up_proj", "mlp.gate_proj", "mlp.down_proj")
]


def first(patterns, name):
    return NamePatterns(patterns, where="config").first(name)


def as_peft_matches(patterns, name):
    """What a loader finds, with the standard library."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of sets that may mean something else one day
        found = (n for n, key in enumerate(patterns) if re.match(rf"(.*\.)?({key})$", name))
        return next(found, None)


@pytest.mark.parametrize(
    ("pattern", "name", "matches"),
    [
        ("q_proj", "layers.0.q_proj", True),
        ("q_proj", "layers.0.xq_proj", False),
        ("q_proj", "q_proj", True),
        ("q_proj", "q_proj.base", False),
        ("layers.1.q_proj", "model.layers.1.q_proj", True),
        ("layers.1.q_proj", "model.layers.11.q_proj", False),
        ("layers.1.q_proj", "model.layers.1xq_proj", True),  # a dot is any letter
        (r"layers\.1\.q_proj", "model.layers.1xq_proj", False),
        ("^model.q_proj", "model.q_proj", True),
        ("^model.q_proj", "base.model.q_proj", False),
        (r"^model\.q_proj", "model.q_proj", True),
        (r"^model\.q_proj$", "model.q_proj", True),
        (r"^model\.q_proj", "modelxq_proj", False),
        (r"^model\.q_proj", "base.model.q_proj", False),
        (r"^a\-b\ c/d", "a-b c/d", True),
        (r"^a\-b/d", "a-b/d", True),
        (r"^a\\d", r"a\d", True),
        (r"^a\d", "a1", True),
        ("^", "", True),
        (r".*\.[0-4]\..*(q|v)_proj", "model.layers.3.self_attn.v_proj", True),
        (r".*\.[0-4]\..*(q|v)_proj", "model.layers.5.self_attn.v_proj", False),
        (r"layers\.\d+\.[^.]+\.q_proj", "a.layers.12.attn.q_proj", True),
        ("(?:q|k)_proj", "a.k_proj", True),
        ("q_proj$", "a.q_proj", True),
        ("a{2,3}", "x.aaa", True),
        ("a{2,3}", "x.aaaa", False),
        ("b?", "x.", True),
        ("", "x.", True),
        ("", "x", False),
        ("", "", True),
    ],
)
def test_a_pattern_matches_the_end_of_a_name(pattern, name, matches):
    assert (first([pattern], name) == 0) is matches
    assert (as_peft_matches([pattern], name) == 0) is matches


def test_the_first_pattern_wins():
    assert first(["k_proj", ".*_proj", "q_proj"], "a.q_proj") == 1
    assert first(["q_proj", ".*_proj"], "a.q_proj") == 0
    assert first([], "a.q_proj") is None


def test_the_first_of_a_whole_name_and_an_expression_wins():
    assert first([r"^a\.b", ".*"], "a.b") == 0
    assert first([".*", r"^a\.b"], "a.b") == 0
    assert first([r"^a\.b", r"^a\.b"], "a.b") == 0
    assert first([r"^a\.b", ".*"], "a.c") == 1


def test_the_name_of_every_expert_of_a_large_model_may_be_a_pattern():
    names = [
        f"model.layers.{layer}.mlp.experts.{expert}.{leaf}_proj"
        for layer in range(60)
        for expert in range(160)
        for leaf in ("gate", "up", "down")
    ]
    patterns = NamePatterns([f"^{re.escape(name)}" for name in names], where="config")
    assert len(names) > MAX_PATTERNS
    assert [patterns.first(name) for name in names] == list(range(len(names)))
    assert patterns.first(f"base.{names[0]}") is None


LETTERS = "ab.1"
ATOMS = st.sampled_from(["a", "b", ".", r"\.", "1", r"\d", r"\w", r"\W", "[ab]", "[^a.]", "[a-b1]"])
EXPRESSIONS = st.recursive(
    ATOMS,
    lambda inner: st.one_of(
        st.builds(str.__add__, inner, inner),
        st.builds("({}|{})".format, inner, inner),
        st.builds(
            "(?:{}){}".format,
            inner,
            st.sampled_from(["*", "+", "?", "*?", "+?", "{2}", "{1,2}", "{0,1}", "{2,}"]),
        ),
        st.builds("^{}".format, inner),
        st.builds("{}$".format, inner),
    ),
    max_leaves=6,
)


@given(
    patterns=st.lists(EXPRESSIONS, max_size=4),
    names=st.lists(st.text(LETTERS, max_size=8), max_size=6),
)
def test_the_automaton_finds_what_the_standard_library_finds(patterns, names):
    ours = NamePatterns(patterns, where="config")
    assert [ours.first(name) for name in names] == [as_peft_matches(patterns, n) for n in names]


HOSTILE = {
    "nested repetition": ["(a+)+b"],
    "nested twice": ["((.*)*)*z"],
    "overlapping branches": ["(a|a|b|.)*!"],
    "many stars": [".*" * 300 + "!"],
    "many sets": ["[a-z.]*" * 100],
    "stars before the end": [".*" * 150 + "proj"],
    "many patterns": [f".*{n}.*_proj" for n in range(3000)],
    "long counts": [r"[\s\S]{0,900}"],
    "many long counts": [f"x{{0,900}}{n}" for n in range(2000)],
    "counts of counts": ["(((((){2000}){2000}){2000}){2000}){2000}"],
    "a count of nothing": ["(){4000000000}"],
    "a huge count": ["a{99999999999}"],
    "deep brackets": ["(" * 490 + "a" + ")" * 490],
    "every module": NAMES,
}


def test_hostile_patterns_take_less_than_a_second_over_5000_names():
    # A program of its own: neither other tests nor the tracing of coverage slow it down.
    program = """
import json, sys, time
from merge_kit.core.patterns import NamePatterns
from merge_kit.errors import CheckpointError

names, hostile = json.load(sys.stdin)
seconds = {}
for kind, patterns in hostile.items():
    start = time.process_time()
    try:
        matcher = NamePatterns(patterns, where="config")
        assert len([matcher.first(name) for name in names]) == 4998
    except CheckpointError as error:
        assert error.hint
    seconds[kind] = time.process_time() - start
print(json.dumps(seconds))
"""
    done = subprocess.run(
        [sys.executable, "-c", program],
        input=json.dumps([NAMES, HOSTILE]),
        capture_output=True,
        text=True,
        check=True,
        cwd=Path(__file__).parents[2],
    )
    seconds = json.loads(done.stdout)
    assert set(seconds) == set(HOSTILE)
    assert max(seconds.values()) < 1, seconds


@pytest.mark.parametrize("kind", ["nested repetition", "overlapping branches", "many stars"])
def test_hostile_patterns_are_matched_all_the_same(kind):
    patterns = NamePatterns(HOSTILE[kind], where="config")
    assert {patterns.first(name) for name in NAMES} == {None}


def test_thousands_of_plain_names_are_no_work():
    patterns = NamePatterns(NAMES, where="config")
    assert [patterns.first(name) for name in NAMES] == list(range(len(NAMES)))


@pytest.mark.parametrize(
    ("pattern", "problem"),
    [
        (r"(a)\1", "a reference to a group"),
        ("(?=a)b", "a look ahead or behind"),
        ("(?<!a)b", "a look ahead or behind"),
        ("(?>a)", "an atomic group"),
        ("a++", "a possessive repetition"),
        ("(?i:a)", "a flag"),
        ("(?i)a", "a flag"),
        (r"\bq", "a boundary of words"),
        ("(a)(?(1)b|c)", "a condition on a group"),
        ("(a{1000}){1000}", f"more than {MAX_STEPS} steps"),
        ("(", "is no regular expression"),
        ("a)|(b", "is no regular expression"),
        ("[", "is no regular expression"),
        ("*", "is no regular expression"),
        ("a" * (MAX_LETTERS + 1), f"has {MAX_LETTERS + 1} letters"),
    ],
)
def test_what_is_not_supported_is_refused_by_name(pattern, problem):
    with pytest.raises(CheckpointError, match=re.escape(problem)) as caught:
        NamePatterns([pattern], where="config, rank_pattern")
    assert caught.value.where == "config, rank_pattern"
    assert caught.value.hint


def test_patterns_are_counted():
    with pytest.raises(CheckpointError, match=f"at most {MAX_PATTERNS}"):
        NamePatterns(["a"] * (MAX_PATTERNS + 1), where="config")
    with pytest.raises(CheckpointError, match=f"more than {MAX_COST} steps together"):
        NamePatterns(["a" * MAX_LETTERS] * (MAX_COST // MAX_LETTERS + 1), where="config")


def test_work_is_counted_over_all_names(monkeypatch):
    monkeypatch.setattr(limits, "MAX_WORK", 1000)
    patterns = NamePatterns(["(.*a)*"], where="config")
    with pytest.raises(CheckpointError, match="take too long"):
        [patterns.first(name) for name in NAMES]
