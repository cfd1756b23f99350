"""Checkpoints that no list of architectures knows: names, folders and files decide."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from torch import Tensor

from merge_kit.api import merge
from merge_kit.errors import MismatchError, PlanError
from tests import models

SHARES = (0.25, 0.75)


def linear(folders: list[Path], *, base: Path | None = None) -> dict[str, Any]:
    listed = [
        {"model": str(path), "parameters": {"weight": share}}
        for path, share in zip(folders, SHARES, strict=True)
    ]
    named = {} if base is None else {"base_model": str(base)}
    return {"merge_method": "linear", **named, "models": listed}


def random(names: dict[str, tuple[int, ...]], seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {n: torch.randn(shape, generator=generator).bfloat16() for n, shape in names.items()}


def write(path: Path, tensors: dict[str, Tensor]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(tensors, path, metadata={"format": "pt"})


def write_json(path: Path, content: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


INVENTED = {
    "architectures": ["ZyxForSomething"],
    "model_type": "zyx_net",
    "n_layers": 3,
    "cell_types": ["wide", "narrow", "wide"],
    "dtype": "bfloat16",
}


def invented(folder: Path, seed: int, extra: dict[str, tuple[int, ...]] | None = None) -> Path:
    shapes = {"zyx.in_table.weight": (8, 4), "zyx.final_norm.gain": (4,), "zyx.curl.knob": (2, 2)}
    for i in range(3):
        shapes |= {f"zyx.cells.{i}.mix.kernel": (4, 4), f"zyx.cells.{i}.twist": (4,)}
    write(folder / "model.safetensors", random(shapes | (extra or {}), seed))
    write_json(folder / "config.json", INVENTED)
    return folder


def test_an_invented_model_type_merges_without_a_word(tmp_path):
    a, b = invented(tmp_path / "a", 1), invented(tmp_path / "b", 2)
    done = merge(linear([a, b], base=a), tmp_path / "out")
    assert done.plan.notes == ()
    assert done.plan.counts() == (9, 0, 0)
    wanted = models.averaged([models.stored(a), models.stored(b)], SHARES)
    models.assert_same_tensors(models.stored(tmp_path / "out"), wanted)
    assert (tmp_path / "out/config.json").read_bytes() == (a / "config.json").read_bytes()


def test_an_invented_model_type_is_stacked_and_its_lists_follow(tmp_path):
    a, b = invented(tmp_path / "a", 1), invented(tmp_path / "b", 2)
    slices = [
        {"sources": [{"model": str(a), "layer_range": [0, 2]}]},
        {"sources": [{"model": str(b), "layer_range": [0, 3]}]},
    ]
    recipe = {"merge_method": "passthrough", "base_model": str(a), "slices": slices}
    done = merge(recipe, tmp_path / "out")
    assert done.plan.notes == ()
    one, other = models.stored(a), models.stored(b)
    wanted = {name: one[name] for name in ("zyx.in_table.weight", "zyx.curl.knob")}
    wanted["zyx.final_norm.gain"] = other["zyx.final_norm.gain"]
    for out, (state, layer) in enumerate([(one, 0), (one, 1), (other, 0), (other, 1), (other, 2)]):
        for suffix in ("mix.kernel", "twist"):
            wanted[f"zyx.cells.{out}.{suffix}"] = state[f"zyx.cells.{layer}.{suffix}"]
    models.assert_same_tensors(models.stored(tmp_path / "out"), wanted)
    config = models.config(tmp_path / "out")
    types = ["wide", "narrow", "wide", "narrow", "wide"]
    assert config == INVENTED | {"n_layers": 5, "cell_types": types}


def test_a_first_layer_unlike_all_others_stays_the_first(tmp_path):
    a = invented(tmp_path / "a", 1, {f"zyx.cells.{i}.norm": (4,) for i in (1, 2)})

    def stacked(*ranges: list[int]) -> dict[str, Any]:
        sources = [[{"model": str(a), "layer_range": layers}] for layers in ranges]
        slices = [{"sources": source} for source in sources]
        return {"merge_method": "passthrough", "base_model": str(a), "slices": slices}

    merge(stacked([0, 2], [1, 3]), tmp_path / "fine")
    assert "zyx.cells.3.norm" in models.stored(tmp_path / "fine")
    with pytest.raises(PlanError, match=r"layer 0 of input-1:a would be layer 3, .* has no norm"):
        merge(stacked([0, 3], [0, 1]), tmp_path / "moved")
    with pytest.raises(PlanError, match=r"layer 1 of input-1:a would be layer 0, .* has no norm"):
        merge(stacked([1, 3]), tmp_path / "replaced")


def test_an_unknown_tensor_of_both_models_appears_in_the_output(tmp_path):
    extra = {"zyx.cells.1.mystery": (3,), "a_stranger.weight": (2, 5)}
    a, b = invented(tmp_path / "a", 1, extra), invented(tmp_path / "b", 2, extra)
    done = merge(linear([a, b]), tmp_path / "out")
    found = models.stored(tmp_path / "out")
    wanted = models.averaged([models.stored(a), models.stored(b)], SHARES)
    assert extra.keys() <= found.keys()
    models.assert_same_tensors(found, wanted)
    assert done.plan.counts() == (11, 0, 0)


def test_an_unknown_tensor_of_one_model_stops_the_run_before_anything_is_written(tmp_path):
    a = invented(tmp_path / "a", 1, {"a_stranger.weight": (2, 5)})
    b = invented(tmp_path / "b", 2)
    with pytest.raises(MismatchError, match=r"input-2:b: lacks 1 tensors .*a_stranger\.weight"):
        merge(linear([a, b]), tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b"]


def test_fused_experts_and_single_ones_are_refused_by_name(tmp_path):
    write(tmp_path / "fused.safetensors", random({"layers.0.experts.up_proj": (2, 4, 3)}, 1))
    single = {f"layers.0.experts.{i}.up_proj.weight": (4, 3) for i in range(2)}
    write(tmp_path / "single.safetensors", random(single, 2))
    files = [tmp_path / "fused.safetensors", tmp_path / "single.safetensors"]
    with pytest.raises(Exception, match=r"lacks 1 tensors .*experts\.up_proj") as caught:
        merge(linear(files), tmp_path / "out")
    assert caught.value.code() == 3
    assert "layers.0.experts.0.up_proj.weight" in str(caught.value)


SIDE_FILES = {
    "chat_template.jinja": "{% for m in messages %}{{ m.content }}{% endfor %}\n",
    "preprocessor_config.json": '{"size": 8}\n',
    "processor_config.json": '{"processor_class": "LlavaProcessor"}\n',
    "added_tokens.json": '{"<extra>": 9}\n',
    "LICENSE": "Apache-2.0\n",
    "notes/how.txt": "trained with care\n",
}


def tokenizer() -> transformers.PreTrainedTokenizerFast:
    words = {word: i for i, word in enumerate(["<unk>", "<s>", "</s>", "a", "merge", "model"])}
    fast = Tokenizer(WordLevel(words, unk_token="<unk>"))
    fast.pre_tokenizer = Whitespace()
    tokens = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
    return transformers.PreTrainedTokenizerFast(tokenizer_object=fast, **tokens)


def test_every_file_of_the_base_is_in_the_output(tmp_path):
    a, b = models.save("llama", tmp_path / "a", 1), models.save("llama", tmp_path / "b", 2)
    for folder, ending in ((a, ""), (b, " \n")):
        tokenizer().save_pretrained(folder)
        for name, text in SIDE_FILES.items():
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).write_text(text + ending, encoding="utf-8")
        (folder / "README.md").write_text("the card of an input", encoding="utf-8")
    models.merge(linear([a, b], base=b), tmp_path / "out")
    before, after = models.contents(b), models.contents(tmp_path / "out")
    assert before.keys() <= after.keys()
    kept = [n for n in before if not n.startswith("model") and n != "README.md"]
    assert {"tokenizer.json", "generation_config.json", "config.json", *SIDE_FILES} <= {*kept}
    for name in kept:
        assert after[name] == before[name], name
    assert b"the card of an input" not in after["README.md"]
    loaded = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    assert loaded("a merge model")["input_ids"] == [3, 4, 5]


def sentence_folder(folder: Path, seed: int) -> Path:
    """Write a folder as sentence-transformers does."""
    config = transformers.BertConfig(
        hidden_size=16, intermediate_size=24, num_attention_heads=2, num_hidden_layers=2,
        vocab_size=32,
    )  # fmt: skip
    torch.manual_seed(seed)
    transformers.BertModel(config).save_pretrained(folder)
    kinds = ["", "1_Pooling", "2_Dense"]
    write_json(folder / "modules.json", [{"idx": i, "path": p} for i, p in enumerate(kinds)])
    write_json(folder / "config_sentence_transformers.json", {"prompts": {}})
    write_json(folder / "1_Pooling/config.json", {"pooling_mode_mean_tokens": True})
    write_json(folder / "2_Dense/config.json", {"in_features": 16, "out_features": 4})
    dense = {"linear.weight": (4, 16), "linear.bias": (4,)}
    write(folder / "2_Dense/model.safetensors", random(dense, seed))
    return folder


def test_a_folder_of_a_sentence_encoder_is_merged_with_all_its_modules(tmp_path):
    a, b = sentence_folder(tmp_path / "a", 1), sentence_folder(tmp_path / "b", 2)
    merge(linear([a, b]), tmp_path / "out")
    assert models.files(tmp_path / "out") == models.files(a) | {"README.md", "merge_kit.json"}
    found = models.stored(tmp_path / "out")
    assert "2_Dense/linear.weight" in found
    wanted = averaged_in_float64(a, b)
    for name, tensor in found.items():
        assert_rounded(tensor, wanted[name])
    for name in ("1_Pooling/config.json", "2_Dense/config.json", "modules.json", "config.json"):
        assert (tmp_path / "out" / name).read_bytes() == (a / name).read_bytes(), name
    _, info = transformers.BertModel.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info.values())


def pipeline(folder: Path, seed: int) -> Path:
    """Write a folder as diffusers does, its largest part in two files."""
    write_json(folder / "model_index.json", {"_class_name": "APipeline", "unet": ["d", "UNet"]})
    write_json(folder / "scheduler/scheduler_config.json", {"beta_start": 0.1})
    write_json(folder / "unet/config.json", {"_class_name": "UNet", "layers_per_block": 2})
    write_json(folder / "vae/config.json", {"_class_name": "AutoencoderKL"})
    write_json(folder / "text_encoder/config.json", {"model_type": "zyx", "dtype": "bfloat16"})
    (folder / "tokenizer").mkdir()
    (folder / "tokenizer/merges.txt").write_text("a b\n", encoding="utf-8")
    parts = [
        {"conv_in.weight": (4, 2, 3, 3), "down_blocks.0.resnets.0.conv1.weight": (4, 4, 3, 3)},
        {"up_blocks.0.attn.to_q.weight": (4, 4), "conv_out.bias": (2,)},
    ]
    names = [f"diffusion_pytorch_model-0000{i}-of-00002.safetensors" for i in (1, 2)]
    for name, part in zip(names, parts, strict=True):
        write(folder / "unet" / name, random(part, seed))
    index = {tensor: name for name, part in zip(names, parts, strict=True) for tensor in part}
    write_json(
        folder / "unet/diffusion_pytorch_model.safetensors.index.json",
        {"metadata": {}, "weight_map": index},
    )
    vae = {"encoder.conv_in.weight": (4, 2, 3, 3), "quant_conv.weight": (2, 2, 1, 1)}
    write(folder / "vae/diffusion_pytorch_model.safetensors", random(vae, seed + 10))
    text = {"text_model.embeddings.token_embedding.weight": (8, 4)}
    write(folder / "text_encoder/model.safetensors", random(text, seed + 20))
    return folder


def test_a_folder_of_an_image_pipeline_is_merged_with_all_its_parts(tmp_path):
    a, b = pipeline(tmp_path / "a", 1), pipeline(tmp_path / "b", 2)
    merge(linear([a, b]), tmp_path / "out", shard_size=440)
    assert models.files(tmp_path / "out") == models.files(a) | {"README.md", "merge_kit.json"}
    wanted = models.averaged([models.stored(a), models.stored(b)], SHARES)
    models.assert_same_tensors(models.stored(tmp_path / "out"), wanted)
    written = {"README.md", "merge_kit.json", "unet/diffusion_pytorch_model.safetensors.index.json"}
    for name in models.files(a) - written:
        if not name.endswith(".safetensors"):
            assert (tmp_path / "out" / name).read_bytes() == (a / name).read_bytes(), name
    index = json.loads((tmp_path / "out" / max(written)).read_text(encoding="utf-8"))
    assert {f"unet/{name}" for name in index["weight_map"]} == {
        name for name in wanted if name.startswith("unet/")
    }


def averaged_in_float64(a: Path, b: Path) -> dict[str, Tensor]:
    one, other = models.stored(a), models.stored(b)
    return {n: SHARES[0] * one[n].double() + SHARES[1] * other[n].double() for n in one}


def assert_rounded(found: Tensor, exact: Tensor) -> None:
    """Hold a tensor to its exact value, within the rounding of its dtype and of float32 terms."""
    unit = torch.finfo(found.dtype).eps / 2
    torch.testing.assert_close(found.double(), exact, rtol=2 * unit, atol=2**-22)
