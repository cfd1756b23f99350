"""Broken, hostile and unfit adapters, through the command line.

Each ends with its exit code and a message that names what is wrong and what to do, within seconds;
nothing that looks like an output is left.
"""

from __future__ import annotations

import json
import os
import pickle
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.bench_of_faults import Bench, edit_header

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
Q, UP = "model.layers.0.self_attn.q_proj", "model.layers.0.mlp.up_proj"
NORM, EMBED, HEAD = "model.norm", "model.embed_tokens", "lm_head"
PREFIX = "base_model.model."
MERGE = "merge_method: passthrough\nmodels:\n  - model: base+one\n"
CONCAT = "merge_method: lora_concat\nmodels:\n  - model: one\n  - model: two\n"
SECONDS = 5.0
"""Most seconds until a refusal, on a busy machine; the bombs would take years."""


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


def base_tensors() -> dict[str, torch.Tensor]:
    shapes = {Q: (6, 4), UP: (8, 4), EMBED: (10, 4), HEAD: (10, 4)}
    held = {f"{name}.weight": random(*shape) for name, shape in shapes.items()}
    return {**held, f"{NORM}.weight": torch.ones(4), f"{Q}.bias": torch.ones(6)}


def factors(module: str, rank: int, inputs: int, outputs: int) -> dict[str, torch.Tensor]:
    return {
        f"{PREFIX}{module}.lora_A.weight": random(rank, inputs),
        f"{PREFIX}{module}.lora_B.weight": random(outputs, rank),
    }


def settings(**more: Any) -> dict[str, Any]:
    return {
        "peft_type": "LORA",
        "base_model_name_or_path": "base",
        "r": 2,
        "lora_alpha": 4,
        "target_modules": ["q_proj", "up_proj"],
        "rank_pattern": {},
        "alpha_pattern": {},
        "use_rslora": False,
        "bias": "none",
        "fan_in_fan_out": False,
        "modules_to_save": None,
        "task_type": "CAUSAL_LM",
        **more,
    }


def adapter(folder: Path, **more: Any) -> Path:
    """Write an adapter of rank 2 of two modules of the base."""
    folder.mkdir()
    held = {**factors(Q, 2, 4, 6), **factors(UP, 2, 4, 8)}
    save_file(held, folder / WEIGHTS, metadata={"format": "pt"})
    (folder / CONFIG).write_text(json.dumps(settings(**more), indent=2))
    return folder


def configure(folder: Path, **change: Any) -> None:
    content = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps(content | change))


def edit(
    folder: Path, change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]
) -> None:
    """Replace an adapter's tensors by what `change` makes of them."""
    made = change(load_file(folder / WEIGHTS))
    save_file({k: v.contiguous() for k, v in made.items()}, folder / WEIGHTS)


@pytest.fixture
def bench(tmp_path, monkeypatch, capsys) -> Bench:
    """Return a folder with a base, and adapters one and two of it."""
    monkeypatch.chdir(tmp_path)
    made = Bench(tmp_path, capsys)
    (made / "base").mkdir()
    save_file(base_tensors(), made / "base" / "model.safetensors")
    llama = {"model_type": "llama", "num_hidden_layers": 1, "tie_word_embeddings": False}
    (made / "base/config.json").write_text(json.dumps(llama))
    for name in ("one", "two"):
        adapter(made / name)
    made.known("base", "one", "two")
    made.recipe(MERGE)
    return made


@contextmanager
def at_most(seconds: float) -> Iterator[None]:
    """End what takes longer, matching of expressions too."""

    def late(*_: object) -> None:
        raise TimeoutError(f"it takes more than {seconds} s")

    before = signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def refused(bench: Bench, code: int, *parts: str, words: tuple[str, ...] = ()) -> str:
    """Hold a run to its refusal, in time; return what it says."""
    with at_most(SECONDS):
        err = bench.refused(code, *parts, words=words).err
    assert "no adapter '" not in err  # it is there, but is no good: one problem, and not two
    return err


def refused_both(bench: Bench, code: int, *parts: str) -> None:
    """Hold merging into a base, and combining, to the same refusal."""
    for recipe in (MERGE, CONCAT):
        bench.recipe(recipe)
        refused(bench, code, *parts)


def test_the_bench_itself_works(bench):
    for recipe in (MERGE, CONCAT):
        bench.recipe(recipe)
        done = bench.run("--overwrite")
        assert done.code == 0, done.err
        assert bench.left() == {"out"}


# row 20: pickles ---------------------------------------------------------------------------------


class Canary:
    """Pickled, it makes a folder when it is opened."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_row_20_a_pickled_adapter_is_refused_unopened(bench):
    (bench / "one" / WEIGHTS).unlink()
    bomb = bench / "one/adapter_model.bin"
    bomb.write_bytes(pickle.dumps(Canary(bench / "canary")))
    refused_both(bench, 3, "one", "adapter_model.bin", "mergekit convert")
    assert not (bench / "canary").exists()
    pickle.loads(bomb.read_bytes())
    assert (bench / "canary").exists()  # it would have sung


def test_row_20_the_way_that_the_hint_names_leads_to_an_adapter(bench):
    wanted = bench.run()
    assert wanted.code == 0, wanted.err
    merged = (bench / "out/model.safetensors").read_bytes()
    torch.save(load_file(bench / "one" / WEIGHTS), bench / "one/adapter_model.bin")
    (bench / "one" / WEIGHTS).unlink()
    assert bench.run("--overwrite").code == 3
    assert bench.do("convert", "one", "-o", "converted").code == 0
    bench.recipe(MERGE.replace("one", "converted"))
    done = bench.run("--overwrite")
    assert done.code == 0, done.err
    assert (bench / "out/model.safetensors").read_bytes() == merged


def test_an_adapter_without_weights_is_refused(bench):
    (bench / "one" / WEIGHTS).unlink()
    refused_both(bench, 3, "one")


# row 21: code ------------------------------------------------------------------------------------


def test_row_21_code_beside_an_adapter_is_neither_run_nor_copied(bench):
    (bench / "one/modeling_x.py").write_text("import os\nos.mkdir('canary')\n")
    (bench / "one/custom_generate").mkdir()
    (bench / "one/custom_generate/generate.py").write_text("import os\nos.mkdir('canary')\n")
    mapping = {"base_model_class": "Model", "parent_library": "modeling_x"}
    configure(bench / "one", auto_mapping=mapping)
    for recipe in (MERGE, CONCAT):
        bench.recipe(recipe)
        done = bench.child("run", "recipe.yaml", "-o", "out", "--overwrite")
        assert done.code == 0, done.err
        assert bench.left() == {"out"}
        assert not list((bench / "out").rglob("*.py"))


# row 22: configs ---------------------------------------------------------------------------------

DEEP = '{"a":' * 100_000
BAD_CONFIGS = {
    "not JSON": ("{", []),
    "a list": ("[1, 2]", []),
    "nested": (DEEP, []),
    "not UTF-8": ('{"r": "\udcff"}', []),
    "twice": ('{"peft_type": "LORA", "r": 2, "r": 3, "lora_alpha": 4}', ["r"]),
    "not a number": (json.dumps(settings(lora_alpha=float("nan"))), []),
    "infinite": (json.dumps(settings(lora_alpha=float("inf"))), []),
    "huge alpha": (json.dumps(settings()).replace('"lora_alpha": 4', '"lora_alpha": 1e999'), []),
    "digits": (json.dumps(settings()).replace('"r": 2', f'"r": {"9" * 5000}'), []),
}


@pytest.mark.parametrize("row", BAD_CONFIGS)
def test_row_22_a_broken_config_is_refused(bench, row):
    text, parts = BAD_CONFIGS[row]
    (bench / "one" / CONFIG).write_bytes(text.encode("utf-8", "surrogateescape"))
    refused_both(bench, 3, "one", CONFIG, *parts)


WRONG = {
    "huge rank": ({"r": 10**9}, ["1000000000"]),
    "rank of the wrong type": ({"r": "two"}, ["r", "two"]),
    "bool rank": ({"r": True}, ["r"]),
    "rank zero": ({"r": 0}, ["r", "0"]),
    "negative rank": ({"r": -2}, ["r", "-2"]),
    "fractional rank": ({"r": 2.5}, ["r", "2.5"]),
    "alpha of the wrong type": ({"lora_alpha": "4x"}, ["lora_alpha"]),
    "pattern that is no mapping": ({"rank_pattern": ["q_proj"]}, ["rank_pattern"]),
    "pattern of the wrong type": ({"rank_pattern": {"q_proj": "2"}}, ["rank_pattern"]),
    "pattern that is no expression": ({"alpha_pattern": {"(": 2}}, ["alpha_pattern"]),
    "long pattern": ({"rank_pattern": {"q" * 100_000: 2}}, ["rank_pattern"]),
    "rank that the tensors contradict": ({"r": 3}, ["3", "2"]),
    "pattern that the tensors contradict": ({"rank_pattern": {"up_proj": 4}}, [UP, "4", "2"]),
    "not LoRA": ({"peft_type": "IA3"}, ["IA3"]),
    "LoHa": ({"peft_type": "LOHA"}, ["LoHa"]),
    "LoKr": ({"peft_type": "LOKR"}, ["LoKr"]),
    "AdaLoRA": ({"peft_type": "ADALORA"}, ["AdaLoRA"]),
    "unheard of": ({"peft_type": "NEXT"}, ["NEXT"]),
    "no type": ({"peft_type": None}, ["peft_type"]),
    "layers twice": ({"layer_replication": [[0, 1], [0, 1]]}, ["layer_replication"]),
    "LoftQ": ({"init_lora_weights": "loftq", "loftq_config": {"loftq_bits": 4}}, ["loftq"]),
    "PiSSA": ({"init_lora_weights": "pissa"}, ["pissa"]),
    "OLoRA": ({"init_lora_weights": "olora"}, ["olora"]),
    "CorDA": ({"init_lora_weights": "corda", "corda_config": {}}, ["corda"]),
    "LoRA-GA": ({"init_lora_weights": "lora_ga", "lora_ga_config": {}}, ["lora_ga"]),
    "aLoRA": ({"alora_invocation_tokens": [1, 2]}, ["alora"]),
    "QALoRA": ({"use_qalora": True}, ["qalora"]),
    "BD-LoRA": ({"use_bdlora": {"nblocks": 2}}, ["bdlora"]),
    "Arrow": ({"arrow_config": {"top_k": 1}}, ["arrow"]),
}


@pytest.mark.parametrize("row", WRONG)
def test_row_22_a_config_that_cannot_be_is_refused_by_name(bench, row):
    change, parts = WRONG[row]
    configure(bench / "one", **change)
    refused_both(bench, 3, "one", *parts)


BOMBS = {
    "nested": r"(a+)+$",
    "alternatives": r"(a|a)*b",
    "dots": r"(.*)*(.*)*(.*)*x",
    "optional": "(?:x?){60}x{60}",
    "many dots": ".*" * 200 + "x",
    "lookahead": r"(?=(a+)+b)a*",
    "backreference": r"(a*)*\1x",
    "counted": r"((a{1,1000}){1,1000}){1,1000}",
    "wide": "(?:" + "|".join("a" * i for i in range(1, 300)) + ")*b",
}


@pytest.mark.parametrize("row", BOMBS)
@pytest.mark.parametrize("key", ["rank_pattern", "alpha_pattern"])
def test_row_22_an_expression_that_explodes_ends_in_time(bench, key, row):
    module = f"model.layers.0.{'a' * 200}"
    edit(bench / "one", lambda _: {**factors(Q, 2, 4, 6), **factors(module, 2, 4, 8)})
    configure(bench / "one", target_modules=["q_proj", "a" * 200], **{key: {BOMBS[row]: 2}})
    for recipe in (MERGE, CONCAT):
        bench.recipe(recipe)
        with at_most(SECONDS):
            done = bench.run("--overwrite")
        assert done.code in {0, 3}, done.err  # an expression that is bounded may be answered
        assert "Traceback" not in done.err
        assert bench.left() <= {"out"}


@pytest.mark.parametrize("key", ["target_modules", "exclude_modules"])
def test_row_22_other_expressions_of_the_config_end_in_time(bench, key):
    configure(bench / "one", **{key: r"(.*)*(.*)*(.*)*x"})
    for recipe in (MERGE, CONCAT):
        bench.recipe(recipe)
        with at_most(SECONDS):
            done = bench.run("--overwrite")
        assert done.code in {0, 3}, done.err


def test_row_22_many_patterns_end_in_time(bench):
    configure(bench / "one", rank_pattern={f"(x|{i})+y": 2 for i in range(50_000)})
    refused_both(bench, 3, "one", "rank_pattern")


@pytest.mark.parametrize("path", ["../../secret", "/etc", "..", "\x00", "a" * 10_000])
def test_row_22_the_base_of_a_config_is_never_opened(bench, path):
    for name in ("one", "two"):
        configure(bench / name, base_model_name_or_path=path)
    for recipe in (MERGE, CONCAT):
        bench.recipe(recipe)
        done = bench.run("--overwrite")
        assert done.code in {0, 3}, done.err  # merged with the base of the recipe, or refused
        assert "Traceback" not in done.err
        assert bench.left() <= {"out"}


# tensors -----------------------------------------------------------------------------------------


def without(part):
    return lambda held: {k: v for k, v in held.items() if part not in k}


def plus(**more):
    named = {key.replace("__", "."): value for key, value in more.items()}
    return lambda held: held | {f"{PREFIX}{key}": value for key, value in named.items()}


def swap(part, tensor):
    return lambda held: {k: tensor if part in k else v for k, v in held.items()}


TENSORS = {
    "a without b": (without("q_proj.lora_B"), [Q, "lora_A", "half of a pair"]),
    "b without a": (without("q_proj.lora_A"), [Q, "lora_B", "half of a pair"]),
    "unknown": (plus(model__layers__0__mystery=torch.ones(2)), ["model.layers.0.mystery"]),
    "unknown part": (plus(**{f"{Q}.lora_C.weight": torch.ones(2, 2)}), [Q, "lora_C"]),
    "LoHa": (lambda h: h | {f"{Q}.hada_w1_a": torch.ones(2, 2)}, ["hada_w1_a"]),
    "LoKr": (lambda h: h | {f"{Q}.lokr_w1": torch.ones(2, 2)}, ["lokr_w1"]),
    "no prefix": (lambda h: {k.removeprefix(PREFIX): v for k, v in h.items()}, ["lora_A"]),
    "ranks that differ": (swap("q_proj.lora_B", torch.ones(6, 3)), [Q, "2", "3"]),
    "one axis": (swap("q_proj.lora_A", torch.ones(8)), [Q]),
    "three axes": (swap("q_proj.lora_A", torch.ones(2, 2, 2)), [Q]),
    "no elements": (swap("q_proj.lora_A", torch.ones(2, 0)), [Q]),
    "integers": (swap("q_proj.lora_A", torch.ones(2, 4, dtype=torch.int8)), [Q, "I8"]),
    "lengths without DoRA": (plus(**{f"{Q}.lora_magnitude_vector": torch.ones(6)}), [Q]),
    "bias without lora_bias": (plus(**{f"{Q}.lora_B.bias": torch.ones(6)}), [Q]),
    "nothing": (lambda _: {}, ["one"]),
}


@pytest.mark.parametrize("row", [r for r in TENSORS if r != "no prefix"])
def test_tensors_that_make_no_adapter_are_refused_by_name(bench, row):
    change, parts = TENSORS[row]
    edit(bench / "one", change)
    refused_both(bench, 3, "one", *parts)


def test_names_without_the_prefix_of_peft_are_read_or_refused(bench):
    edit(bench / "one", TENSORS["no prefix"][0])
    bench.recipe(MERGE)
    done = bench.run()
    assert done.code in {0, 3}, done.err
    if done.code == 0:
        held = load_file(bench / "out/model.safetensors")
        assert not torch.equal(held[f"{Q}.weight"], base_tensors()[f"{Q}.weight"])


FILES = {
    "truncated": lambda file: os.truncate(file, file.stat().st_size - 3),
    "empty": lambda file: os.truncate(file, 0),
    "length bomb": lambda file: file.write_bytes((1 << 40).to_bytes(8, "little") + b"{}"),
    "unknown dtype": lambda file: edit_header(file, bad_dtype),
    "metadata that is no text": lambda file: edit_header(file, lambda h: h | {"__metadata__": 3}),
}


def bad_dtype(header):
    name = f"{PREFIX}{Q}.lora_A.weight"
    return header | {name: header[name] | {"dtype": "F33"}}


@pytest.mark.parametrize("row", FILES)
def test_a_broken_file_is_refused_with_its_name(bench, row):
    FILES[row](bench / "one" / WEIGHTS)
    refused_both(bench, 3, f"one/{WEIGHTS}")


# the fit to a base -------------------------------------------------------------------------------


def test_shapes_that_do_not_fit_are_both_named(bench):
    edit(bench / "one", lambda h: h | factors(Q, 2, 4, 7))
    refused(bench, 3, "one", Q, "[7, 4]", "[6, 4]")


def test_inputs_that_do_not_fit_are_both_named(bench):
    edit(bench / "one", lambda h: h | factors(UP, 2, 5, 8))
    refused(bench, 3, "one", UP, "[8, 5]", "[8, 4]")


def test_every_module_that_does_not_fit_is_named_at_once(bench):
    edit(bench / "one", lambda _: {**factors(Q, 2, 5, 6), **factors(UP, 2, 4, 9)})
    refused(bench, 3, "[6, 5]", "[6, 4]", "[9, 4]", "[8, 4]")


def test_targets_that_the_base_lacks_are_named(bench):
    edit(bench / "one", lambda h: h | factors("model.layers.7.self_attn.q_proj", 2, 4, 6))
    refused(bench, 3, "one", "model.layers.7.self_attn.q_proj", "base")


def test_a_bias_that_the_base_lacks_is_named(bench):
    edit(
        bench / "one",
        lambda h: h | {f"{PREFIX}{m}.lora_B.bias": torch.ones(n) for m, n in ((Q, 6), (UP, 8))},
    )
    configure(bench / "one", lora_bias=True)
    refused(bench, 3, "one", f"{UP}.bias")


def test_a_saved_module_of_another_shape_is_named_with_both(bench):
    edit(bench / "one", lambda h: h | {f"{PREFIX}{NORM}.weight": torch.ones(5)})
    configure(bench / "one", modules_to_save=["norm"])
    refused(bench, 3, f"{NORM}.weight", "[5]", "[4]")


def test_a_saved_module_that_the_base_lacks_is_named(bench):
    edit(bench / "one", lambda h: h | {f"{PREFIX}score.weight": torch.ones(2, 4)})
    configure(bench / "one", modules_to_save=["score"])
    refused(bench, 3, "score")


def token_rows(bench, rows, *, indices, width=4):
    name = f"{PREFIX}{EMBED}.token_adapter.trainable_tokens_delta"
    edit(bench / "one", lambda h: h | {name: torch.ones(rows, width)})
    configure(bench / "one", trainable_token_indices=indices)


@pytest.mark.parametrize(
    ("rows", "indices", "width"),
    [(2, [1, 10], 4), (2, [1, -1], 4), (2, [1, 1], 4), (3, [1, 2], 4), (2, [1, 2], 5)],
)
def test_rows_of_tokens_that_cannot_be_are_refused(bench, rows, indices, width):
    token_rows(bench, rows, indices=indices, width=width)
    refused(bench, 3, "one", "token")


def test_rows_of_tokens_are_merged_where_they_can_be(bench):
    token_rows(bench, 2, indices=[7, 1])
    done = bench.run()
    assert done.code == 0, done.err
    found = load_file(bench / "out/model.safetensors")[f"{EMBED}.weight"]
    wanted = base_tensors()[f"{EMBED}.weight"]
    wanted[[7, 1]] = 1.0
    assert torch.equal(found, wanted)


def test_lengths_of_another_size_are_refused(bench):
    more = {f"{PREFIX}{Q}.lora_magnitude_vector": torch.ones(5)}
    edit(bench / "one", lambda _: {**factors(Q, 2, 4, 6), **more})
    configure(bench / "one", use_dora=True, target_modules=["q_proj"])
    refused_both(bench, 3, "one", Q, "5", "6")


def test_dora_without_lengths_is_refused(bench):
    configure(bench / "one", use_dora=True)
    refused_both(bench, 3, "one", Q)


def test_adapters_of_one_module_of_two_shapes_are_both_named(bench):
    edit(bench / "two", lambda h: h | factors(UP, 2, 4, 9))
    bench.recipe(CONCAT)
    refused(bench, 3, UP, "[8, 4]", "[9, 4]")


def test_adapters_of_different_bases_are_refused_with_both(bench):
    configure(bench / "one", base_model_name_or_path="org/llama-7b")
    configure(bench / "two", base_model_name_or_path="org/mistral-7b")
    bench.recipe(CONCAT)
    refused(bench, 3, "llama-7b", "mistral-7b")


def test_the_base_is_told_by_the_last_part_of_its_path(bench):
    configure(bench / "one", base_model_name_or_path="org/Llama-7B")
    configure(bench / "two", base_model_name_or_path="/models/llama-7b")
    bench.recipe(CONCAT)
    assert bench.run().code == 0


# values ------------------------------------------------------------------------------------------


def stops(bench: Bench, *parts: str) -> None:
    """Hold a run to the end that a value brings: what is finished may wait for another try."""
    with at_most(SECONDS):
        bench.run().refuses(3, *parts)
    assert bench.left() <= {"out.partial"}


def test_a_nan_of_an_adapter_is_refused_by_tensor_and_input(bench):
    bad = random(2, 4)
    bad[1, 2] = float("nan")
    edit(bench / "one", swap("q_proj.lora_A", bad))
    for method in ("", "concat", "linear", "svd", "ties", "dare", "knots"):
        bench.recipe(CONCAT.replace("concat", method) if method else MERGE)
        stops(bench, "q_proj", "NaN", "one")


def test_a_change_beyond_the_dtype_is_refused(bench):
    half = {name: tensor.half() for name, tensor in base_tensors().items()}
    save_file(half, bench / "base" / "model.safetensors")
    edit(bench / "one", lambda h: {k: v * 1000 for k, v in h.items()})
    stops(bench, "F16")


# recipes -----------------------------------------------------------------------------------------

WHERE = "recipe.yaml:"
RECIPES = {
    "weight of the wrong type": (
        "{model: base, lora: [{path: one, weight: much}]}",
        ["weight", "much"],
    ),
    "weight that is not finite": ("{model: base, lora: [{path: one, weight: .nan}]}", ["finite"]),
    "unknown key": ("{model: base, lora: [{path: one, wieght: 1}]}", ["weight"]),
    "empty adapter": ("base+", ["is no reference"]),
}


@pytest.mark.parametrize("row", RECIPES)
def test_a_wrong_reference_is_refused_at_its_place(bench, row):
    text, parts = RECIPES[row]
    bench.recipe(f"merge_method: passthrough\nmodels:\n  - model: {text}\n")
    with at_most(SECONDS):
        bench.run().refuses(2, WHERE, *parts, hint=False)
    assert bench.left() == set()


CANCEL = """\
merge_method: lora_linear
models:
  - {model: one, parameters: {weight: 1}}
  - {model: two, parameters: {weight: -1}}
parameters: {normalize: true}
"""
OTHER_RECIPES = {
    "no such adapter": ("merge_method: passthrough\nmodels: [{model: base+none}]\n", ["none"]),
    "an adapter as the base": ("merge_method: passthrough\nmodels: [{model: one+two}]\n", ["one"]),
    "a model as the adapter": ("merge_method: passthrough\nmodels: [{model: one+base}]\n", ["one"]),
    "a model as an adapter": ("merge_method: passthrough\nmodels: [{model: a+b}]\n", ["b"]),
    "models for adapters": ("merge_method: lora_concat\nmodels: [{model: base}]\n", ["base"]),
    "a mixture": (
        "merge_method: lora_concat\nmodels: [{model: one}, {model: base}]\n",
        ["base"],
    ),
    "adapters for models": ("merge_method: passthrough\nmodels: [{model: one}]\n", ["one", "+"]),
    "an adapter as base_model": (
        "merge_method: task_arithmetic\nbase_model: one\nmodels: [{model: two}]\n",
        ["one"],
    ),
    "a base for adapters": (CONCAT + "base_model: base\n", ["base"]),
    "uses of another number": (CONCAT + "uses: {chat: [1]}\n", ["chat"]),
    "uses outside": (CONCAT + "uses: {../x: [1, 1]}\n", ["../x"]),
    "uses without adapters": (
        "merge_method: linear\nmodels: [{model: a}]\nuses: {chat: [1]}\n",
        ["uses"],
    ),
    "uses that are empty": (CONCAT + "uses: {}\n", ["uses"]),
    "rank and energy": (
        CONCAT.replace("concat", "svd") + "parameters: {rank: 2, energy: 0.9}\n",
        ["energy"],
    ),
    "rank zero": (CONCAT.replace("concat", "svd") + "parameters: {rank: 0}\n", ["rank"]),
    "energy above 1": (CONCAT.replace("concat", "svd") + "parameters: {energy: 1.5}\n", ["energy"]),
    "weights that cancel": (CANCEL, ["normalize"]),
}


@pytest.mark.parametrize("row", OTHER_RECIPES)
def test_a_recipe_that_cannot_be_is_refused_by_name(bench, row):
    text, parts = OTHER_RECIPES[row]
    bench.recipe(text)
    with at_most(SECONDS):
        done = bench.run()
    assert done.code in {2, 3}, (done.out, done.err)
    done.refuses(done.code, *parts, hint=False)
    assert bench.left() == set()


@pytest.mark.parametrize("place", ["one", "one/out", "base", "base/out", "."])
@pytest.mark.parametrize("recipe", [MERGE, CONCAT])
def test_no_input_is_touched(bench, recipe, place):
    if "base" in place and recipe == CONCAT:
        return  # the base is no input there
    bench.recipe(recipe)
    before = {p: p.read_bytes() for p in bench.folder.rglob("*") if p.is_file()}
    done = bench.do("run", "recipe.yaml", "-o", place, "--overwrite")
    done.refuses(2, "input", hint=False)
    assert {p: p.read_bytes() for p in bench.folder.rglob("*") if p.is_file()} == before


def test_an_adapter_that_changes_while_it_is_planned_for_is_noticed_or_resumed_anew(bench):
    bench.recipe(CONCAT)
    assert bench.run().code == 0
    first = (bench / "out" / WEIGHTS).read_bytes()
    edit(bench / "two", lambda h: {k: v * 2 for k, v in h.items()})
    assert bench.run("--overwrite").code == 0
    assert (bench / "out" / WEIGHTS).read_bytes() != first
