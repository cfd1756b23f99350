from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from merge_kit.cli import main

CONFIG = {
    "peft_type": "LORA",
    "base_model_name_or_path": "org/base",
    "r": 2,
    "lora_alpha": 4,
    "target_modules": ["q_proj", "up_proj"],
}
MODULES = {"self_attn.q_proj": (6, 4), "mlp.up_proj": (8, 4)}  # (outputs, inputs)
PREFIX = "base_model.model."


def draw(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def factors(seed: int, rank: int = 2, layers: int = 2) -> dict[str, torch.Tensor]:
    """Return the factors of every module of a model with these layers."""
    found = {}
    for layer in range(layers):
        for i, (name, (outputs, inputs)) in enumerate(MODULES.items()):
            module = f"{PREFIX}model.layers.{layer}.{name}"
            at = 100 * seed + 10 * layer + 2 * i
            found[f"{module}.lora_A.weight"] = draw(rank, inputs, seed=at)
            found[f"{module}.lora_B.weight"] = draw(outputs, rank, seed=at + 1)
    return found


def write(folder: Path, tensors: dict[str, torch.Tensor], **changes: object) -> Path:
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps({**CONFIG, **changes}))
    return folder


def deltas(tensors: dict[str, torch.Tensor], scale: float = 2.0) -> dict[str, torch.Tensor]:
    """Return the changes, dense, in float64."""
    return {
        name.removesuffix(".lora_A.weight").removeprefix(PREFIX): scale
        * tensors[name.replace("lora_A", "lora_B")].double()
        @ tensor.double()
        for name, tensor in tensors.items()
        if "lora_A" in name
    }


def flat(changes: dict[str, torch.Tensor]) -> torch.Tensor:
    return torch.cat([change.flatten() for change in changes.values()])


@pytest.fixture
def here(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def shown(capsys, *arguments: str) -> dict:
    assert main(["inspect", *arguments, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def rows(out: str) -> dict[str, str]:
    """Return label -> text of a table whose texts fit one line."""
    pairs = (line.split("  ", 1) for line in out.splitlines() if not line.startswith(" "))
    return {label: text.strip() for label, text in pairs}


def test_an_adapter_is_shown_by_its_config_and_headers(here, capsys):
    norm = torch.ones(4, dtype=torch.bfloat16)
    tensors = {**factors(1), f"{PREFIX}model.norm.weight": norm}
    write(here / "sort", tensors, modules_to_save=["norm"], revision="v2")
    (here / "sort" / "tokenizer.json").write_text("{}")
    assert main(["inspect", "sort"]) == 0
    found = rows(capsys.readouterr().out)
    assert found["adapter"] == "sort, a folder, peft style"
    assert found["base"] == "org/base@v2"
    assert found["modules"] == "4: linear 4"
    assert found["targets"] == "q_proj 2, up_proj 2"
    assert (found["ranks"], found["alphas"], found["scales"]) == ("2", "4", "2")
    assert found["held whole"] == "1 tensor: model.norm.weight (modules_to_save)"
    # 2 layers: 2*4 + 6*2 and 2*4 + 8*2 floats of 4 bytes; 4 of 2
    assert found["tensors"] == "9, 92 parameters, 360 B"
    assert found["dtypes"] == "BF16 1, F32 8"
    assert found["weights"] == "1 file: adapter_model.safetensors"
    assert found["side files"] == "2: adapter_config.json, tokenizer.json"


def test_ranks_scales_and_patterns_are_counted(here, capsys):
    tensors = factors(1)
    name = f"{PREFIX}model.layers.0.mlp.up_proj"
    tensors[f"{name}.lora_A.weight"] = draw(4, 4, seed=7)
    tensors[f"{name}.lora_B.weight"] = draw(8, 4, seed=8)
    pattern = {"layers.0.mlp.up_proj": 4}
    write(here / "sort", tensors, rank_pattern=pattern, use_rslora=True)
    found = shown(capsys, "sort")
    assert found["ranks"] == {"2": 3, "4": 1}
    assert found["alphas"] == {"4": 4}
    assert {float(k): v for k, v in found["scales"].items()} == {2.0: 1, 4 / 2**0.5: 3}
    assert (found["rank_pattern"], found["alpha_pattern"], found["rslora"]) == (pattern, {}, True)
    assert main(["inspect", "sort"]) == 0
    text = rows(capsys.readouterr().out)
    assert text["ranks"] == "2 in 3 modules, 4 in 1 module"
    assert text["rank_pattern"] == "layers.0.mlp.up_proj: 4"
    assert text["scales"] == "2 in 1 module, 2.82843 in 3 modules, by rsLoRA"


def test_dora_is_counted(here, capsys):
    tensors = factors(1)
    for layer in range(2):
        for name, (outputs, _) in MODULES.items():
            module = f"{PREFIX}model.layers.{layer}.{name}"
            tensors[f"{module}.lora_magnitude_vector"] = torch.ones(outputs)
    write(here / "sort", tensors, use_dora=True)
    assert shown(capsys, "sort")["dora"] == 4
    assert main(["inspect", "sort"]) == 0
    assert rows(capsys.readouterr().out)["DoRA"] == "magnitudes of 4 modules"


def test_modules_and_tensors_are_listed_on_demand(here, capsys):
    write(here / "sort", factors(1))
    assert main(["inspect", "sort", "--tensors"]) == 0
    _, modules, tensors = capsys.readouterr().out.split("\n\n")
    assert len(modules.splitlines()) == 4
    first = modules.splitlines()[0].split()
    assert first[1:] == ["rank", "2", "alpha", "4", "scale", "2"]
    assert len(tensors.splitlines()) == 8
    found = shown(capsys, "sort", "--tensors")
    one = next(u for u in found["updates"] if u["module"] == "model.layers.1.mlp.up_proj")
    assert (one["a"], one["b"], one["kind"], one["dora"]) == ([2, 4], [8, 2], "linear", False)
    assert len(found["tensors"]) == 8
    assert "tensors" not in shown(capsys, "sort")


def test_a_single_file_is_an_adapter_too(here, capsys):
    tensors = {
        "lora_unet_mid_block_attentions_0_proj_in.lora_down.weight": draw(2, 4, seed=1),
        "lora_unet_mid_block_attentions_0_proj_in.lora_up.weight": draw(6, 2, seed=2),
        "lora_unet_mid_block_attentions_0_proj_in.alpha": torch.tensor(1.0),
    }
    save_file(tensors, here / "style.safetensors")
    found = shown(capsys, "style.safetensors")
    assert (found["style"], found["base"], found["targets"]) == ("kohya", "", {"proj_in": 1})
    assert found["scales"] == {"0.5": 1}
    assert main(["inspect", "style.safetensors"]) == 0
    assert rows(capsys.readouterr().out)["base"] == "not named"


def test_the_numbers_of_two_adapters_are_those_of_dense_matrices(here, capsys):
    one, other = factors(1), factors(2, rank=3)
    write(here / "sort", one)
    write(here / "add", other, r=3, lora_alpha=3)
    found = shown(capsys, "sort", "add", "--tensors")
    d1, d2 = deltas(one, 2.0), deltas(other, 1.0)
    (pair,) = found["pairs"]
    assert (pair["first"], pair["second"], pair["shared"]) == ("sort", "add", 4)
    x, y = flat(d1), flat(d2)
    assert pair["norms"] == pytest.approx([float(x.norm()), float(y.norm())], rel=1e-12)
    assert pair["cosine"] == pytest.approx(float(x @ y / x.norm() / y.norm()), abs=1e-12)
    longer = float((x + y).square().sum() / (x.square().sum() + y.square().sum()) - 1)
    assert pair["interference"] == pytest.approx(longer, abs=1e-12)
    signs = [float((d1[name] * d2[name]).sum()) > 0 for name in d1]
    assert (pair["reinforcing"], pair["cancelling"]) == (sum(signs), 4 - sum(signs))
    left, right = [], []
    for name in d1:
        u1, _, v1 = torch.linalg.svd(d1[name])
        u2, _, v2 = torch.linalg.svd(d2[name])
        left.append(float((u1[:, :2].T @ u2[:, :3]).square().sum()))
        right.append(float((v1[:2] @ v2[:3].T).square().sum()))
    assert pair["output_overlap"] == pytest.approx(sum(left) / 8, rel=1e-9)  # 4 modules of rank 2
    assert pair["input_overlap"] == pytest.approx(sum(right) / 8, rel=1e-9)
    assert pair["output_overlap_by_chance"] == pytest.approx((6 / 6 + 6 / 8) * 2 / 8)
    assert pair["input_overlap_by_chance"] == pytest.approx(3 / 4)
    assert [row["name"] for row in found["modules"]] == sorted(d1)
    assert [row["name"] for row in found["layers"]] == ["model.layers.0", "model.layers.1"]
    for row, at in zip(found["modules"], sorted(d1), strict=True):
        cosine = torch.cosine_similarity(d1[at].flatten(), d2[at].flatten(), dim=0)
        assert row["pairs"][0]["cosine"] == pytest.approx(float(cosine), abs=1e-12)
    within = [flat({n: d for n, d in ds.items() if "layers.1" in n}) for ds in (d1, d2)]
    cosine = torch.cosine_similarity(*within, dim=0)
    assert found["layers"][1]["pairs"][0]["cosine"] == pytest.approx(float(cosine), abs=1e-12)


def test_an_adapter_is_like_itself_and_against_its_negative(here, capsys):
    tensors = factors(1)
    write(here / "sort", tensors)
    flipped = {n: -t if "lora_B" in n else t for n, t in tensors.items()}
    write(here / "unsort", flipped)
    same, against = (shown(capsys, "sort", name)["pairs"][0] for name in ("sort", "unsort"))
    assert same["cosine"] == pytest.approx(1.0)
    assert against["cosine"] == pytest.approx(-1.0)
    assert (same["interference"], against["interference"]) == pytest.approx((1.0, -1.0))
    assert (same["reinforcing"], against["cancelling"]) == (4, 4)
    for pair in (same, against):
        assert (pair["output_overlap"], pair["input_overlap"]) == pytest.approx((1.0, 1.0))
    names = [one["name"] for one in shown(capsys, "sort", "sort")["adapters"]]
    assert names == ["sort (1)", "sort (2)"]


def test_what_one_adapter_leaves_alone_counts_as_no_change(here, capsys):
    one = factors(1)
    some = {name: tensor for name, tensor in one.items() if "q_proj" in name}
    write(here / "sort", one)
    write(here / "half", some, target_modules=["q_proj"])
    (pair,) = shown(capsys, "sort", "half")["pairs"]
    x, y = flat(deltas(one)), flat(deltas(some))
    assert pair["shared"] == 2
    assert pair["cosine"] == pytest.approx(float(y.norm() / x.norm()))  # <x, y> = |y|^2
    assert pair["output_overlap"] == pytest.approx(1.0)


def test_adapters_without_a_common_module_say_so(here, capsys):
    one = factors(1)
    write(here / "q", {n: t for n, t in one.items() if "q_proj" in n}, target_modules=["q_proj"])
    write(here / "up", {n: t for n, t in one.items() if "up_proj" in n}, target_modules=["up_proj"])
    found = shown(capsys, "q", "up")
    (pair,) = found["pairs"]
    assert (pair["shared"], pair["cosine"], pair["output_overlap"]) == (0, 0.0, None)
    assert found["notes"] == ["q and up change no module in common, by their names"]


def test_the_table_has_the_numbers_by_layer_and_module(here, capsys):
    for seed, name in enumerate(("sort", "add", "half"), start=1):
        write(here / name, factors(seed))
    assert main(["inspect", "sort", "add", "half"]) == 0
    text = capsys.readouterr().out
    for pair in ("sort and add", "sort and half", "add and half"):
        assert f"\n{pair}: 4 shared modules, " in text
    assert text.count("\n  all ") == 3
    assert main(["inspect", "sort", "add", "--tensors"]) == 0
    lines = capsys.readouterr().out.splitlines()
    names = [line.split()[0] for line in lines if line.startswith("  model.")]
    assert names[:2] == ["model.layers.0", "model.layers.1"]
    assert len(names) == 6
    cosine = shown(capsys, "sort", "add")["pairs"][0]["cosine"]
    assert f"{cosine:.4f}" in next(line for line in lines if line.startswith("  all"))


def test_what_is_not_compared_is_listed(here, capsys):
    tensors = {**factors(1), f"{PREFIX}model.norm.weight": torch.ones(4)}
    write(here / "sort", tensors, modules_to_save=["norm"])
    write(here / "add", factors(2))
    assert shown(capsys, "sort", "add")["notes"] == ["sort: 1 tensor held whole, not compared"]


def test_adapters_of_other_shapes_are_refused_with_both(here, capsys):
    write(here / "sort", factors(1))
    wide = {
        name: torch.cat([t, t], dim=1) if "lora_A" in name else t for name, t in factors(2).items()
    }
    write(here / "wide", wide)
    assert main(["inspect", "sort", "wide"]) == 3
    message = capsys.readouterr().err
    assert "changes a matrix of 8 x 4 in sort and a matrix of 8 x 8 in wide" in message
    assert "only adapters of one base model can be compared" in message


def test_values_that_are_not_finite_are_named(here, capsys):
    tensors = factors(2)
    tensors[f"{PREFIX}model.layers.1.mlp.up_proj.lora_B.weight"][0, 0] = float("inf")
    write(here / "sort", factors(1))
    write(here / "broken", tensors)
    assert main(["inspect", "sort", "broken"]) == 3
    assert "model.layers.1.mlp.up_proj: the factor b holds values" in capsys.readouterr().err


@pytest.mark.parametrize("options", [[], ["--json"]])
def test_an_alpha_whose_squares_overflow_is_named_with_its_scale(here, capsys, options):
    write(here / "sort", factors(1))
    write(here / "huge", factors(2), lora_alpha=1e308)
    assert main(["inspect", "sort", "huge", *options]) == 3
    captured = capsys.readouterr()
    assert "the change is too large to be compared: its scale is 5e+307" in captured.err
    assert "model.layers.0.mlp.up_proj" in captured.err
    assert not captured.out


def test_a_model_beside_an_adapter_is_refused(here, capsys):
    write(here / "sort", factors(1))
    (here / "model").mkdir()
    save_file({"w": torch.ones(2)}, here / "model" / "model.safetensors")
    for arguments in (("sort", "model"), ("model", "sort")):
        assert main(["inspect", *arguments]) == 2
        message = capsys.readouterr().err
        assert "sort is an adapter, model is a model" in message
        assert "compare adapters with adapters" in message


def test_three_models_are_refused(here, capsys):
    for name in "abc":
        (here / name).mkdir()
        save_file({"w": torch.ones(2)}, here / name / "model.safetensors")
    assert main(["inspect", "a", "b"]) == 0
    capsys.readouterr()
    assert main(["inspect", "a", "b", "c"]) == 2
    assert "found 3 models, expected one or two" in capsys.readouterr().err


def test_one_adapter_is_shown_without_torch(here):
    write(here / "sort", factors(1))
    code = (
        "import sys\nfrom merge_kit.cli import main\n"
        "assert main(['inspect', 'sort', '--json']) == 0\nassert 'torch' not in sys.modules\n"
    )
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        env={"PYTHONPATH": str(Path(__file__).parent.parent.parent)},
    )
    assert done.returncode == 0, done.stderr
