"""Models of real architectures, merged and stacked, load in transformers and compute the same."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import ModuleList

from merge_kit.api import merge as run
from tests import models
from tests.models import KINDS, MIXED, STACKED, load, logits, merge, pair

HALVES = (0.5, 0.5)  # exact in every dtype
QUARTERS = (0.25, 0.75)  # exact products of 8 and 11 bits in float32

GEMMA = ["sliding_attention"] * 5 + ["full_attention"]
LAYER_TYPES = {"qwen3": MIXED, "gemma3_text": [*GEMMA, GEMMA[0]], "gemma3": GEMMA}
LAYER_TYPES["gpt_oss"] = MIXED
"""Of the inputs; other kinds have layers of one type."""

AFTER = ("lm_head.weight", "model.norm.weight", "model.language_model.norm.weight")
AFTER += ("transformer.ln_f.weight", "transformer.ln_f.bias")

Layer = tuple[str, int]


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Let torch use one thread, which is the fastest for models as small as these."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    return tmp_path_factory.mktemp("saved")


def linear(folders: Sequence[Path], shares: Sequence[float]) -> dict[str, Any]:
    entries = zip(folders, shares, strict=True)
    listed = [{"model": str(path), "parameters": {"weight": share}} for path, share in entries]
    return {"merge_method": "linear", "models": listed}


@pytest.mark.parametrize("kind", KINDS)
def test_an_average_loads_with_no_key_missing_and_equals_one_made_by_torch(kind, saved, tmp_path):
    folders = pair(kind, saved)
    shares = HALVES if KINDS[kind].dtype == torch.float32 else QUARTERS
    done = merge(linear(folders, shares), tmp_path / "out")
    assert len(done.plan.shards) > 1
    one, other = (load(kind, folder) for folder in folders)
    merged = load(kind, tmp_path / "out")
    wanted = models.averaged([one.state_dict(), other.state_dict()], shares)
    models.assert_same_tensors(merged.state_dict(), wanted)
    assert not torch.equal(logits(kind, merged), logits(kind, one))
    one.load_state_dict(wanted)
    assert torch.equal(logits(kind, merged), logits(kind, one))


def sources(kind: str, *, deeper: bool) -> list[list[Any]]:
    """Return slices as [model, first, last + 1]: two more layers than the inputs have, or three."""
    depth = KINDS[kind].config().get_text_config().num_hidden_layers
    if deeper:
        return [["a", 0, depth - 1], ["b", depth - 3, depth]]
    return [["a", 0, 1], ["b", depth - 2, depth]]


def stacked(saved: dict[str, Path], slices: Sequence[Sequence[Any]]) -> dict[str, Any]:
    listed = [
        {"sources": [{"model": str(saved[name]), "layer_range": [start, stop]}]}
        for name, start, stop in slices
    ]
    return {"merge_method": "passthrough", "slices": listed}


def stack_by_torch(
    kind: str, states: dict[str, dict[str, Tensor]], layers: Sequence[Layer]
) -> dict[str, Tensor]:
    """Return the state of a model of these layers: what leads in is a's, what leads out b's."""
    path = KINDS[kind].layers
    tied = KINDS[kind].config().get_text_config().tie_word_embeddings
    after = [name for name in AFTER if not (tied and name == "lm_head.weight")]
    state = {
        name: states["b" if name in after else "a"][name]
        for name in states["a"]
        if not name.startswith(f"{path}.")
    }
    for new, (model, layer) in enumerate(layers):
        lead = f"{path}.{layer}."
        for name, tensor in states[model].items():
            if name.startswith(lead):
                state[f"{path}.{new}.{name.removeprefix(lead)}"] = tensor
    return state


@pytest.mark.parametrize("deeper", [True, False], ids=["deeper", "shallower"])
@pytest.mark.parametrize("kind", STACKED)
def test_a_stack_of_layers_of_two_models_loads_and_generates_with_its_cache(
    kind, deeper, saved, tmp_path
):
    folders = dict(zip("ab", pair(kind, saved), strict=True))
    slices = sources(kind, deeper=deeper)
    merge(stacked(folders, slices), tmp_path / "out")
    layers = [(name, i) for name, start, stop in slices for i in range(start, stop)]
    made = load(kind, tmp_path / "out", torch.float32)
    states = {
        name: load(kind, folder, torch.float32).state_dict() for name, folder in folders.items()
    }
    wanted = stack_by_torch(kind, states, layers)
    models.assert_same_tensors(made.state_dict(), wanted)
    by_torch = model_of(kind, layers)
    by_torch.load_state_dict(wanted)
    assert torch.equal(logits(kind, made), logits(kind, by_torch))
    assert torch.equal(generated(kind, made, cache=True), generated(kind, made, cache=False))


def model_of(kind: str, layers: Sequence[Layer]) -> Any:
    """Return a model of so many layers, of the types that they have in the inputs."""
    config = KINDS[kind].config()
    text = config.get_text_config()
    text.num_hidden_layers = len(layers)
    if kind in LAYER_TYPES:
        text.layer_types = [LAYER_TYPES[kind][layer] for _, layer in layers]
    return KINDS[kind].model(config).eval()


def generated(kind: str, model: Any, *, cache: bool) -> Tensor:
    """Return the tokens that a model goes on with, greedily."""
    ids = model.generate(**KINDS[kind].inputs(), max_new_tokens=8, do_sample=False, use_cache=cache)
    assert ids.shape[1] == KINDS[kind].inputs()["input_ids"].shape[1] + 8
    return ids


def state_of(kind: str, folder: Path) -> dict[str, Tensor]:
    return dict(load(kind, folder).state_dict())


def test_a_bare_state_dict_is_averaged_and_loads_into_its_module(tmp_path):
    modules = []
    for seed, name in enumerate("ab"):
        torch.manual_seed(seed)
        modules.append(torch.nn.Sequential(torch.nn.Linear(5, 7), torch.nn.LayerNorm(7)))
        save_file(modules[-1].state_dict(), tmp_path / f"{name}.safetensors")
    files = [tmp_path / "a.safetensors", tmp_path / "b.safetensors"]
    done = merge(linear(files, HALVES), tmp_path / "out")
    assert models.files(tmp_path / "out") == {"model.safetensors", "README.md", "merge_kit.json"}
    assert done.plan.counts() == (4, 0, 0)
    wanted = models.averaged([module.state_dict() for module in modules], HALVES)
    models.assert_same_tensors(models.stored(tmp_path / "out"), wanted)
    modules[0].load_state_dict(models.stored(tmp_path / "out"))


def test_one_recipe_sums_some_layers_and_stacks_others(saved, tmp_path):
    a, b = pair("llama", saved)
    both = zip((a, b), QUARTERS, strict=True)
    summed = [
        {"model": str(path), "layer_range": [0, 2], "parameters": {"weight": share}}
        for path, share in both
    ]
    rest = {"model": str(b), "layer_range": [1, 4], "parameters": {"weight": 1}}
    recipe = {"merge_method": "linear", "slices": [{"sources": summed}, {"sources": [rest]}]}
    merge(recipe, tmp_path / "out")
    states = {"a": state_of("llama", a), "b": state_of("llama", b)}
    states["a"] = models.averaged([states["a"], states["b"]], QUARTERS)  # what leads in, too
    layers = [("a", 0), ("a", 1), ("b", 1), ("b", 2), ("b", 3)]
    made = load("llama", tmp_path / "out")
    models.assert_same_tensors(made.state_dict(), stack_by_torch("llama", states, layers))


DOCUMENTS = """\
name: soup
merge_method: linear
models:
  - {model: a, parameters: {weight: 0.25}}
  - {model: b, parameters: {weight: 0.75}}
---
name: deep
merge_method: passthrough
slices:
  - sources: [{model: soup, layer_range: [0, 3]}]
  - sources: [{model: b, layer_range: [1, 4]}]
---
merge_method: linear
base_model: deep
slices:
  - sources:
      - {model: deep, layer_range: [1, 5], parameters: {weight: 0.5}}
      - {model: a, layer_range: [0, 4], parameters: {weight: 0.5}}
"""


def test_documents_feed_one_another_without_rounding_between_them(saved, tmp_path):
    a, b = pair("llama", saved)
    (a.parent / "recipe.yaml").write_text(DOCUMENTS, encoding="utf-8")
    run(a.parent / "recipe.yaml", tmp_path / "out")
    states = {"a": state_of("llama", a), "b": state_of("llama", b)}
    wide = {m: {n: t.float() for n, t in state.items()} for m, state in states.items()}
    wide["soup"] = models.averaged([wide["a"], wide["b"]], QUARTERS)
    deep = stack_by_torch(
        "llama", {"a": wide["soup"], "b": wide["b"]}, [("a", 1), ("a", 2), ("b", 1), ("b", 2)]
    )
    wanted = models.averaged([deep, wide["a"]], HALVES)
    made = load("llama", tmp_path / "out")
    models.assert_same_tensors(
        made.state_dict(), {name: tensor.bfloat16() for name, tensor in wanted.items()}
    )


def slerp_float64(one: Tensor, other: Tensor, t: float) -> Tensor:
    u, v = one.double().flatten(), other.double().flatten()
    angle = torch.acos(torch.dot(u, v) / (u.norm() * v.norm()))
    mixed = torch.sin((1 - t) * angle) * u + torch.sin(t * angle) * v
    return (mixed / torch.sin(angle)).view(one.shape)


def gradient(name: str, anchors: tuple[float, float]) -> float:
    """Return the value for a tensor of the four-layer Llama; outside the layers it is the first."""
    parts = name.split(".")
    depth = int(parts[2]) / 3 if parts[1] == "layers" else 0.0
    return anchors[0] + depth * (anchors[1] - anchors[0])


def assert_close_to_float64(folder: Path, wanted: dict[str, Tensor], kind: str = "llama") -> None:
    """Hold bfloat16 weights to half a unit in their last place, and logits to those of the oracle.

    An element near the middle between two bfloat16 numbers may go either way (float32 knows it to
    2^-24 of the terms, hence the absolute part), so the logits are close and not equal.
    """
    made = load(kind, folder)
    for name, tensor in made.state_dict().items():
        torch.testing.assert_close(tensor.double(), wanted[name], rtol=2**-8, atol=1e-6)
    found = logits(kind, made.float())
    made.load_state_dict({name: tensor.bfloat16() for name, tensor in wanted.items()})
    torch.testing.assert_close(found, logits(kind, made), rtol=0, atol=2e-3)


def test_slerp_over_a_gradient_equals_the_formula_in_float64(saved, tmp_path):
    a, b = pair("llama", saved)
    recipe = {
        "merge_method": "slerp",
        "base_model": str(a),
        "models": [{"model": str(a)}, {"model": str(b)}],
        "parameters": {"t": [0.2, 0.8]},
    }
    merge(recipe, tmp_path / "out")
    one, other = state_of("llama", a), state_of("llama", b)
    wanted = {n: slerp_float64(one[n], other[n], gradient(n, (0.2, 0.8))) for n in one}
    assert_close_to_float64(tmp_path / "out", wanted)


def test_task_arithmetic_equals_the_formula_in_float64(saved, tmp_path):
    base, b = pair("llama", saved)
    c = models.save("llama", tmp_path / "c", 3)
    recipe = {
        "merge_method": "task_arithmetic",
        "base_model": str(base),
        "models": [
            {"model": str(b), "parameters": {"weight": 0.7}},
            {"model": str(c), "parameters": {"weight": -0.4}},
        ],
        "parameters": {"lambda": 0.9},
    }
    merge(recipe, tmp_path / "out")
    x, y, z = (state_of("llama", folder) for folder in (base, b, c))
    wanted = {}
    for name in x:
        start = x[name].double()
        deltas = 0.7 * (y[name].double() - start) - 0.4 * (z[name].double() - start)
        wanted[name] = start + 0.9 * deltas
    assert_close_to_float64(tmp_path / "out", wanted)


def test_a_tied_and_an_untied_model_give_two_matrices_and_a_config_that_says_so(tmp_path):
    tied = models.save("llama", tmp_path / "tied", 1, tie_word_embeddings=True)
    untied = models.save("llama", tmp_path / "untied", 2)
    assert "lm_head.weight" not in models.stored(tied)
    for first, second in ((tied, untied), (untied, tied)):
        out = tmp_path / f"from-{first.name}"
        merge(linear([first, second], QUARTERS), out)
        assert models.config(out)["tie_word_embeddings"] is False
        wanted = models.averaged([state_of("llama", first), state_of("llama", second)], QUARTERS)
        models.assert_same_tensors(state_of("llama", out), wanted)


def test_two_tied_models_give_one_matrix(saved, tmp_path):
    merge(linear(pair("gpt2", saved), QUARTERS), tmp_path / "out")
    stored = models.stored(tmp_path / "out")
    assert stored.keys() == models.stored(pair("gpt2", saved)[0]).keys()
    assert "lm_head.weight" not in stored


@pytest.mark.parametrize("form", ["rules", "modules"])
def test_what_no_rule_or_module_names_is_the_base_byte_for_byte(form, saved, tmp_path):
    folders = pair("llava", saved)
    recipe = linear(folders, QUARTERS) | {"base_model": str(folders[0])}
    part = {"models": recipe.pop("models")}
    if form == "rules":
        recipe["tensors"] = [{"match": "language_model.*", **part}]
    else:
        recipe["modules"] = {"text_decoder": part}
    merge(recipe, tmp_path / "out")
    one, other = (models.stored(folder) for folder in folders)
    wanted = models.averaged([one, other], QUARTERS)
    wanted |= {n: t for n, t in one.items() if not n.startswith("language_model.")}
    models.assert_same_tensors(models.stored(tmp_path / "out"), wanted)
    load("llava", tmp_path / "out")


@pytest.mark.parametrize(
    ("kind", "module", "layers"),
    [
        ("llava", "text_decoder", 5),
        ("llava", "vision_tower", 4),
        ("whisper", "encoder", 4),
        ("whisper", "decoder", 3),
        ("t5", "encoder", 4),
        ("t5", "decoder", 4),
        ("vit", "default", 4),
    ],
)
def test_a_module_is_stacked_and_the_others_stay(kind, module, layers, saved, tmp_path):
    folder = pair(kind, saved)[0]
    slices = [
        {"sources": [{"model": str(folder), "layer_range": [start, stop]}]}
        for start, stop in ((1, 2), (0, layers - 1))
    ]
    recipe = {"merge_method": "passthrough", "base_model": str(folder)}
    merge(recipe | {"modules": {module: {"slices": slices}}}, tmp_path / "out")
    made = load(kind, tmp_path / "out")
    had, has = depths(load(kind, folder)), depths(made)
    assert [has[name] for name in had if has[name] != had[name]] == [layers]
    assert logits(kind, made).isfinite().all()


def depths(model: Any) -> dict[str, int]:
    return {name: len(m) for name, m in model.named_modules() if isinstance(m, ModuleList)}
