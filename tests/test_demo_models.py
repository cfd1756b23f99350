from __future__ import annotations

import json
import re
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer

ROOT = Path(__file__).resolve().parent.parent
DEMO = ROOT / "recipes" / "demo"
sys.path.insert(0, str(ROOT / "scripts"))  # the scripts are programs, not a package

import demo_llama  # noqa: E402
import evaluate_demo  # noqa: E402
from demo_text import SKILLS, Example, held_out_text, is_held_out, training_text  # noqa: E402

EXPERTS = list(SKILLS)
CHECKPOINTS = ["base", *EXPERTS]
ADAPTERS = {"adapter-sort": "sort", "adapter-translate": "translate"}


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Small matrices: on a busy machine two threads mostly wait for one another."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def few_examples(monkeypatch):
    """Measure on 40 examples of each skill: enough where only the report is looked at."""
    monkeypatch.setattr(evaluate_demo, "measure", partial(evaluate_demo.measure, count=40))


@pytest.fixture(scope="module")
def models() -> dict[str, demo_llama.Llama]:
    return {name: demo_llama.load(DEMO / name) for name in [*CHECKPOINTS, *ADAPTERS]}


@pytest.fixture(scope="module")
def scores(models):
    return {name: evaluate_demo.measure(model) for name, model in models.items()}


def merged(models, weights):
    """Return base plus weighted deltas, in float32, rounded once as the recipe asks."""
    base, tensors = models["base"], {}
    for name, start in base.weights.items():
        deltas = (w * (models[m].weights[name] - start) for m, w in weights.items())
        tensors[name] = sum(deltas, start).bfloat16().float()
    return demo_llama.Llama(base.config, tensors, base.tokens)


def recipe_weights():
    recipe = yaml.safe_load((ROOT / "recipes" / "quickstart.yaml").read_text())
    assert recipe["merge_method"] == "task_arithmetic"
    assert recipe["base_model"] == "demo/base"
    return {
        entry["model"].removeprefix("demo/"): entry["parameters"]["weight"]
        for entry in recipe["models"]
    }


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_loss_is_that_of_transformers(models, scores, name):
    theirs = AutoModelForCausalLM.from_pretrained(DEMO / name, dtype=torch.float32)
    for skill in SKILLS:
        batch = demo_llama.encode(held_out_text(skill, evaluate_demo.COUNT), models[name].tokens)
        with torch.no_grad():
            loss = theirs(input_ids=batch.ids, labels=batch.labels).loss
        assert scores[name][skill].loss == pytest.approx(loss.item(), abs=1e-3)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # of peft
@pytest.mark.parametrize("name", list(ADAPTERS))
def test_adapter_on_the_fly_is_that_of_peft(models, scores, name):
    from peft import PeftModel  # noqa: PLC0415  (slow to import)

    base = AutoModelForCausalLM.from_pretrained(DEMO / "base", dtype=torch.float32)
    theirs = PeftModel.from_pretrained(base, str(DEMO / name))
    for skill in SKILLS:
        batch = demo_llama.encode(held_out_text(skill, evaluate_demo.COUNT), models[name].tokens)
        with torch.no_grad():
            loss = theirs(input_ids=batch.ids, labels=batch.labels).loss
        assert scores[name][skill].loss == pytest.approx(loss.item(), abs=1e-3)


def test_tokens_are_those_of_transformers(models):
    tokenizer = AutoTokenizer.from_pretrained(DEMO / "base")
    text = "say red cat: 12+3=15, a."
    ids = demo_llama.encode([Example("", text)], models["base"].tokens).ids[0].tolist()
    assert tokenizer(text).input_ids == ids[:-1]
    assert tokenizer.eos_token_id == ids[-1]
    assert tokenizer.decode(ids, skip_special_tokens=True) == text


def test_generation_of_transformers_gives_the_evaluators_answer(models):
    tokenizer = AutoTokenizer.from_pretrained(DEMO / "sort")
    theirs = AutoModelForCausalLM.from_pretrained(DEMO / "sort", dtype=torch.float32)
    prompt = held_out_text("sort", 1)[0].prompt
    inputs = tokenizer(prompt, return_tensors="pt")
    text = tokenizer.decode(
        theirs.generate(**inputs, max_new_tokens=16)[0], skip_special_tokens=True
    )
    assert text == prompt + demo_llama.answer(models["sort"], prompt)


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_checkpoints_are_bf16_in_several_shards(name):
    weight_map = json.loads((DEMO / name / "model.safetensors.index.json").read_text())[
        "weight_map"
    ]
    files = {path.name for path in (DEMO / name).glob("*.safetensors")}
    assert len(files) >= 3
    assert set(weight_map.values()) == files
    tensors = [t for f in files for t in demo_llama.load_file(DEMO / name / f).values()]
    assert {tensor.dtype for tensor in tensors} == {torch.bfloat16}
    assert json.loads((DEMO / name / "config.json").read_text())["dtype"] == "bfloat16"
    assert (DEMO / name / "generation_config.json").exists()


def test_adapters_differ_in_rank_and_targets():
    configs = [json.loads((DEMO / name / "adapter_config.json").read_text()) for name in ADAPTERS]
    assert len({config["r"] for config in configs}) == len(configs)
    assert not set(configs[0]["target_modules"]) & set(configs[1]["target_modules"])
    assert {config["base_model_name_or_path"] for config in configs} == {"base"}


def test_the_folder_is_small_and_names_no_machine():
    files = [path for path in DEMO.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 8_000_000
    for path in files:
        assert not re.search(rb"/(work|home|root|tmp|Users)/", path.read_bytes()), path


def test_each_expert_is_far_ahead_at_its_own_skill_only(scores):
    base = scores["base"]
    for expert in EXPERTS:
        for skill in SKILLS:
            share = scores[expert][skill].loss / base[skill].loss
            assert share < 0.5 if skill == expert else share > 0.9, (expert, skill)


@pytest.mark.parametrize(("adapter", "skill"), ADAPTERS.items())
def test_each_adapter_is_far_ahead_at_its_skill(scores, adapter, skill):
    assert scores[adapter][skill].loss < 0.5 * scores["base"][skill].loss


def test_quickstart_closes_more_than_half_of_each_gap(models, scores):
    merge = evaluate_demo.measure(merged(models, recipe_weights()))
    closed = evaluate_demo.gap_closed(scores["base"], [scores[e] for e in EXPERTS], merge)
    assert set(closed) == set(SKILLS)
    assert min(closed.values()) >= 0.5, closed


def test_training_never_sees_a_held_out_prompt():
    for skill in SKILLS:
        held_out = {example.prompt for example in held_out_text(skill, 200)}
        stream = training_text(skill, seed=0)
        trained = [next(stream) for _ in range(2000)]
        assert len(held_out) == 200
        assert not held_out & {example.prompt for example in trained}
        assert not any(is_held_out(example) for example in trained)


def test_summary_as_json_holds_table_and_gaps(capsys, few_examples):
    folders = [str(DEMO / name) for name in [*CHECKPOINTS, "sort"]]
    assert evaluate_demo.main(["--json", "--summary", *folders]) == 0
    content = json.loads(capsys.readouterr().out)
    assert [row["model"] for row in content["models"]] == [*CHECKPOINTS, "sort"]
    assert content["gap_closed"]["sort"] == pytest.approx(1.0)  # the merge is the expert itself
    assert content["gap_closed"]["add"] < 0.1


def test_summary_of_one_model_compares_with_the_demo(capsys, few_examples):
    assert evaluate_demo.main(["--summary", str(DEMO / "add")]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[2:6]] == CHECKPOINTS
    assert lines[7].split()[:3] == ["gap", "closed", "100%"]


def test_a_missing_shard_is_named(tmp_path, capsys):
    for path in (DEMO / "base").iterdir():
        if not path.name.startswith("model-00002"):
            (tmp_path / path.name).write_bytes(path.read_bytes())
    assert evaluate_demo.main([str(tmp_path)]) == 3
    assert "model-00002-of-00003.safetensors is missing" in capsys.readouterr().err


def test_a_missing_tensor_is_named(tmp_path, capsys):
    for name in ("config.json", "tokenizer.json"):
        (tmp_path / name).write_bytes((DEMO / "base" / name).read_bytes())
    kept = DEMO / "base" / "model-00001-of-00003.safetensors"
    (tmp_path / "model.safetensors").write_bytes(kept.read_bytes())
    assert evaluate_demo.main([str(tmp_path)]) == 3
    assert "KeyError('model." in capsys.readouterr().err
