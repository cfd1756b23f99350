"""What no method can merge: parameters, weights, models and numbers that are refused in words."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import save_file

from merge_kit.errors import MergeKitError, NonFiniteError, Problems
from merge_kit.methods.registry import find, parameters
from tests.toys import merge, plan, write
from tests.variants import ADAPTER_METHODS, MERGING_METHODS, MODEL_METHODS

OUT_OF_RANGE = {
    "density": (-0.1, 1.5, 20, "nan", [1.5, 0.5]),
    "gamma": (-0.1, 1.01),
    "epsilon": (-1, "inf"),
    "ties_density": (-1, 2),
    "select_topk": (-0.1, 1.5),
    "max_iter": (-1, 2.5),
    "tol": (-1, "nan"),
    "eps": (-1,),
    "t": ("inf", "nan"),
    "lambda": ("nan", "inf"),
    "weight": ("inf", "nan", "heavy"),
    "scale": ("inf",),
    "r": ("inf",),
    "alpha": (-1,),
    "floor": (-1,),
    "ridge": (-1, "inf"),
    "scale_off_diagonal": (-1, 2),
    "common": (-0.1, 1.1),
    "mean_over": ("models",),
    "other_weight": ("inf", "nan"),
    "scope": ("modl", "tensors"),
    "variant": ("papr",),
    "elect": ("weight",),
    "disjoint": ("median",),
    "by": ("size",),
    "to": ("models",),
    "normalize": (0.5, 2),
    "rescale": ("yes please",),
    "filter_wise": (0.3,),
    "rank": (0, -1, 2.5, "all"),
    "energy": (0, -0.1, 1.01, "nan"),
    "merging": ("mean",),
    "saved": ("last",),
    "ties": (0.5,),
    "rest": ("keep",),
}
"""Values that no method may accept, by the recipe's key."""


def required(kind) -> tuple[dict, dict]:
    """Return the parameters of each model, and of all together, that a method cannot do without."""
    values = {"weight": 1, "t": 0.1, "statistics": "s.safetensors"}
    found: tuple[dict, dict] = {}, {"rank": 1} if kind.method_name == "lora_extract" else {}
    for parameter in parameters(kind):
        if parameter.required:
            found[not parameter.per_model][parameter.name] = values[parameter.name]
    return found


def recipe(name, *, number=None, base=None, of_each=None, **more) -> str:
    """Return a recipe with `more` as parameters and `of_each` as those of each model."""
    kind = find(name)
    per_model, shared = required(kind)
    number = max(1, kind.min_inputs) if number is None else number
    models = []
    for i in range(number):
        mine = {**per_model, **(of_each[i] if of_each else {})}
        models.append({"model": f"m{i}", **({"parameters": mine} if mine else {})})
    text = {"merge_method": name, "models": models, "parameters": {**shared, **more}}
    if kind.needs_base if base is None else base:
        text["base_model"] = "base"
    return json.dumps(text, indent=1)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    generator = torch.Generator().manual_seed(0)
    for name in ("base", "m0", "m1", "m2"):
        tensors = {"x": torch.randn(4, 5, generator=generator), "y": torch.randn(3)}
        write(root / name, tensors, None)
    save_file({"x": torch.ones(4, 5), "y": torch.ones(3)}, root / "s.safetensors")
    return root


@pytest.fixture(scope="module")
def adapters(tmp_path_factory):
    root = tmp_path_factory.mktemp("adapters")
    for seed in range(3):
        write_adapter(root / f"m{seed}", seed)
    return root


@pytest.fixture
def folder(request, models, adapters):
    """Return where the models of a method lie, or the adapters where it combines those."""
    return adapters if takes_adapters(request.node.callspec.params["name"]) else models


def takes_adapters(method: str) -> bool:
    kind = find(method)
    return kind.makes == "adapter" and not kind.needs_base


def write_adapter(folder, seed: int, *, bad: float | None = None) -> None:
    """Write a LoRA adapter of two modules, with a number in one of them that is not finite."""
    draw = torch.Generator().manual_seed(seed)
    tensors = {}
    for layer, module in enumerate(("fine", "broken")):
        path, (rows, columns) = f"base_model.model.layers.{layer}.{module}", (4 - layer, 5)
        tensors[f"{path}.lora_A.weight"] = torch.randn(2, columns, generator=draw)
        tensors[f"{path}.lora_B.weight"] = torch.randn(rows, 2, generator=draw)
    if bad is not None:
        tensors["base_model.model.layers.1.broken.lora_B.weight"][1, 0] = bad
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["fine", "broken"]}
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps(config))


def refusal(text, folder, act=plan) -> MergeKitError:
    """Return the error of what must be refused; each of several is a place and a problem."""
    with pytest.raises(MergeKitError) as caught:
        act(text, folder)
    errors = caught.value.errors if isinstance(caught.value, Problems) else (caught.value,)
    for error in errors:
        assert error.where
        assert error.problem
    return caught.value


RANGES = [
    (name, parameter.name, value, parameter.per_model)
    for name in MERGING_METHODS
    for parameter in parameters(find(name))
    for value in OUT_OF_RANGE.get(parameter.name, ())
]


@pytest.mark.parametrize(("name", "key", "value", "per_model"), RANGES)
def test_a_value_out_of_range_is_refused_at_its_place(folder, name, key, value, per_model):
    kind = find(name)
    if per_model:
        number = max(1, kind.min_inputs)
        text = recipe(name, of_each=[{key: value}] * number)
    else:
        text = recipe(name, **{key: value})
    error = refusal(text, folder)
    first = error.errors[0] if isinstance(error, Problems) else error
    assert first.where.startswith("<recipe>:")
    assert first.problem.startswith(f"{key} ")
    assert "expected" in first.problem


@pytest.mark.parametrize("name", MERGING_METHODS)
def test_every_parameter_with_a_range_is_tried(name):
    """So that a new parameter cannot go without its bad values."""
    free = {"statistics", "nuslerp_flatten", "nuslerp_row_wise", "normalize_weights", "flatten"}
    free |= {"normalize_fisher", "favor_first"}  # bools, as normalize is
    for parameter in parameters(find(name)):
        assert parameter.name in free | OUT_OF_RANGE.keys()


@pytest.mark.parametrize("name", ["della", "della_linear"])
@pytest.mark.parametrize("density", [0.9, 0.1, 0.85, 0.15, 0.999])
def test_a_window_of_probabilities_beyond_0_and_1_is_refused(folder, name, density):
    error = refusal(recipe(name, density=density, epsilon=0.15), folder)
    assert "epsilon" in str(error) or "density" in str(error)
    assert error.hint


NORMALISING = [n for n in MERGING_METHODS if "normalize" in {p.name for p in parameters(find(n))}]
VOTING = ("ties", "breadcrumbs_ties", "dare_ties", "della")
"""Where what agrees has weights of one sign, and their magnitudes divide."""
ALIKE = (*VOTING, "lora_ties", "lora_knots")


@pytest.mark.parametrize("name", [n for n in NORMALISING if n not in ALIKE] + ["multislerp"])
@pytest.mark.parametrize("weights", [(1, -1), (1, -0.9999999), (3, -2, -1)])
def test_weights_that_cancel_cannot_be_normalised(folder, name, weights):
    of_each = [{"weight": weight} for weight in weights]
    key = "normalize_weights" if name == "multislerp" else "normalize"
    text = recipe(name, number=len(weights), of_each=of_each, **{key: True})
    error = refusal(text, folder)
    assert "weight" in str(error)
    assert error.hint


@pytest.mark.parametrize("name", VOTING)
def test_a_vote_divides_by_magnitudes_that_do_not_cancel(folder, name):
    of_each = [{"weight": 1}, {"weight": -1}]
    merged = merge(recipe(name, number=2, of_each=of_each, normalize=True), folder)
    assert all(tensor.abs().max() < 10 for tensor in merged.values())


@pytest.mark.parametrize("name", ["fisher", "regmean", "karcher"])
@pytest.mark.parametrize("weights", [(0, 0), (1, -1)])
def test_weights_of_evidence_and_of_points_are_not_negative_and_not_all_zero(folder, name, weights):
    error = refusal(recipe(name, number=2, of_each=[{"weight": w} for w in weights]), folder)
    assert "weight" in str(error)


NEEDY = [name for name in MERGING_METHODS if find(name).needs_base]


@pytest.mark.parametrize("name", NEEDY)
def test_a_missing_base_is_refused(folder, name):
    error = refusal(recipe(name, base=False), folder)
    assert "base_model" in str(error)
    assert error.hint


@pytest.mark.parametrize("name", MERGING_METHODS)
def test_too_few_and_too_many_models_are_refused(folder, name):
    kind = find(name)
    if kind.min_inputs > 1:
        assert "model" in str(refusal(recipe(name, number=kind.min_inputs - 1), folder))
    if kind.max_inputs is not None:
        assert "model" in str(refusal(recipe(name, number=kind.max_inputs + 1), folder))


@pytest.mark.parametrize("name", MODEL_METHODS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("where", ["m0", "last", "base"])
def test_what_is_not_finite_is_found_and_named(tmp_path, name, bad, where):
    """Also where a trim or a zero weight would have hidden it."""
    kind = find(name)
    number = max(2, kind.min_inputs) if kind.max_inputs is None else kind.max_inputs
    where = f"m{number - 1}" if where == "last" else where
    if (where == "base" and not kind.needs_base) or kind.copies(kind(**passing(kind))):
        return
    for i, model in enumerate(("base", *(f"m{i}" for i in range(number)))):
        values = torch.arange(20.0).reshape(4, 5) * (1 + 0.1 * i)
        if model == where:
            values[2, 3] = bad
        write(tmp_path / model, {"fine": torch.ones(3), "broken": values}, None)
    statistics = torch.ones(4, 5) if kind.statistics_of == "elements" else torch.eye(5)
    ones = torch.ones(3) if kind.statistics_of == "elements" else torch.eye(3)
    stats = {"broken": statistics, **({"fine": ones} if kind.statistics_of == "elements" else {})}
    save_file(stats, tmp_path / "s.safetensors")
    known = {p.name for p in parameters(kind)}
    density = {"density": 0.5, "epsilon": 0.1} if "density" in known else {}
    text = recipe(name, number=number, **{k: v for k, v in density.items() if k in known})
    error = refusal(text, tmp_path, merge)
    assert isinstance(error, NonFiniteError)
    assert "broken" in str(error)
    assert where in str(error)


@pytest.mark.parametrize("name", [n for n in ADAPTER_METHODS if takes_adapters(n)])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("more", [{}, {"energy": 0.5}, {"density": 0.5}], ids=str)
def test_factors_that_are_not_finite_are_found_and_named(tmp_path, name, bad, more):
    """Also where a rank is fitted first."""
    if not more.keys() <= {p.name for p in parameters(find(name))}:
        return
    for i in range(2):
        write_adapter(tmp_path / f"m{i}", i, bad=bad if i else None)
    error = refusal(recipe(name, number=2, **more), tmp_path, merge)
    assert isinstance(error, NonFiniteError)
    assert "layers.1.broken" in str(error)
    assert "m1" in str(error)


def passing(kind) -> dict:
    """Return values of the required parameters, by field."""
    values = {"weight": (1.0,), "t": 0.1, "statistics": ("s",)}
    return {p.field: values[p.name] for p in parameters(kind) if p.required}


LARGE = torch.full((4, 5), 60_000.0, dtype=torch.float16)
GROWING = {
    "linear": {"normalize": False},
    "task_arithmetic": {"lambda": 2},
    "magnitude": {"lambda": 2},
    "ties": {"lambda": 2},
    "breadcrumbs": {"lambda": 2},
    "breadcrumbs_ties": {"lambda": 2},
    "dare_linear": {"lambda": 2},
    "dare_ties": {"lambda": 2},
    "della": {"lambda": 2},
    "della_linear": {"lambda": 2},
    "multislerp": {"normalize_weights": False},
    "rescale": {"normalize": False},
    "slerp": {"t": 2},
    "ramplus_tl": {"r": 2, "alpha": 1},
    "tsv": {"lambda": 8},
    "iso_c": {"lambda": 8},
    "iso_cts": {"lambda": 8},
    "wudi": {"lambda": 8},
}
"""Parameters with which models of the largest float16 numbers grow beyond them."""


@pytest.mark.parametrize("name", [n for n in GROWING if n in MERGING_METHODS])
def test_sums_beyond_float16_are_refused_and_named(tmp_path, name):
    generator = torch.Generator().manual_seed(0)
    kind = find(name)
    number = 2 if kind.max_inputs is None else kind.max_inputs
    write(tmp_path / "base", {"x": 0.1 * LARGE}, None)
    for i in range(number):
        values = LARGE * (1 - 0.1 * torch.rand((4, 5), generator=generator)).half()
        write(tmp_path / f"m{i}", {"x": values}, None)
    if name == "ramplus_tl":  # m1 is the base, but for what it shares
        shared = 0.1 * LARGE
        shared[0] = LARGE[0]
        write(tmp_path / "n", {"x": shared}, None)
        (tmp_path / "m1").rename(tmp_path / "old")
        (tmp_path / "n").rename(tmp_path / "m1")
    error = refusal(recipe(name, number=number, **GROWING[name]), tmp_path, merge)
    assert isinstance(error, NonFiniteError)
    assert "too large for F16" in str(error)
    assert "x" in error.where
    assert error.hint


@pytest.mark.parametrize("name", ["ties", "breadcrumbs", "magnitude"])
def test_norms_beyond_float16_do_not_overflow(tmp_path, name):
    """4,000 numbers of 60,000: their L1 norm is far beyond what float16 holds."""
    large = torch.full((4_000,), 60_000.0, dtype=torch.float16)
    large[::2] = 0
    write(tmp_path / "base", {"x": torch.zeros(4_000, dtype=torch.float16)}, None)
    write(tmp_path / "m0", {"x": large}, None)
    merged = merge(
        recipe(
            name,
            density=0.5,
            rescale=True,
            **({"gamma": 0} if name == "breadcrumbs" else {}),
            normalize=True,
        ),
        tmp_path,
    )
    assert torch.equal(merged["x"], large)
