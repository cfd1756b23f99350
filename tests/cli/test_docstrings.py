from __future__ import annotations

from merge_kit.cli.docstrings import Docstring, read_docstring


class Described:
    """Mix two things
    in two lines.

    out = a + b

    A sentence of prose that has: a colon.

    Attributes:
        share: How much,
            up to 1.
        lambda_: A factor: any.

    Notes: one
        two.
    Source: Somebody 2024, https://example.org/x
    """


class Silent:
    pass


class Heir(Described):
    pass


def test_every_part_of_a_docstring_is_found():
    assert read_docstring(Described) == Docstring(
        summary="Mix two things in two lines.",
        paragraphs=("out = a + b", "A sentence of prose that has: a colon."),
        attributes={"share": "How much, up to 1.", "lambda_": "A factor: any."},
        sections={"Notes": "one two.", "Source": "Somebody 2024, https://example.org/x"},
    )


def test_a_class_speaks_only_for_itself():
    assert read_docstring(Silent) == Docstring("", (), {}, {})
    assert read_docstring(Heir).summary == ""
