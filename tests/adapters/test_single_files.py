"""One adapter in every style of single files: kohya's, diffusers', old ones; the same numbers."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from merge_kit import MergeKitError, merge

UNET = {
    "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q": (6, 4),
    "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_out.0": (4, 6),
    "down_blocks.0.resnets.0.conv1": (5, 4, 3, 3),
    "mid_block.attentions.0.proj_in": (4, 4, 1, 1),
}
TEXT = {
    "text_model.encoder.layers.0.self_attn.q_proj": (4, 4),
    "text_model.encoder.layers.0.mlp.fc1": (8, 4),
}
PARTS = {"unet": UNET, "text_encoder": TEXT}
RANK, ALPHA = 2, 3.0
WEIGHTS = {"unet": "diffusion_pytorch_model.safetensors", "text_encoder": "model.safetensors"}


def random(shape, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def base(tmp_path) -> Path:
    folder = tmp_path / "pipeline"
    for part, shapes in PARTS.items():
        (folder / part).mkdir(parents=True)
        held = {f"{n}.weight": random(s, i) for i, (n, s) in enumerate(shapes.items())}
        save_file(held, folder / part / WEIGHTS[part])
        (folder / part / "config.json").write_text('{"_class_name": "Part"}\n')
    (folder / "model_index.json").write_text('{"_class_name": "StableDiffusionPipeline"}\n')
    return folder


def factors(part: str, module: str) -> tuple[Tensor, Tensor]:
    """Return a (rank, inputs, ...) and b (outputs, rank, 1, ...) of a module."""
    shape, seed = PARTS[part][module], 100 + list(PARTS[part]).index(module)
    ones = (1,) * (len(shape) - 2)
    return random((RANK, *shape[1:]), seed), random((shape[0], RANK, *ones), seed + 50)


MODULES = [(part, module) for part, shapes in PARTS.items() for module in shapes]


def kohya() -> dict[str, Tensor]:
    leads = {"unet": "lora_unet", "text_encoder": "lora_te"}
    held = {}
    for part, module in MODULES:
        a, b = factors(part, module)
        name = f"{leads[part]}_{module.replace('.', '_')}"
        held[f"{name}.lora_down.weight"], held[f"{name}.lora_up.weight"] = a, b
        held[f"{name}.alpha"] = torch.tensor(ALPHA)
    return held


def diffusers() -> dict[str, Tensor]:
    held = {}
    for part, module in MODULES:
        a, b = factors(part, module)
        held[f"{part}.{module}.lora_A.weight"], held[f"{part}.{module}.lora_B.weight"] = a, b
    return held


def old() -> dict[str, Tensor]:
    """Old files have no alpha: the scale is 1."""
    held = {}
    for part, module in MODULES:
        a, b = factors(part, module)
        held[f"{part}.{module}.lora.down.weight"] = a
        held[f"{part}.{module}.lora.up.weight"] = b
    return held


def metadata() -> dict[str, str]:
    one = {"r": RANK, "lora_alpha": ALPHA, "target_modules": None, "use_rslora": False}
    packed = {f"{part}.{key}": value for part in PARTS for key, value in one.items()}
    return {"format": "pt", "lora_adapter_metadata": json.dumps(packed)}


STYLES = {
    "kohya": (kohya, None, ALPHA / RANK),
    "diffusers": (diffusers, metadata, ALPHA / RANK),
    "diffusers without metadata": (diffusers, None, 1.0),
    "old diffusers": (old, None, 1.0),
}


def write(folder: Path, style: str) -> Path:
    make, describe, _ = STYLES[style]
    folder.mkdir()
    file = folder / "pytorch_lora_weights.safetensors"
    save_file(make(), file, metadata=describe() if describe else None)
    return file


def change(part: str, module: str, scale: float) -> Tensor:
    a, b = (factor.double() for factor in factors(part, module))
    return scale * (b.flatten(1) @ a.flatten(1)).reshape(PARTS[part][module])


def merged(base: Path, adapter: Path, out: Path) -> Mapping[str, Mapping[str, Tensor]]:
    reference = {"model": str(base), "lora": str(adapter)}
    merge({"merge_method": "passthrough", "models": [{"model": reference}]}, out)
    return {part: load_file(out / part / WEIGHTS[part]) for part in PARTS}


@pytest.mark.parametrize("style", STYLES)
def test_a_single_file_is_merged_into_its_pipeline(tmp_path, base, style):
    adapter = write(tmp_path / "adapter", style)
    found = merged(base, adapter, tmp_path / "out")
    for part, module in MODULES:
        before = load_file(base / part / WEIGHTS[part])[f"{module}.weight"].double()
        wanted = before + change(part, module, STYLES[style][2])
        assert torch.allclose(found[part][f"{module}.weight"].double(), wanted, atol=1e-6, rtol=0)


def test_a_folder_with_one_file_is_the_file(tmp_path, base):
    adapter = write(tmp_path / "adapter", "kohya")
    one = merged(base, adapter, tmp_path / "one")
    other = merged(base, adapter.parent, tmp_path / "other")
    for part in PARTS:
        assert all(torch.equal(tensor, other[part][n]) for n, tensor in one[part].items())


def test_styles_of_the_same_numbers_give_the_same_bits(tmp_path, base):
    made = [
        merged(base, write(tmp_path / style.split()[0], style), tmp_path / f"out-{style}")
        for style in ("kohya", "diffusers")
    ]
    for part in PARTS:
        for name, tensor in made[0][part].items():
            assert torch.equal(tensor, made[1][part][name])


def change_of_file(file: Path, style: str) -> dict[str, Tensor]:
    """Return scale * b @ a of every module of a file of kohya's style or diffusers'."""
    held, found = load_file(file), {}
    down, up = {"kohya": ("lora_down", "lora_up"), "diffusers": ("lora_A", "lora_B")}[style]
    for name, a in held.items():
        if f".{down}." in name:
            module = name.removesuffix(f".{down}.weight")
            b = held[f"{module}.{up}.weight"].double()
            alpha = float(held.get(f"{module}.alpha", len(a)))
            matrix = alpha / len(a) * (b.flatten(1) @ a.double().flatten(1))
            found[module] = matrix.reshape(b.shape[0], *a.shape[1:])
    return found


def test_two_of_kohyas_files_become_one_of_the_same_sum(tmp_path):
    files = [write(tmp_path / name, "kohya") for name in "ab"]
    held = {n: t if "alpha" in n else 2 * t for n, t in load_file(files[1]).items()}
    held = {n: t for n, t in held.items() if "lora_te" not in n}
    save_file(held, files[1])
    models = [
        {"model": str(f), "parameters": {"weight": w}}
        for f, w in zip(files, (1, -0.5), strict=True)
    ]
    out = merge({"merge_method": "lora_concat", "models": models}, tmp_path / "out").output
    made = sorted(out.glob("*.safetensors"))
    assert len(made) == 1
    parts = [change_of_file(file, "kohya") for file in files]
    found = change_of_file(made[0], "kohya")
    assert found.keys() == parts[0].keys()
    for module, tensor in found.items():
        wanted = parts[0][module] - 0.5 * parts[1].get(module, torch.zeros_like(tensor))
        assert torch.allclose(tensor, wanted, atol=1e-5, rtol=0)


@pytest.mark.parametrize("method", ["lora_concat", "lora_linear"])
@pytest.mark.parametrize("style", STYLES)
def test_what_two_files_become_is_merged_into_the_pipeline(tmp_path, base, style, method):
    files = [write(tmp_path / name, style) for name in "ab"]
    lone = "text_model.encoder.layers.0.mlp.fc1" if style != "kohya" else "layers_0_mlp_fc1"
    held = {n: t for n, t in load_file(files[1]).items() if lone not in n}
    halved = {n: t / 2 if ("up" in n or "lora_B" in n) else t for n, t in held.items()}
    with safe_open(files[1], "pt") as file:
        described = file.metadata()
    save_file(halved, files[1], metadata=described)
    models = [
        {"model": str(f), "parameters": {"weight": w}} for f, w in zip(files, (2, -1), strict=True)
    ]
    out = merge({"merge_method": method, "models": models}, tmp_path / "both").output
    found = merged(base, out, tmp_path / "out")
    for part, module in MODULES:
        before = load_file(base / part / WEIGHTS[part])[f"{module}.weight"].double()
        factor = 2.0 if module.endswith("mlp.fc1") else 1.5
        wanted = before + factor * change(part, module, STYLES[style][2])
        assert torch.allclose(found[part][f"{module}.weight"].double(), wanted, atol=1e-5, rtol=0)


REFUSED = {
    "LoHa": ({"lora_unet_x.hada_w1_a": torch.ones(2, 2)}, "hada"),
    "LoKr": ({"lora_unet_x.lokr_w1": torch.ones(2, 2)}, "lokr"),
    "unknown": ({"lora_unet_x.mystery": torch.ones(2, 2)}, "mystery"),
    "Tucker": (
        {"lora_unet_mid_block_attentions_0_proj_in.lora_mid.weight": torch.ones(2, 2)},
        "mid",
    ),
    "absent": (
        {
            "lora_unet_nowhere.lora_down.weight": torch.ones(2, 4),
            "lora_unet_nowhere.lora_up.weight": torch.ones(4, 2),
            "lora_unet_nowhere.alpha": torch.tensor(1.0),
        },
        "lora_unet_nowhere",
    ),
}


@pytest.mark.parametrize("row", REFUSED)
def test_what_a_file_must_not_hold_is_refused_by_name(tmp_path, base, row):
    more, name = REFUSED[row]
    adapter = write(tmp_path / "adapter", "kohya")
    save_file({**kohya(), **more}, adapter)
    with pytest.raises(MergeKitError, match=name) as caught:
        merged(base, adapter, tmp_path / "out")
    assert caught.value.code() == 3
    assert not (tmp_path / "out").exists()
