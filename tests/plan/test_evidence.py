"""Files of statistics: found, checked against the models from headers alone, recorded."""

from __future__ import annotations

import json

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

import merge_kit as mk
from merge_kit.api.functions import method_function
from merge_kit.errors import CheckpointError, MismatchError, Problems, RecipeError
from merge_kit.publish.recipes import recipe_hash
from tests.toys import plan, write

UP, NORM, POS = "layers.0.up.weight", "layers.0.norm.weight", "positions"
TENSORS = {UP: torch.ones(3, 2), NORM: torch.ones(2), POS: torch.tensor([0, 1])}


def model(folder, factor):
    scaled = {k: v * factor if v.is_floating_point() else v for k, v in TENSORS.items()}
    return write(folder, scaled, {"model_type": "toy"})


def fisher(path, value, metadata=None, **changes):
    tensors = {UP: torch.full((3, 2), value), NORM: torch.full((2,), value)} | changes
    save_file({k: v for k, v in tensors.items() if v is not None}, path, metadata)


def gram(path, value, metadata=None, name=UP):
    save_file({name: torch.eye(2) * value}, path, metadata)


@pytest.fixture
def folder(tmp_path):
    """Two models, 1 and 3, and statistics that weigh them 3 to 1."""
    model(tmp_path / "a", 1.0)
    model(tmp_path / "b", 3.0)
    fisher(tmp_path / "fa.safetensors", 3.0)
    fisher(tmp_path / "fb.safetensors", 1.0)
    gram(tmp_path / "ga.safetensors", 3.0)
    gram(tmp_path / "gb.safetensors", 1.0)
    return tmp_path


def recipe(method="fisher", first="fa", second="fb", **more):
    files = {"a": first, "b": second}
    models = [
        {"model": m, "parameters": {"statistics": f"{f}.safetensors"}} for m, f in files.items()
    ]
    raw = {"normalize_fisher": False} if method == "fisher" else {}
    return json.dumps({"merge_method": method, "models": models, "parameters": raw} | more)


def merged(text, folder):
    path = folder / "recipe.yaml"
    path.write_text(text, encoding="utf-8")
    made = mk.merge(path, folder / "out", overwrite=True)
    return made, load_file(folder / "out" / "model.safetensors")


def problems(text, folder) -> str:
    with pytest.raises((MismatchError, CheckpointError, Problems, RecipeError)) as caught:
        plan(text, folder)
    return str(caught.value)


def test_statistics_beside_the_recipe_weigh_the_models(folder):
    """(3 * 1 + 1 * 3) / 4 = 1.5."""
    _, tensors = merged(recipe(), folder)
    assert tensors[UP].tolist() == [[1.5, 1.5]] * 3
    assert tensors[NORM].tolist() == [1.5, 1.5]
    assert tensors[POS].tolist() == [0, 1]


def test_tensors_without_a_gram_matrix_get_the_plain_mean(folder):
    made, tensors = merged(recipe("regmean", "ga", "gb"), folder)
    assert torch.allclose(tensors[UP], torch.tensor(1.5), atol=1e-3)
    assert tensors[NORM].tolist() == [2.0, 2.0]
    steps = {s.outputs[0].key: s.method for s in made.plan.steps}
    assert steps[UP].method_name == "regmean"
    assert steps[NORM].method_name == "linear"


def test_a_base_lends_its_files_and_is_not_read(folder):
    model(folder / "base", 7.0)
    made, tensors = merged(recipe(base_model="base"), folder)
    assert tensors[UP][0, 0] == 1.5
    fates = {f.tensor: (f.what, f.why) for f in made.plan.fates if f.model == "input-3"}
    assert fates[UP] == ("dropped", "the model only lends its files")


def test_names_may_share_statistics(folder):
    (folder / "fa.safetensors").unlink()
    both = {UP: torch.ones(3, 2), "layers.0.gate.weight": torch.full((3, 2), 5.0)}
    for name, factor in (("a", 1.0), ("b", 3.0)):
        save_file({k: v * factor for k, v in both.items()}, folder / name / "model.safetensors")
        shared = {"shared": json.dumps({"layers.0.gate.weight": UP})}
        gram(folder / f"g{name}.safetensors", 4 - factor, shared)
    made, tensors = merged(recipe("regmean", "ga", "gb"), folder)
    assert {s.method.method_name for s in made.plan.steps} == {"regmean"}
    assert torch.allclose(tensors["layers.0.gate.weight"], torch.tensor(7.5), atol=5e-3)


def test_metadata_name_weights_whose_first_axis_is_the_inputs(folder):
    turned = {"transposed": json.dumps([UP])}
    for name, value in (("a", 3.0), ("b", 1.0)):
        save_file({UP: torch.eye(3) * value}, folder / f"g{name}.safetensors", turned)
    _, tensors = merged(recipe("regmean", "ga", "gb"), folder)
    assert torch.allclose(tensors[UP], torch.tensor(1.5), atol=1e-3)
    gram(folder / "gb.safetensors", 1.0)
    assert "do not agree whether its first axis" in problems(recipe("regmean", "ga", "gb"), folder)


def test_missing_files_come_in_one_list_with_their_places(folder):
    text = problems(recipe(first="no", second="nor"), folder)
    assert "no file of statistics 'no.safetensors'" in text
    assert "no file of statistics 'nor.safetensors'" in text
    assert text.count("<recipe>:1:") + text.count("recipe.yaml:1:") == 2
    assert "collect_statistics.py" in text
    assert "hf download" not in text


def test_the_parameter_is_required(folder):
    text = json.dumps({"merge_method": "fisher", "models": [{"model": "a"}, {"model": "b"}]})
    assert "fisher needs 'statistics' for input-1:a" in problems(text, folder)


def test_tensors_without_evidence_are_listed_once_a_file(folder):
    fisher(folder / "fb.safetensors", 1.0, **{NORM: None})
    text = problems(recipe(), folder)
    assert "lacks statistics for 1 tensors of input-2:b: layers.0.norm.weight" in text
    assert text.count("hint") == 1


def test_a_gram_matrix_in_one_file_only_is_an_error(folder):
    name = "layers.0.norm.weight"
    save_file({name: torch.eye(2)}, folder / "gb.safetensors")
    text = problems(recipe("regmean", "ga", "gb"), folder)
    assert f"lacks statistics for 1 tensors of input-2:b that statistics-1:ga has: {UP}" in text


@pytest.mark.parametrize(
    ("wrong", "found"),
    [
        (torch.ones(2, 3), r"F32 of shape [2, 3], expected floats of shape [3, 2]"),
        (torch.ones(3, 2).int(), r"I32 of shape [3, 2], expected floats of shape [3, 2]"),
    ],
)
def test_shapes_and_dtypes_that_do_not_fit_are_refused(folder, wrong, found):
    fisher(folder / "fb.safetensors", 1.0, **{UP: wrong})
    text = problems(recipe(), folder)
    assert found in text
    assert f"{UP}: the statistics of input-2:b in statistics-2:fb" in text


def test_a_gram_matrix_of_the_outputs_is_refused(folder):
    save_file({UP: torch.eye(3)}, folder / "ga.safetensors")
    text = problems(recipe("regmean", "ga", "gb"), folder)
    assert "F32 of shape [3, 3], expected floats of shape [2, 2]" in text


def test_a_gram_matrix_of_what_is_no_matrix_is_refused(folder):
    for name in ("ga", "gb"):
        gram(folder / f"{name}.safetensors", 1.0, name=NORM)
    text = problems(recipe("regmean", "ga", "gb"), folder)
    assert f"{NORM}: has shape [2] and a Gram matrix in statistics-1:ga" in text


def test_statistics_of_another_model_or_kind_are_refused(folder):
    gram(folder / "gb.safetensors", 1.0, name="other.weight")
    text = problems(recipe("regmean", "ga", "gb"), folder)
    assert "has statistics for no tensor of input-2:b; it has: other.weight" in text
    fisher(folder / "fa.safetensors", 1.0, {"statistics": "fisher"})
    text = problems(recipe("regmean", "fa", "ga"), folder)
    assert "holds statistics of the kind 'fisher', expected 'gram'" in text


@pytest.mark.parametrize("broken", ["[1]", "{", '{"a": 1}', "7"])
def test_broken_metadata_are_refused(folder, broken):
    gram(folder / "ga.safetensors", 1.0, {"shared": broken})
    assert "expected a JSON object" in problems(recipe("regmean", "ga", "gb"), folder)


def test_statistics_that_nothing_asks_for_are_noted(folder):
    extra = {f"other.{i}.weight": torch.ones(1) for i in range(7)}
    fisher(folder / "fb.safetensors", 1.0, **extra)
    (note,) = plan(recipe(), folder).notes[-1:]
    assert note.startswith("statistics-2:fb: nothing merged asks for 7: other.0.weight")
    assert note.endswith(", ...")


def test_the_bill_counts_the_statistics(folder):
    plain = plan(
        json.dumps(
            {
                "merge_method": "linear",
                "models": [{"model": m, "parameters": {"weight": 1}} for m in ("a", "b")],
            }
        ),
        folder,
    )
    weighed = plan(recipe(), folder)
    assert weighed.bill.read_bytes - plain.bill.read_bytes == 2 * (6 + 2) * 4
    assert [one.key for one in weighed.statistics] == ["statistics-1", "statistics-2"]


def test_a_file_that_changes_makes_another_identity(folder):
    before = plan(recipe(), folder).identity
    fisher(folder / "fb.safetensors", 2.0)
    assert plan(recipe(), folder).identity != before


def test_outputs_show_no_path(folder):
    whole = {name: str(folder / f"f{name}.safetensors") for name in "ab"}
    models = [{"model": m, "parameters": {"statistics": whole[m]}} for m in "ab"]
    models[1]["parameters"]["statistics"] = [
        {"filter": "up", "value": whole["b"]},
        {"value": whole["b"]},
    ]
    made, _ = merged(json.dumps({"merge_method": "fisher", "models": models}), folder)
    record = json.loads((made.output / "merge_kit.json").read_text(encoding="utf-8"))
    shown = yaml.safe_load(record["recipe"])["models"]
    assert shown[0]["parameters"] == {"statistics": "statistics-1:fa"}
    rules = [{"filter": "up", "value": "statistics-2:fb"}, {"value": "statistics-2:fb"}]
    assert shown[1]["parameters"] == {"statistics": rules}
    assert [s["files"][0]["name"] for s in record["statistics"]] == [
        "fa.safetensors",
        "fb.safetensors",
    ]
    assert recipe_hash(record["recipe"]) == record["recipe_hash"]
    for file in ("merge_kit.json", "README.md"):
        assert str(folder) not in (made.output / file).read_text(encoding="utf-8")


def test_functions_of_the_library_take_paths(folder, monkeypatch):
    monkeypatch.chdir(folder)
    function = method_function("fisher")
    paths = ["fa.safetensors", "fb.safetensors"]
    held = [load_file(folder / m / "model.safetensors") for m in "ab"]
    lazy = function(held, statistics=paths, normalize_fisher=False)
    assert lazy.state_dict()[UP].tolist() == [[1.5, 1.5]] * 3
    saved = function(["a", "b"], statistics=paths, normalize_fisher=False).save("saved")
    assert load_file(saved / "model.safetensors")[UP].tolist() == [[1.5, 1.5]] * 3
