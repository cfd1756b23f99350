"""Adapters that bring copies of the base's own weight, as peft saves it beside embeddings."""

from __future__ import annotations

import json

import pytest
import torch

from merge_kit.errors import MismatchError
from tests.plan.adapters_by_hand import (
    EMBEDDING,
    HEAD,
    HIDDEN,
    ON_Q,
    TOKENS,
    adapter,
    base,
    before,
    factors,
    fates,
    numbers,
    passed,
    rows,
    weighed,
)
from tests.toys import merge, plan

COPY = "model.embed_tokens.base_layer.weight"
IN_FILE = f"base_model.model.{COPY}"


def on_embedding(start, copy):
    """Return an adapter's tensors, and the change that they make."""
    a, b = numbers(2, TOKENS, start=start), numbers(HIDDEN, 2, start=start + 3)
    lead = "model.embed_tokens.lora_embedding_"
    return {f"{lead}A": a, f"{lead}B": b, COPY: copy}, 2 * (b @ a).T


@pytest.fixture
def models(tmp_path):
    base(tmp_path / "base")
    return tmp_path


def pair(models, *copies):
    """Write adapters a and b with copies; return the sum of their changes."""
    changes = []
    for name, start, copy in zip("ab", (1, 5), copies, strict=True):
        held, change = on_embedding(start, copy)
        adapter(models / name, held)
        changes.append(change)
    return changes


@pytest.mark.parametrize("order", ["base+a+b", "base+b+a"])
def test_copies_of_what_the_base_has_are_no_conflict(models, order):
    own = before(models)[EMBEDDING]
    one, other = pair(models, own, own)
    assert torch.equal(merge(passed(order), models)[EMBEDDING], own + one + other)
    made = plan(passed(order), models)
    for key in ("input-2", "input-3"):
        assert fates(made, key)[IN_FILE] == ("dropped", "it is what input-1:base has")
    assert fates(made, "input-1")[EMBEDDING][0] == "merged"


def test_weights_count_for_the_changes_and_not_for_the_copies(models):
    own = before(models)[EMBEDDING]
    one, other = pair(models, own, own)
    result = merge(passed(weighed("base", a=0.5, b=-2)), models)
    assert torch.equal(result[EMBEDDING], own + 0.5 * one - 2 * other)


def test_equal_copies_of_another_base_stand_in_its_place(models):
    copy = before(models)[EMBEDDING] + 3
    one, other = pair(models, copy, copy)
    assert torch.equal(merge(passed("base+a+b"), models)[EMBEDDING], copy + one + other)
    made = plan(passed("base+a+b"), models)
    assert fates(made, "input-1")[EMBEDDING] == ("dropped", "input-2:a holds it whole")
    assert {fates(made, key)[IN_FILE][0] for key in ("input-2", "input-3")} == {"merged"}


def test_copies_that_differ_from_one_another_are_refused(models):
    own = before(models)[EMBEDDING]
    pair(models, own + 1, own + 2)
    with pytest.raises(MismatchError, match=r"holds model\.embed_tokens\.weight whole"):
        plan(passed("base+a+b"), models)


def test_one_copy_of_another_base_beside_one_of_this_counts(models):
    own = before(models)[EMBEDDING]
    one, other = pair(models, own, own + 1)
    assert torch.equal(merge(passed("base+a+b"), models)[EMBEDDING], own + 1 + one + other)


def test_a_copy_of_the_base_beside_what_another_holds_whole_is_no_conflict(models):
    own, whole = before(models)[EMBEDDING], numbers(TOKENS, HIDDEN, start=2) + 20
    held, change = on_embedding(1, own)
    adapter(models / "a", held)
    adapter(models / "s", ON_Q | {EMBEDDING: whole}, modules_to_save=["embed_tokens"])
    assert torch.equal(merge(passed("base+a+s"), models)[EMBEDDING], whole + change)
    tokens, at = rows("model.embed_tokens", [2], 1)
    adapter(models / "t", ON_Q | tokens, **at)
    result = merge(passed("base+a+t"), models)[EMBEDDING]
    assert torch.equal(result[2], next(iter(tokens.values()))[0] + change[2])
    assert torch.equal(result[3], own[3] + change[3])


def test_equal_copies_of_another_base_beside_what_is_held_whole_are_refused(models):
    pair(models, *[before(models)[EMBEDDING] + 3] * 2)
    whole = {EMBEDDING: numbers(TOKENS, HIDDEN)}
    adapter(models / "s", ON_Q | whole, modules_to_save=["embed_tokens"])
    with pytest.raises(MismatchError, match=r"holds model\.embed_tokens\.weight whole"):
        plan(passed("base+a+b+s"), models)


def test_a_tied_head_and_its_embedding_may_each_have_an_adapter(tmp_path):
    base(tmp_path / "base", tie_word_embeddings=True)
    own = before(tmp_path)[EMBEDDING]
    held, change = on_embedding(1, own)
    adapter(tmp_path / "e", held)
    head = factors("lm_head", TOKENS, HIDDEN)
    adapter(tmp_path / "h", {**head, "lm_head.base_layer.weight": own})
    result = merge(passed("base+e+h"), tmp_path)
    assert torch.equal(result[EMBEDDING], own + change)
    on_head = 2 * head["lm_head.lora_B.weight"] @ head["lm_head.lora_A.weight"]
    assert torch.equal(result[HEAD], own + on_head)
    made = plan(passed("base+e+h"), tmp_path)
    found = [fate for key in ("input-2", "input-3") for fate in fates(made, key).items()]
    dropped = [name for name, (what, _) in found if what == "dropped"]
    assert dropped == [IN_FILE, "base_model.model.lm_head.base_layer.weight"]


def test_a_method_on_deltas_gets_the_sum_of_the_changes(models):
    own = before(models)[EMBEDDING]
    one, other = pair(models, own, own)
    recipe = json.dumps(
        {
            "merge_method": "task_arithmetic",
            "base_model": "base",
            "models": [{"model": "base+a+b", "parameters": {"weight": 0.5}}],
        }
    )
    assert torch.equal(merge(recipe, models)[EMBEDDING], own + 0.5 * (one + other))
    step = next(s for s in plan(recipe, models).steps if s.outputs[0].key == EMBEDDING)
    assert step.deltas == (True,)  # not the difference of two rounded numbers
