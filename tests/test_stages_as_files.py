"""Stages give the bits of separate runs whose results lie in files between them.

A stage without a dtype lies there in float32, one with a dtype in that.
"""

from __future__ import annotations

import random

import pytest
import torch

from merge_kit.core.tensors import BLOCK
from merge_kit.errors import MismatchError
from merge_kit.plan.steps import seed_of
from tests.toys import config, merge, plan, write

SHAPES = {
    "rows": (3, BLOCK // 2 + 13),  # one slab is one row, and starts inside a block
    "vector": (33,),
    "scalar": (),
    "empty": (0, 4),
    "model.layers.0.w": (5, 7),
    "model.layers.1.w": (5, 7),
}
FORMS = (
    "linear",
    "task_arithmetic",
    "slerp",
    "slerp by rows",
    "scaled",
    "copied",
    "ties",
    "ties of the whole model",
    "dare_ties of the paper",
    "della",
)
DTYPES = ("", "bfloat16", "float16", "float32")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    kinds = {"d": torch.float32, "h": torch.float16}
    for seed, name in enumerate("abcdefh"):
        generator = torch.Generator().manual_seed(seed)
        tensors = {n: torch.randn(shape, generator=generator) for n, shape in SHAPES.items()}
        tensors = {n: t.to(kinds.get(name, torch.bfloat16)) for n, t in tensors.items()}
        write(root / name, {**tensors, "ids": torch.arange(5)}, config(2))
    return root


def text(form: str, left: str, right: str) -> str:
    """Return a document that merges two models in one of the forms."""
    two = f"models: [{{model: {left}}}, {{model: {right}, parameters: {{weight: 0.7}}}}]\n"
    one = f"base_model: {left}\nmodels: [{{model: {right}}}]\n"
    return {
        "linear": f"merge_method: linear\nparameters: {{weight: [0.3, 0.9]}}\n{two}",
        "task_arithmetic": f"merge_method: task_arithmetic\nparameters: {{weight: 0.7}}\n{one}",
        "slerp": f"merge_method: slerp\nparameters: {{t: 0.3}}\n{one}",
        "slerp by rows": f"merge_method: slerp\nparameters: {{t: 0.3, flatten: false}}\n{one}",
        "ties": f"merge_method: ties\nparameters: {{weight: 0.7, density: 0.3}}\n{one}",
        "ties of the whole model": "merge_method: ties\n"
        f"parameters: {{weight: 0.7, density: 0.3, scope: model}}\n{one}",
        "dare_ties of the paper": "merge_method: dare_ties\n"
        f"parameters: {{weight: 0.7, density: 0.5, variant: paper}}\n{one}",
        "della": f"merge_method: della\nparameters: {{weight: 0.7, density: 0.5}}\n{one}",
        "scaled": f"merge_method: passthrough\nparameters: {{scale: 1.3}}\n"
        f"models: [{{model: {right}}}]\n",
        "copied": f"merge_method: passthrough\nmodels: [{{model: {right}}}]\n",
    }[form]


def equal_to_files(folder, *stages: tuple[str, str], slab_blocks: int | None = 1) -> bool:
    """Return whether documents (text, dtype), named s0, s1, ... give the bits of separate runs."""
    documents = [body + (f"dtype: {dtype}\n" if dtype else "") for body, dtype in stages]
    named = [f"name: s{i}\n{document}" for i, document in enumerate(documents[:-1])]
    together = merge("---\n".join([*named, documents[-1]]), folder, slab_blocks=slab_blocks)
    for i, (body, dtype) in enumerate(stages):
        seed = seed_of(f"s{i}" if i < len(stages) - 1 else None, 0)
        alone = merge(f"seed: {seed}\n{body}dtype: {dtype or 'float32'}\n", folder)
        if i < len(stages) - 1:
            made = folder / f"s{i}"
            for file in made.iterdir() if made.exists() else ():
                file.unlink()
            if made.exists():
                made.rmdir()
            write(made, alone, config(2))
    return together.keys() == alone.keys() and all(
        tensor.dtype == alone[name].dtype
        and torch.equal(tensor.flatten().view(torch.uint8), alone[name].flatten().view(torch.uint8))
        for name, tensor in together.items()
    )


@pytest.mark.parametrize("first", FORMS)
@pytest.mark.parametrize("second", FORMS)
def test_two_stages(folder, first, second):
    dtype = DTYPES[(FORMS.index(first) + 2 * FORMS.index(second)) % 4]
    for out in ("bfloat16", "float32") if dtype == "" else ("bfloat16",):
        for left, right in (("s0", "c"), ("c", "s0"))[second in ("scaled", "copied") :]:
            stages = (text(first, "a", "b"), dtype), (text(second, left, right), out)
            assert equal_to_files(folder, *stages)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(40))
def test_three_stages(folder, seed):
    three(folder, seed)


@pytest.mark.parametrize("seed", range(40, 48))
def test_some_of_three_stages(folder, seed):
    three(folder, seed)


def three(folder, seed: int) -> None:
    chance = random.Random(seed)
    stages = [(text(chance.choice(FORMS), "a", "b"), chance.choice(DTYPES))]
    for i in (1, 2):
        pair = [f"s{i - 1}", chance.choice(["c", "d", "h", "s0" if i == 2 else "f"])]
        chance.shuffle(pair)
        form = chance.choice(FORMS)
        pair[1] = f"s{i - 1}" if form in ("scaled", "copied") else pair[1]
        stages.append((text(form, *pair), chance.choice(DTYPES[i - 1 :])))
    assert equal_to_files(folder, *stages)


@pytest.mark.parametrize("order", [("s0", "s1"), ("s1", "s0")])
def test_a_stage_that_one_reader_recomputes_and_another_reads_by_rows(folder, order):
    """Scratch holds it for both: rows do not start at blocks."""
    models = ", ".join(f"{{model: {name}}}" for name in order)
    last = "merge_method: task_arithmetic\nbase_model: d\nparameters: {weight: 0.5}\n"
    stages = (
        (text("linear", "a", "b"), ""),
        (text("slerp by rows", "s0", "c"), ""),
        (f"{last}models: [{models}]\n", "bfloat16"),
    )
    assert equal_to_files(folder, *stages)


def test_a_stage_used_twice_by_one_document(folder):
    twice = "merge_method: linear\nparameters: {weight: 0.5}\n"
    twice += "models: [{model: s0}, {model: s0@again}, {model: c}]\n"
    assert equal_to_files(folder, (text("linear", "a", "b"), ""), (twice, "float32"))


@pytest.mark.parametrize("last", ["linear", "copied"])
@pytest.mark.parametrize("out", ["float32", "bfloat16"])
def test_many_models_leave_float32_between_stages(folder, last, out):
    """They are summed in float64, and rounded to float32 before they feed another stage."""
    models = ", ".join(f"{{model: {name}}}" for name in "abcef")
    five = f"merge_method: linear\nparameters: {{weight: [0.1, 0.37]}}\nmodels: [{models}]\n"
    assert equal_to_files(folder, (five, ""), (text(last, "d", "s0"), out))


def test_float64_stays_float64_between_stages(tmp_path):
    for name, number in (("a", 1.0), ("b", 1.0 + 2.0**-40)):
        write(tmp_path / name, {"x": torch.full((3,), number, dtype=torch.float64)}, None)
    first = "name: s\nmerge_method: linear\nparameters: {weight: 1}\n"
    first += "models: [{model: a}, {model: b}]\n---\n"
    last = "merge_method: passthrough\nmodels: [{model: s, parameters: {scale: 1}}]\n"
    result = merge(first + last, tmp_path)["x"]
    assert result.tolist() == [1.0 + 2.0**-41] * 3


@pytest.mark.parametrize("first", FORMS)
@pytest.mark.parametrize(("last", "dtype"), [("linear", ""), ("slerp", "float16"), ("copied", "")])
def test_slices_of_a_stage(folder, first, last, dtype):
    base = {"linear": "", "slerp": "base_model: s0\n", "copied": ""}[last]
    method = {"linear": "linear", "slerp": "slerp", "copied": "passthrough"}[last]
    other = "" if last == "copied" else ", {{model: c, layer_range: [0, {}]}}"
    stack = (
        f"merge_method: {method}\n{base}parameters: {{weight: [1, 2], t: [0.1, 0.9]}}\nslices:\n"
    )
    for start, stop in ((1, 2), (0, 2)):
        more = other.format(stop - start)
        stack += f"  - sources: [{{model: s0, layer_range: [{start}, {stop}]}}{more}]\n"
    assert equal_to_files(folder, (text(first, "a", "b"), dtype), (stack, "bfloat16"))


@pytest.mark.parametrize("first", FORMS)
@pytest.mark.parametrize("out", ["bfloat16", "float32"])
def test_rules_over_a_stage(folder, first, out):
    rules = """
base_model: s0
merge_method: linear
tensors:
  - {match: scalar, copy: s0}
  - {match: vector, merge_method: slerp, parameters: {t: 0.4}, models: [{model: d}]}
  - match: "*.0.w"
    merge_method: slerp
    parameters: {t: 0.4, flatten: false}
    models: [{model: d}]
  - {match: rows, merge_method: passthrough, parameters: {scale: 3}, models: [{model: s0}]}
  - {match: "*", copy: s0}
"""
    assert equal_to_files(folder, (text(first, "a", "b"), "float16"), (rules, out))


def test_what_a_rule_copies_from_a_stage_without_a_dtype_takes_that_of_the_output(folder):
    stages = f"name: s0\n{text('linear', 'a', 'b')}---\n" + "base_model: s0\n"
    stages += 'tensors: [{match: "*", copy: s0}]\n'
    for line, wanted in (("", "BF16"), ("dtype: float32\n", "F32"), ("dtype: float16\n", "F16")):
        assert dict(plan(stages + line, folder).dtypes) == {wanted: 6, "I64": 1}


def test_integers_that_differ_inside_a_stage_are_an_error(tmp_path):
    for name, last in (("a", 1), ("b", 2)):
        write(tmp_path / name, {"x": torch.ones(3), "ids": torch.tensor([0, last])}, None)
    stages = "name: s\nmerge_method: linear\nparameters: {weight: 1}\n"
    stages += "models: [{model: a}, {model: b}]\n---\n"
    stages += "merge_method: slerp\nbase_model: a\nparameters: {t: 0.5}\nmodels: [{model: s}]\n"
    with pytest.raises(MismatchError, match="values differ between input-1:a and input-2:b"):
        merge(stages, tmp_path)


def test_stages_draw_masks_of_their_own(tmp_path):
    """One mask for both would keep what was kept, twice rescaled: a mean of 2."""
    for name, value in (("base", 0.0), ("a", 1.0)):
        write(tmp_path / name, {"x": torch.full((40_000,), value)}, None)
    dare = "merge_method: dare_linear\nbase_model: base\nparameters: {weight: 1, density: 0.5}\n"
    stages = f"name: s\n{dare}models: [{{model: a}}]\n---\n{dare}models: [{{model: s}}]\n"
    result = merge(stages, tmp_path)["x"]
    assert set(result.tolist()) == {0.0, 4.0}
    assert float(result.mean()) == pytest.approx(1.0, abs=5 * 3**0.5 / 200)  # five sigma
