"""scripts/collect_statistics.py: what it collects, and that merges by it are better for it."""

from __future__ import annotations

import json
import sys
from itertools import islice
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import transformers
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn
from torch.nn.functional import cross_entropy
from transformers import AutoTokenizer

import merge_kit as mk

ROOT = Path(__file__).resolve().parent.parent
DEMO = ROOT / "recipes" / "demo"
sys.path.insert(0, str(ROOT / "scripts"))  # the scripts are programs, not a package

import collect_statistics as collecting  # noqa: E402
import demo_llama  # noqa: E402
from demo_text import SKILLS, held_out_text, training_text  # noqa: E402

transformers.utils.logging.disable_progress_bar()
VOCAB = 40


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Small matrices: on a busy machine two threads mostly wait for one another."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def llama(*, tied: bool = False):
    torch.manual_seed(1)
    config = transformers.LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        tie_word_embeddings=tied,
    )
    return transformers.LlamaForCausalLM(config).eval()


def gpt2(seed: int = 1):
    torch.manual_seed(seed)
    config = transformers.GPT2Config(vocab_size=VOCAB, n_embd=16, n_layer=2, n_head=2)
    return transformers.GPT2LMHeadModel(config).eval()


def texts(count: int, length: int, seed: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(VOCAB, (length,), generator=generator) for _ in range(count)]


class Coin(nn.Module):
    """Two tokens; after token t, token 0 comes with probability sigmoid(w[t])."""

    def __init__(self, *w: float) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.tensor(w))

    def forward(self, input_ids):
        odds = self.w[input_ids]
        return SimpleNamespace(logits=torch.stack([odds, torch.zeros_like(odds)], -1))


def test_empirical_fisher_of_two_classes_by_hand():
    """p = 3/4: d log p(0) = 1/4 and d log p(1) = -3/4; the mean of their squares, not the square
    of their mean; two labels of one example add up before they are squared."""
    coin = Coin(torch.tensor(3.0).log(), 5.0)
    apart = [torch.tensor([0, 0]), torch.tensor([0, 1])]
    found = collecting.fisher(coin, apart, empirical=True)
    assert found.tensors["w"].tolist() == pytest.approx([(1 / 16 + 9 / 16) / 2, 0.0])
    together = collecting.fisher(coin, [torch.tensor([0, 0, 1])], empirical=True)
    assert together.tensors["w"].tolist() == pytest.approx([(1 / 4 - 3 / 4) ** 2 / 2, 0.0])


def test_fisher_with_labels_of_the_models_own_is_the_variance_of_a_coin():
    """p (1 - p) = 3/16, whatever the text says; the squares' standard deviation is 0.217."""
    coin, count = Coin(torch.tensor(3.0).log(), 5.0), 4_000
    found = collecting.fisher(coin, [torch.tensor([0, 1])] * count)
    assert abs(float(found.tensors["w"][0]) - 3 / 16) < 5 * 0.217 / count**0.5


def test_fisher_is_the_mean_over_examples_of_squared_gradients():
    model, examples = llama(), texts(3, 7)
    found = collecting.fisher(model, examples, empirical=True).tensors
    assert list(found) == [name for name, _ in model.named_parameters()]
    wanted = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    for ids in examples:
        model.zero_grad()
        logits = model(input_ids=ids[None]).logits[0]
        cross_entropy(logits[:-1], ids[1:], reduction="sum").backward()
        for name, parameter in model.named_parameters():
            wanted[name] += parameter.grad.square() / 6 / 3
    for name, values in found.items():
        assert torch.allclose(values, wanted[name], rtol=1e-4, atol=1e-9), name


def test_fisher_depends_on_the_seed_alone():
    model, examples = llama(), texts(2, 7)
    one, same, other = (collecting.fisher(model, examples, seed=s).tensors for s in (1, 1, 2))
    name = "model.norm.weight"
    assert torch.equal(one[name], same[name])
    assert not torch.equal(one[name], other[name])


def test_tied_parameters_share_their_fisher():
    found = collecting.fisher(llama(tied=True), texts(1, 5))
    assert found.shared == {"lm_head.weight": "model.embed_tokens.weight"}
    assert "lm_head.weight" not in found.tensors


@pytest.mark.parametrize("batch", [1, 2])
def test_gram_is_the_mean_over_tokens_of_the_inputs_products(batch):
    model, examples = llama(), [*texts(3, 7), *texts(1, 5)]
    found = collecting.gram(model, examples, batch=batch).tensors
    inside, layer = model.model, model.model.layers[0]
    with torch.inference_mode():
        normed = [layer.input_layernorm(inside.embed_tokens(ids)) for ids in examples]
        last = [inside(input_ids=ids[None]).last_hidden_state[0] for ids in examples]
    for name, parts in (("model.layers.0.self_attn.q_proj", normed), ("lm_head", last)):
        x = torch.cat(parts).double()
        assert x.shape[0] == 26
        assert torch.allclose(found[f"{name}.weight"].double(), x.T @ x / 26, rtol=1e-4, atol=1e-6)


def test_layers_with_one_input_share_a_matrix():
    found = collecting.gram(llama(), texts(2, 7))
    own = ("self_attn.q_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.down_proj")
    layers = [f"model.layers.{i}.{name}.weight" for i in range(2) for name in own]
    assert sorted(found.tensors) == sorted(["lm_head.weight", *layers])
    assert found.shared["model.layers.1.self_attn.v_proj.weight"] == layers[4]
    assert found.shared["model.layers.0.mlp.up_proj.weight"] == layers[2]
    assert len(found.shared) == 6


def test_a_tied_head_is_left_out():
    found = collecting.gram(llama(tied=True), texts(1, 5))
    assert found.left_out == ("lm_head.weight",)
    assert "lm_head.weight" not in found.tensors


class Changing(nn.Module):
    """Two layers that share their input for short texts only."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.other = nn.Linear(1, 1), nn.Linear(1, 1)

    def forward(self, input_ids):
        x = input_ids.float()[..., None]
        return self.one(x) + self.other(x if input_ids.shape[1] < 3 else x + 1)


def test_layers_that_share_their_input_in_some_passes_only_are_refused():
    with pytest.raises(collecting.CollectError, match="other shares its input with one in some"):
        collecting.gram(Changing(), [torch.tensor([0, 1]), torch.tensor([0, 1, 1])])


def test_weights_of_inputs_by_outputs_are_merged_by_their_equation(tmp_path):
    examples, folders, grams = texts(4, 9), [], []
    for seed in (1, 2):
        model = gpt2(seed)
        model.save_pretrained(tmp_path / f"m{seed}")
        found = collecting.gram(model, examples)
        found.save(tmp_path / f"g{seed}.safetensors", examples)
        folders.append(tmp_path / f"m{seed}")
        grams.append(found.tensors)
    models = [
        {"model": str(f), "parameters": {"statistics": str(tmp_path / f"g{i}.safetensors")}}
        for i, f in enumerate(folders, start=1)
    ]
    recipe = {"merge_method": "regmean", "models": models, "parameters": {"ridge": 0}}
    made = mk.merge(recipe, tmp_path / "out")
    assert not [note for note in made.plan.notes if "nothing merged asks" in note]
    merged = load_file(made.output / "model.safetensors")
    inputs = [load_file(folder / "model.safetensors") for folder in folders]
    name = "h.1.attn.c_proj.weight"  # square: the shape does not tell
    key = next(key for key in merged if key.endswith(name))
    scaled = [g[f"transformer.{name}"].double() for g in grams]
    scaled = [0.9 * g + 0.1 * g.diag().diag() for g in scaled]
    right = sum(g @ w[key].double() for g, w in zip(scaled, inputs, strict=True))
    wanted = torch.linalg.solve(sum(scaled), right)
    assert torch.allclose(merged[key].double(), wanted, atol=1e-6)


def test_names_are_those_of_the_models_files(tmp_path):
    """GPT-2's files may leave out the prefix that its parameters have with a head."""
    model, examples = gpt2(), texts(1, 5)
    model.transformer.save_pretrained(tmp_path)
    found = collecting.named_as_stored(collecting.gram(model, examples), model, tmp_path)
    assert "h.0.attn.c_attn.weight" in found.tensors
    assert "h.0.attn.c_attn.weight" in found.transposed
    assert found.unknown == ()
    evidence = collecting.fisher(model, examples)
    del evidence.tensors["transformer.wte.weight"]
    evidence.tensors["other"] = torch.ones(1)
    found = collecting.named_as_stored(evidence, model, tmp_path)
    assert found.shared == {"lm_head.weight": "wte.weight"}
    assert found.unknown == ("other",)


def test_text_is_packed_without_padding():
    tokenizer = AutoTokenizer.from_pretrained(DEMO / "add")
    options = {"samples": 3, "length": 4, "lines": False}
    found = collecting.read_examples("1+2=3\n4+5=9", tokenizer, **options)
    ids = tokenizer("1+2=3\n4+5=9")["input_ids"]
    assert torch.cat(found).tolist() == ids[:12]
    lined = collecting.read_examples("1+2=3\n\n4", tokenizer, samples=9, length=9, lines=True)
    assert [len(example) for example in lined] == [7, 3]  # with begin and end
    with pytest.raises(collecting.CollectError, match="no example of at least two tokens"):
        collecting.read_examples("\n", tokenizer, samples=9, length=9, lines=True)


@pytest.fixture(scope="module")
def collected(tmp_path_factory):
    """Statistics of the demo experts on their own skills."""
    folder = tmp_path_factory.mktemp("statistics")
    for skill in SKILLS:
        lines = [e.prompt + e.answer for e in islice(training_text(skill, 77), 100)]
        text = folder / f"{skill}.txt"
        text.write_text("\n".join(lines), encoding="utf-8")
        for kind in ("fisher", "gram"):
            out = str(folder / f"{skill}.{kind}.safetensors")
            told = [kind, str(DEMO / skill), str(text), "-o", out, "--lines", "--length", "64"]
            assert collecting.main(told) == 0
    return folder


def test_the_file_says_what_it_holds(collected):
    with safe_open(collected / "add.gram.safetensors", framework="pt") as file:
        metadata = file.metadata()
    assert metadata["statistics"] == "gram"
    assert metadata["examples"] == "100"
    assert json.loads(metadata["transposed"]) == []
    assert len(json.loads(metadata["shared"])) == 12


def losses(folder) -> list[float]:
    model = demo_llama.load(folder)
    return [demo_llama.score(model, held_out_text(skill, 40)).loss for skill in SKILLS]


def test_evidence_makes_better_merges_of_the_demo_models_than_the_mean(collected, tmp_path):
    def merged(method, kind):
        told = {skill: {"weight": 1} for skill in SKILLS}
        if kind:
            files = {skill: str(collected / f"{skill}.{kind}.safetensors") for skill in SKILLS}
            told = {skill: {"statistics": file} for skill, file in files.items()}
        models = [{"model": str(DEMO / s), "parameters": p} for s, p in told.items()]
        recipe = {"merge_method": method, "models": models, "dtype": "bfloat16"}
        return losses(mk.merge(recipe, tmp_path / method).output)

    mean, fisher = merged("linear", ""), merged("fisher", "fisher")
    regmean = merged("regmean", "gram")
    assert sum(fisher) < 0.95 * sum(mean)
    assert all(r < 0.75 * m for r, m in zip(regmean, mean, strict=True))


def test_what_cannot_be_read_ends_with_code_3(tmp_path, capsys):
    out = str(tmp_path / "out.safetensors")
    assert collecting.main(["gram", str(DEMO / "add"), str(tmp_path / "no.txt"), "-o", out]) == 3
    assert "no.txt" in capsys.readouterr().err
    (tmp_path / "text").write_text("1+1=2", encoding="utf-8")
    assert collecting.main(["gram", str(tmp_path), str(tmp_path / "text"), "-o", out]) == 3
    assert not Path(out).exists()
