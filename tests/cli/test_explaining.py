from __future__ import annotations

import json

import pytest

from merge_kit.cli import main
from merge_kit.cli.explaining import LAWS
from merge_kit.methods.registry import find, names, parameters


def test_every_method_is_listed_with_its_first_line(capsys):
    assert main(["methods"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines if not line.startswith(" ")] == list(names())
    assert any(line.endswith('Weighted sum or average of models ("model soup").') for line in lines)
    assert max(map(len, lines)) <= 80


def test_a_method_is_explained_with_formula_parameters_demands_laws_and_source(capsys):
    assert main(["methods", "task_arithmetic"]) == 0
    out = capsys.readouterr().out
    assert "task_arithmetic: Add weighted task vectors (fine-tune minus base) to a base.\n" in out
    assert "out = base + lambda * sum(w_i (x_i - base))" in out
    assert "weight     float, each model may have its own, required. Weight of each task" in out
    assert "lambda     float, default 1.0. Factor on the summed task vector." in out
    assert "base       required" in out
    assert "takes      0 or more models besides the base" in out
    assert "copies of the base give the base, exactly" in out
    assert "source     Ilharco et al. 2023" in out


def test_a_method_that_makes_adapters_takes_adapters_and_no_base(capsys):
    assert main(["methods", "lora_svd"]) == 0
    out = capsys.readouterr().out
    assert "base         none\n" in out
    assert "takes        1 or more adapters\n" in out
    assert main(["methods", "lora_svd", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["makes"] == "adapter"


def test_json_holds_the_same_for_one_and_for_all(capsys):
    assert main(["methods", "slerp", "--json"]) == 0
    one = json.loads(capsys.readouterr().out)
    assert main(["methods", "--json"]) == 0
    every = json.loads(capsys.readouterr().out)
    assert one in every
    assert [method["name"] for method in every] == list(names())
    assert one["parameters"][0] == {
        "name": "t",
        "type": "float",
        "choices": [],
        "per_model": False,
        "required": True,
        "default": None,
        "text": "0 gives the base, 1 the other model; any finite number.",
    }
    assert (one["needs_base"], one["min_inputs"], one["max_inputs"]) == (True, 1, 1)
    assert one["laws"] == {"copies": 2.0**-22, "copies_of_base": 2.0**-22}


def test_an_unknown_method_is_an_error_that_names_the_nearest(capsys):
    assert main(["methods", "slrp"]) == 2
    assert capsys.readouterr().err == (
        "error: unknown merge method 'slrp'\n  hint: did you mean 'slerp'?\n"
    )


@pytest.mark.parametrize("name", names())
def test_every_method_describes_itself_completely_in_80_columns(capsys, name):
    assert main(["methods", name]) == 0
    assert max(map(len, capsys.readouterr().out.splitlines())) <= 80
    assert main(["methods", name, "--json"]) == 0
    page = json.loads(capsys.readouterr().out)
    assert page["summary"]
    assert [p["name"] for p in page["parameters"]] == [p.name for p in parameters(find(name))]
    assert all(p["text"] for p in page["parameters"])
    assert set(page["laws"]) <= set(LAWS)


def test_no_two_rows_of_an_explanation_have_one_label(capsys):
    assert main(["methods", "sparse_upcycle"]) == 0
    lines = capsys.readouterr().out.splitlines()
    labels = [line.split("  ")[0] for line in lines if line[:1].isalpha() and "  " in line]
    assert "takes" in labels
    assert len(labels) == len(set(labels))
