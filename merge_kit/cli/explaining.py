"""`mergekit methods`: what each method does and what it can be told."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from merge_kit.cli.docstrings import Docstring, read_docstring
from merge_kit.cli.text import paragraph_of, print_json, table
from merge_kit.methods.base import Law, MergeMethod
from merge_kit.methods.registry import Parameter, find, names, parameters
from merge_kit.plan.describe import Row, labelled, plural

LAWS: dict[Law, str] = {
    "single": "one model with neutral parameters gives that model",
    "copies": "copies of one model give that model",
    "copies_of_base": "copies of the base give the base",
    "permute_models": "the order of the models changes nothing",
    "permute_rows": "permuted rows give permuted rows",
}


def show_methods(*, as_json: bool) -> None:
    """Print all methods with their first lines, or as JSON with everything."""
    if as_json:
        print_json([method_json(find(name)) for name in names()])
    else:
        print(table([Row(name, read_docstring(find(name)).summary) for name in names()]))


def show_method(name: str, *, as_json: bool) -> None:
    """Print one method: formula, explanation, parameters, demands, laws, source."""
    method = find(name)
    if as_json:
        print_json(method_json(method))
        return
    doc = read_docstring(method)
    print(paragraph_of(f"{name}: {doc.summary}") + "\n")
    for paragraph in doc.paragraphs:
        print(paragraph_of(paragraph) + "\n")
    print(table(list(_rows(method, doc))))


def method_json(method: type[MergeMethod]) -> dict[str, Any]:
    """Return everything about a method, in an order that is its own."""
    doc = read_docstring(method)
    return {
        "name": method.method_name,
        "summary": doc.summary,
        "text": list(doc.paragraphs),
        "parameters": [_parameter_json(p, doc) for p in parameters(method)],
        "needs_base": method.needs_base,
        "takes_base": method.takes_base,
        "makes": method.makes,
        "operates_on": method.operates_on,
        "min_inputs": method.min_inputs,
        "max_inputs": method.max_inputs,
        "grain": method.grain,
        "laws": dict(method.laws),
        "sections": dict(doc.sections),
    }


def _parameter_json(parameter: Parameter, doc: Docstring) -> dict[str, Any]:
    return {
        "name": parameter.name,
        "type": parameter.kind.__name__,
        "choices": list(parameter.choices),
        "per_model": parameter.per_model,
        "required": parameter.required,
        "default": parameter.default,
        "text": doc.attributes.get(parameter.field, ""),
    }


def _rows(method: type[MergeMethod], doc: Docstring) -> Iterator[Row]:
    for parameter in parameters(method):
        yield Row(parameter.name, f"{_kind(parameter)}. {doc.attributes.get(parameter.field, '')}")
    yield Row("base", _base(method))
    yield Row("takes", f"{_inputs(method)}{' besides the base' if method.takes_base else ''}")
    yield Row("in memory", f"{method.grain} by {method.grain}")
    yield from labelled("laws", [_law(law, within) for law, within in method.laws.items()])
    for title, text in doc.sections.items():
        yield Row(title.lower(), text)


def _law(law: Law, tolerance: float) -> str:
    within = f"within {tolerance:.2g}" if tolerance else "exactly"
    return f"{LAWS[law]}, {within}"


def _kind(parameter: Parameter) -> str:
    each = ", each model may have its own" if parameter.per_model else ""
    if parameter.required:
        return f"{parameter.shown_kind}{each}, required"
    default = parameter.default
    shown = {True: "true", False: "false"}[default] if isinstance(default, bool) else default
    absent = "not given" if default is None else shown
    return f"{parameter.shown_kind}{each}, default {absent}"


def _base(method: type[MergeMethod]) -> str:
    if method.needs_base:
        return "required"
    if method.makes == "adapter":
        return "none"
    if method.makes == "structure":
        return "optional; what it gives stands above"
    return "optional" if method.takes_base else "an ordinary input, if there is one"


def _inputs(method: type[MergeMethod]) -> str:
    least, most = method.min_inputs, method.max_inputs
    if most is None:
        return f"{least} or more {'adapters' if method.makes == 'adapter' else 'models'}"
    return plural(most, "model") if least == most else f"{least} to {most} models"
