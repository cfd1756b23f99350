from __future__ import annotations

import errno

import pytest

from merge_kit.cli.failures import message, system_error
from merge_kit.errors import CheckpointError, Problems, RecipeError


def test_an_error_is_its_place_its_problem_and_a_hint():
    error = RecipeError("density is 1.5", where="r.yaml:7:16", hint="density is a share")
    assert message(error) == "error: r.yaml:7:16: density is 1.5\n  hint: density is a share"


def test_an_error_without_place_and_hint_is_one_line():
    assert message(CheckpointError("no weights")) == "error: no weights"


def test_every_line_of_a_hint_is_shown():
    assert message(CheckpointError("no weights", hint="one\ntwo")) == (
        "error: no weights\n  hint: one\n  hint: two"
    )


def test_problems_are_numbered_and_nested_ones_are_in_one_list():
    a, b = RecipeError("first", where="r:1:1", hint="do"), CheckpointError("second")
    assert message(Problems([a, Problems([b, a])])) == (
        "error: 3 problems\n"
        "  1. r:1:1: first\n"
        "     hint: do\n"
        "  2. second\n"
        "  3. r:1:1: first\n"
        "     hint: do"
    )


def test_one_problem_is_not_numbered():
    assert message(Problems([CheckpointError("only")])) == "error: only"


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG])
def test_a_full_disk_is_a_system_error(number):
    error = system_error(OSError(number, "full", "out/model.safetensors"))
    assert error is not None
    assert (error.code(), error.where) == (4, "out/model.safetensors")


def test_a_lack_of_memory_is_a_system_error():
    error = system_error(MemoryError())
    assert error is not None
    assert error.code() == 4
    assert "--memory" in error.hint


@pytest.mark.parametrize("exc", [OSError(errno.EACCES, "denied"), KeyError("x")])
def test_other_exceptions_are_defects(exc):
    assert system_error(exc) is None
