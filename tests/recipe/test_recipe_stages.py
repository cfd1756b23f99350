"""Recipes of several documents."""

from __future__ import annotations

import pytest

from merge_kit.errors import MergeKitError
from merge_kit.recipe import parse_recipe


def document(name, *models, extra=""):
    title = f"name: {name}\n" if name else ""
    listed = "".join(f"- model: {model}\n" for model in models)
    return f"{title}merge_method: linear\nparameters: {{weight: 1}}\n{extra}models:\n{listed}"


def joined(*documents):
    return "---\n".join(documents)


def names(text):
    return [stage.name for stage in parse_recipe(text).stages]


def error_of(text):
    with pytest.raises(MergeKitError) as caught:
        parse_recipe(text, source="r.yaml")
    return caught.value


def test_stages_come_after_those_they_refer_to_and_the_output_last():
    text = joined(document("", "two", "x"), document("two", "one@v1"), document("one", "m"))
    assert names(text) == ["one", "two", None]


def test_the_one_that_nobody_refers_to_is_the_output():
    assert names(joined(document("b", "a"), document("a", "m"))) == ["a", None]


def test_empty_documents_are_ignored():
    assert names("---\n" + document("", "m") + "---\n") == [None]
    assert names(joined(document("a", "m"), "", document("", "a")) + "---\n---\n") == ["a", None]


def test_only_model_references_are_matched_to_names():
    text = joined(document("linear", "m"), document("", "linear"))
    assert names(text) == ["linear", None]


@pytest.mark.parametrize(
    "extra",
    [
        "base_model: a\n",
        "tokenizer_source: a\n",
        "base_model: x\ntensors: [{match: q, copy: a}]\n",
        "base_model: x\ntensors: [{match: q, models: [{model: a}]}]\n",
    ],
)
def test_references_count_wherever_a_model_may_stand(extra):
    assert names(joined(document("", "m", extra=extra), document("a", "m"))) == ["a", None]


def test_references_count_in_slices_and_modules():
    piece = "slices: [{base_model: a, sources: [{model: b, layer_range: [0, 1]}]}]\n"
    slices = "merge_method: passthrough\n" + piece
    modules = f"merge_method: passthrough\nmodules: {{text: {{{piece.strip()}}}}}\n"
    for output in (slices, modules):
        text = joined(output, document("b", "m"), document("a", "m"))
        assert names(text)[-1] is None
        assert sorted(names(text)[:2]) == ["a", "b"]


def test_adapters_are_no_stages():
    text = joined(document("", "m+a"), document("a", "m"))
    assert "no document refers to 'a'" in str(error_of(text))


def test_a_single_document_is_the_output_whatever_its_name():
    recipe = parse_recipe(document("m", "m"))
    assert recipe.stages[0].name is None
    assert "name has no effect" in recipe.notes[0]


@pytest.mark.parametrize(
    ("text", "place", "problem"),
    [
        (joined(document("a", "b"), document("b", "a"), document("", "a")), None, "in a circle"),
        (joined(document("a", "a"), document("", "a")), "5:10", "in a circle: a -> a"),
        (joined(document("", "m"), document("", "m")), "6:1", "a second document without a name"),
        (
            joined(document("a", "m"), document("a", "n"), document("", "a")),
            "7:7",
            "the name 'a' stands twice, first in line 1",
        ),
        (joined(document("a", "m"), document("b", "n")), "7:1", "refers to 'a' or 'b': which is"),
        (joined(document("a", "m"), document("", "n")), "1:7", "no document refers to 'a'"),
        (joined(document("a+b", "m"), document("", "m")), "1:7", "expected a name without + and @"),
        (
            joined(document("a", "m", extra="seed: 3\n"), document("", "a")),
            "4:1",
            "seed belongs to the output's document",
        ),
        (joined(document("a", "m"), document("", "a", extra="x: 1\n")), "9:1", "unknown key 'x'"),
    ],
)
def test_documents_that_do_not_fit_together(text, place, problem):
    error = error_of(text)
    assert problem in str(error)
    if place:
        assert error.where == f"r.yaml:{place}"


def test_every_document_is_read_before_anything_is_reported():
    text = joined(document("a", "m", extra="x: 1\n"), document("", "a", extra="y: 1\n"))
    assert [e.where for e in error_of(text).errors] == ["r.yaml:4:1", "r.yaml:10:1"]


def test_the_output_may_stand_before_its_stages_with_its_own_keys():
    text = joined(document("", "a", extra="seed: 3\noutput: o\n"), document("a", "m"))
    recipe = parse_recipe(text)
    assert (recipe.seed, recipe.output) == (3, "o")
