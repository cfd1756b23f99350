"""Comparisons of adapters of every kind against dense matrices in float64."""

from __future__ import annotations

import json
from dataclasses import FrozenInstanceError
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

import merge_kit as mk
from tests.toys import write

SETTINGS = {"peft_type": "LORA", "base_model_name_or_path": "org/base", "r": 2, "lora_alpha": 3}
SCALE = 1.5
START = "base_model.model."


def draw(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def adapter(folder: Path, tensors: dict[str, Tensor], **settings: object) -> Path:
    folder.mkdir(parents=True)
    named = {START + name: tensor for name, tensor in tensors.items()}
    save_file(named, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps({**SETTINGS, **settings}))
    return folder


def dense(pairs: list[tuple[Tensor, Tensor]]) -> list[Tensor]:
    """Return scale * b @ a of pairs of b and a, each flattened to a matrix."""
    return [SCALE * b.double().flatten(1) @ a.double().flatten(1) for b, a in pairs]


def check(folders: list[Path], one: list[Tensor], other: list[Tensor], rank: int = 2) -> None:
    """Check a comparison with dense changes, block by block of equal shape."""
    pair = mk.compare_adapters(folders).pair()
    x, y = (torch.cat([block.flatten() for block in blocks]) for blocks in (one, other))
    assert pair.dot == pytest.approx(float(x @ y), rel=1e-12, abs=1e-12)
    assert pair.norms == pytest.approx((float(x.norm()), float(y.norm())), rel=1e-12)
    left = right = 0.0
    for d1, d2 in zip(one, other, strict=True):
        (u1, _, v1), (u2, _, v2) = torch.linalg.svd(d1), torch.linalg.svd(d2)
        left += float((u1[:, :rank].T @ u2[:, :rank]).square().sum())
        right += float((v1[:rank] @ v2[:rank].T).square().sum())
    assert pair.least == rank * len(one)
    assert pair.output_overlap == pytest.approx(left / pair.least, rel=1e-9)
    assert pair.input_overlap == pytest.approx(right / pair.least, rel=1e-9)


def test_embeddings(tmp_path):
    folders, changes = [], []
    for seed in (1, 11):
        a, b = draw(seed, 2, 9), draw(seed + 1, 4, 2)  # (rank, tokens), (width, rank)
        tensors = {"embed.lora_embedding_A": a, "embed.lora_embedding_B": b}
        folders.append(adapter(tmp_path / f"{seed}", tensors, target_modules=["embed"]))
        changes.append(dense([(b, a)]))
    check(folders, *changes)


def test_convolutions(tmp_path):
    folders, changes = [], []
    for seed in (1, 11):
        a, b = draw(seed, 2, 3, 3, 2), draw(seed + 1, 8, 2, 1, 1)
        tensors = {"conv.lora_A.weight": a, "conv.lora_B.weight": b}
        folders.append(adapter(tmp_path / f"{seed}", tensors, target_modules=["conv"]))
        changes.append(dense([(b, a)]))
    check(folders, *changes)


def test_fused_experts_are_blocks(tmp_path):
    folders, changes = [], []
    for seed in (1, 11):
        # Rows 2 e and 2 e + 1 of a are expert e's, and so are columns e and e + 3 of b.
        a, b = draw(seed, 3 * 2, 5), draw(seed + 1, 7, 2 * 3)
        name = "model.layers.0.mlp.experts"
        tensors = {f"{name}.lora_A.weight": a, f"{name}.lora_B.weight": b}
        told = {"target_modules": [], "target_parameters": ["mlp.experts.gate_up_proj"]}
        folders.append(adapter(tmp_path / f"{seed}", tensors, **told))
        changes.append(dense([(b[:, e::3], a[2 * e : 2 * e + 2]) for e in range(3)]))
    check(folders, *changes)


def test_weights_that_lie_the_other_way_are_compared_alike(tmp_path):
    folders, changes = [], []
    for seed in (1, 11):
        a, b = draw(seed, 2, 5), draw(seed + 1, 7, 2)
        tensors = {"c_fc.lora_A.weight": a, "c_fc.lora_B.weight": b}
        told = {"target_modules": ["c_fc"], "fan_in_fan_out": True}
        folders.append(adapter(tmp_path / f"{seed}", tensors, **told))
        changes.append(dense([(b, a)]))
    check(folders, *changes)


def test_kohya_names_the_modules_of_diffusers(tmp_path):
    a, b = draw(1, 2, 4), draw(2, 6, 2)
    kohya = {
        "lora_unet_mid_block_attentions_0_proj_in.lora_down.weight": a,
        "lora_unet_mid_block_attentions_0_proj_in.lora_up.weight": b,
        "lora_unet_mid_block_attentions_0_proj_in.alpha": torch.tensor(2.0),
        "lora_te1_text_model_encoder_layers_0_mlp_fc1.lora_down.weight": a,
        "lora_te1_text_model_encoder_layers_0_mlp_fc1.lora_up.weight": b,
        "lora_te1_text_model_encoder_layers_0_mlp_fc1.alpha": torch.tensor(2.0),
    }
    diffusers = {
        "unet.mid_block.attentions.0.proj_in.lora_A.weight": a,
        "unet.mid_block.attentions.0.proj_in.lora_B.weight": b,
        "text_encoder.text_model.encoder.layers.0.mlp.fc1.lora_A.weight": a,
        "text_encoder.text_model.encoder.layers.0.mlp.fc1.lora_B.weight": -b,
    }
    for name, tensors in (("kohya", kohya), ("diffusers", diffusers)):
        apart = {n: tensor.clone() for n, tensor in tensors.items()}
        save_file(apart, tmp_path / f"{name}.safetensors")
    found = mk.compare_adapters(
        [tmp_path / "kohya.safetensors", tmp_path / "diffusers.safetensors"]
    )
    pair = found.pair()
    assert (pair.shared, pair.reinforcing, pair.cancelling) == (2, 1, 1)
    assert pair.cosine == pytest.approx(0.0, abs=1e-12)
    assert (pair.output_overlap, pair.input_overlap) == pytest.approx((1.0, 1.0))


def test_modules_with_another_prefix_are_the_same(tmp_path):
    folders = []
    for seed, prefix in ((1, "model."), (11, "")):
        tensors = {}
        for i in range(2):
            module = f"{prefix}layers.{i}.fc"
            tensors[f"{module}.lora_A.weight"] = draw(seed + 2 * i, 2, 4)
            tensors[f"{module}.lora_B.weight"] = draw(seed + 2 * i + 1, 6, 2)
        folders.append(adapter(tmp_path / f"{seed}", tensors, target_modules=["fc"]))
    found = mk.compare_adapters(folders)
    assert [row.name for row in found.modules] == ["model.layers.0.fc", "model.layers.1.fc"]
    assert found.pair().shared == 2
    (note,) = found.notes
    assert note.endswith("they are taken for the same")


def test_adapters_that_change_nothing_yet_have_no_angle(tmp_path):
    folders = []
    for name, b in (("new", torch.zeros(6, 2)), ("old", draw(2, 6, 2))):
        tensors = {"fc.lora_A.weight": draw(1, 2, 4), "fc.lora_B.weight": b}
        folders.append(adapter(tmp_path / name, tensors, target_modules=["fc"]))
    pair = mk.compare_adapters(folders).pair()
    assert (pair.cosine, pair.output_overlap, pair.interference) == (None, None, 0.0)
    both = mk.compare_adapters([folders[0], folders[0]])
    assert both.pair().interference is None
    assert str(both).splitlines()[1].split()[-4:] == ["-"] * 4


def test_adapters_of_whole_tensors_alone_have_nothing_to_compare(tmp_path):
    folders = [
        adapter(tmp_path / name, {"norm.weight": torch.ones(4)}, modules_to_save=["norm"])
        for name in ("one", "two")
    ]
    found = mk.compare_adapters(folders)
    assert (found.modules, found.layers, found.total.norms) == ((), (), (0.0, 0.0))
    assert found.notes[0] == "one: 1 tensor held whole, not compared"


def test_a_comparison_is_a_frozen_value(tmp_path):
    folders = []
    for seed, name in ((1, "sort"), (11, "add")):
        tensors = {}
        for i, module in enumerate(("embed", "layers.0.fc", "layers.1.fc", "layers.1.up")):
            tensors[f"{module}.lora_A.weight"] = draw(seed + 2 * i, 2, 4)
            tensors[f"{module}.lora_B.weight"] = draw(seed + 2 * i + 1, 6, 2)
        told = {"target_modules": ["embed", "fc", "up"]}
        folders.append(adapter(tmp_path / name, tensors, **told))
    found = mk.compare_adapters([folders[0], mk.load(folders[1]), folders[0]])
    assert found.names == ("sort (1)", "add", "sort (3)")
    assert found.bases == ("org/base",) * 3
    assert [row.name for row in found.layers] == ["embed", "layers.0", "layers.1"]
    assert len(found.modules) == 4
    pair = found.pair(0, 1)
    assert (pair.adapters, pair.shared) == ((0, 1), 4)
    assert found.pair(1, 0) is pair
    assert found.pair(2, 0).cosine == pytest.approx(1.0)
    with pytest.raises(FrozenInstanceError):
        pair.dot = 0.0
    lines = str(found).splitlines()
    assert len(lines) == 4
    assert f"{pair.cosine:.4f}" in lines[1]


def test_positions_that_are_not_there_are_refused(tmp_path):
    tensors = {"fc.lora_A.weight": draw(1, 2, 4), "fc.lora_B.weight": draw(2, 6, 2)}
    folder = adapter(tmp_path / "sort", tensors, target_modules=["fc"])
    found = mk.compare_adapters([folder, folder])
    for positions in ((0, 0), (0, 2), (-1, 0)):
        with pytest.raises(mk.UsageError, match="expected two different ones from 0 to 1"):
            found.pair(*positions)


@pytest.mark.parametrize("adapters", [[], ["one"], "sort"])
def test_two_adapters_are_needed_for_a_comparison(adapters):
    with pytest.raises(mk.UsageError, match=r"compare, expected two|type str, expected a list"):
        mk.compare_adapters(adapters)


def test_a_model_is_no_adapter_to_compare(tmp_path):
    tensors = {"fc.lora_A.weight": draw(1, 2, 4), "fc.lora_B.weight": draw(2, 6, 2)}
    folder = adapter(tmp_path / "sort", tensors, target_modules=["fc"])
    model = write(tmp_path / "model", {"fc.weight": torch.ones(6, 4)}, {"model_type": "toy"})
    with pytest.raises(mk.CheckpointError):
        mk.compare_adapters([folder, model])
    with pytest.raises(mk.CheckpointError):
        mk.compare_adapters([folder, tmp_path / "nothing"])
    with pytest.raises(mk.UsageError, match="type int, expected an adapter"):
        mk.compare_adapters([folder, 3])
    with pytest.raises(mk.UsageError, match="is no adapter"):
        mk.compare_adapters([folder, mk.load(model)])
