from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from checkpoint_files import write_index, write_sharded, write_weights

import merge_kit
from merge_kit.core.tensors import TensorSpec
from merge_kit.errors import CheckpointError, Problems
from merge_kit.io.checkpoint import open_checkpoint
from merge_kit.io.layout import build_header, build_index, shard_names

STALE = "weights in another format would be stale"


def tensors(checkpoint):
    return [list(component.tensors) for component in checkpoint.components]


def test_a_folder_with_one_file(tmp_path):
    folder = tmp_path / "tiny"
    write_weights(folder / "model.safetensors", "b", "a")
    (folder / "config.json").write_text('{"é": 1}', encoding="utf-8")
    found = open_checkpoint(folder)
    (component,) = found.components
    status = (folder / "model.safetensors").stat()
    (file,) = component.files
    assert (found.root, found.name, found.is_file) == (folder, "tiny", False)
    assert (component.path, component.stem, component.config_text) == ("", "model", '{"é": 1}')
    assert (file.name, file.path) == ("model.safetensors", folder / "model.safetensors")
    assert (file.nbytes, file.mtime_ns) == (status.st_size, status.st_mtime_ns)
    assert list(component.tensors) == ["b", "a"]
    assert component.tensors["a"].spec == TensorSpec("a", "F32", (2,))
    assert component.tensors["a"].span.stop == status.st_size
    assert (found.side_files, found.left_out, found.warnings) == (("config.json",), {}, ())


def test_a_sharded_folder_lists_tensors_shard_by_shard(tmp_path):
    write_sharded(tmp_path)
    found = open_checkpoint(tmp_path, name="mine")
    assert found.name == "mine"
    assert tensors(found) == [["a", "b", "c"]]
    assert found.components[0].tensors["c"].span.path.name == "model-00002-of-00002.safetensors"
    assert found.left_out == {
        "model.safetensors.index.json": "rebuilt from the output's own shards"
    }
    assert found.warnings == ()


def test_shards_without_an_index(tmp_path):
    write_weights(tmp_path / "model-00010-of-00010.safetensors", "z")
    for i in range(1, 10):
        write_weights(tmp_path / f"model-{i:05d}-of-00010.safetensors", f"t{i}")
    assert tensors(open_checkpoint(tmp_path)) == [[f"t{i}" for i in range(1, 10)] + ["z"]]


def test_a_single_file_has_no_side_files(tmp_path):
    write_weights(tmp_path / "flux.safetensors", "a")
    (tmp_path / "config.json").write_text("{}")
    found = open_checkpoint(tmp_path / "flux.safetensors")
    assert (found.name, found.is_file, found.side_files) == ("flux", True, ())
    assert (found.components[0].stem, found.components[0].config_text) == ("model", None)


def test_components_in_subfolders_come_after_the_root(tmp_path):
    write_weights(tmp_path / "model.safetensors", "a")
    write_weights(tmp_path / "2_Dense" / "model.safetensors", "a", "b")
    write_weights(tmp_path / "a" / "b" / "c" / "adapter_model.safetensors", "d")
    (tmp_path / "2_Dense" / "config.json").write_text("{}")
    found = open_checkpoint(tmp_path)
    assert [(c.path, c.stem) for c in found.components] == [
        ("", "model"),
        ("2_Dense", "model"),
        ("a/b/c", "adapter_model"),
    ]
    assert [c.config_text for c in found.components] == [None, "{}", None]
    assert found.components[1].files[0].name == "2_Dense/model.safetensors"
    assert tensors(found) == [["a"], ["a", "b"], ["d"]]


def test_the_fourth_level_is_left_out_with_a_reason(tmp_path):
    write_weights(tmp_path / "model.safetensors", "a")
    write_weights(tmp_path / "a" / "b" / "c" / "d" / "model.safetensors", "d")
    found = open_checkpoint(tmp_path)
    assert len(found.components) == 1
    assert found.left_out == {"a/b/c/d/": "nested deeper than 3 folders"}


def test_a_pipeline_ignores_the_same_weights_in_one_file(tmp_path):
    write_weights(tmp_path / "vae" / "diffusion_pytorch_model.safetensors", "v")
    write_weights(tmp_path / "unet" / "diffusion_pytorch_model.safetensors", "u")
    write_weights(tmp_path / "v1-5-pruned.safetensors", "u", "v")
    write_weights(tmp_path / "v1-5-pruned-ema.safetensors", "u", "v")
    (tmp_path / "model_index.json").write_text("{}")
    found = open_checkpoint(tmp_path)
    assert [c.path for c in found.components] == ["unet", "vae"]
    assert found.side_files == ("model_index.json",)
    assert set(found.left_out) == {"v1-5-pruned.safetensors", "v1-5-pruned-ema.safetensors"}
    assert len(found.warnings) == 2


@pytest.mark.parametrize(
    ("stems", "used"),
    [
        (["adapter_model", "model"], "model"),
        (["adapter_model", "diffusion_pytorch_model"], "diffusion_pytorch_model"),
        (["model.fp16", "model"], "model"),
        (["consolidated", "model"], "model"),
        (["ema", "ema.fp16"], "ema"),
        (["consolidated"], "consolidated"),
        (["model.fp16"], "model.fp16"),
    ],
)
def test_one_family_of_weights_is_used_and_the_others_are_warned_of(tmp_path, stems, used):
    for stem in stems:
        write_weights(tmp_path / f"{stem}.safetensors", "a")
    found = open_checkpoint(tmp_path)
    assert [file.name for file in found.components[0].files] == [f"{used}.safetensors"]
    others = {f"{stem}.safetensors" for stem in stems} - {f"{used}.safetensors"}
    assert set(found.left_out) == others
    assert [warning.split()[0] for warning in found.warnings] == sorted(others)


def test_sharded_variants_are_told_from_the_weights(tmp_path):
    write_sharded(tmp_path)
    for i in (1, 2):
        write_weights(tmp_path / f"model-0000{i}-of-00002.fp16.safetensors", f"t{i}")
    write_index(tmp_path / "model.safetensors.index.fp16.json", {"a": "x.safetensors"})
    found = open_checkpoint(tmp_path)
    assert tensors(found) == [["a", "b", "c"]]
    assert "a variant of the weights that are used" in set(found.left_out.values())
    assert "model.safetensors.index.fp16.json" in found.left_out


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (["one", "two"], "several sets of weights, expected one: one.safetensors, two.safetensors"),
        (["model-00001-of-00003", "model-00003-of-00003"], "2 of 3 shards, absent are 2"),
        (["model-00001-of-999999999"], "1 of 999999999 shards, absent are 2, 3, 4, 5, 6, ..."),
        (["model-00000-of-00001"], "absent are 1"),
        (["model-1-of-2", "model-01-of-2"], "absent are 2"),
        (["model-1-of-2", "model-01-of-2", "model-2-of-2"], "3 of 2 shards, .*repeat"),
        (["model", "model-00001-of-00001"], "two sets of the same weights"),
        (["model-00001-of-00002", "model-00001-of-00001"], "sets of 1 and of 2"),
    ],
)
def test_sets_of_weights_that_contradict_are_refused(tmp_path, files, message):
    for name in files:
        write_weights(tmp_path / f"{name}.safetensors", f"tensor of {name}")
    with pytest.raises(CheckpointError, match=message) as caught:
        open_checkpoint(tmp_path)
    assert caught.value.where == str(tmp_path)


def test_an_index_that_does_not_describe_the_single_file_is_refused(tmp_path):
    write_sharded(tmp_path)
    write_weights(tmp_path / "model.safetensors", "a")
    with pytest.raises(CheckpointError, match=r"hint: remove the index or model.safetensors, or"):
        open_checkpoint(tmp_path)


def test_an_index_may_describe_the_single_file(tmp_path):
    write_weights(tmp_path / "model.safetensors", "a")
    write_index(tmp_path / "model.safetensors.index.json", {"a": "model.safetensors"})
    assert tensors(open_checkpoint(tmp_path)) == [["a"]]


def test_files_of_any_name_count_if_the_index_names_them(tmp_path):
    write_weights(tmp_path / "model.safetensors-00001-of-00002.safetensors", "a")
    write_weights(tmp_path / "mtp.safetensors", "b")
    names = {"a": "model.safetensors-00001-of-00002.safetensors", "b": "mtp.safetensors"}
    write_index(tmp_path / "model.safetensors.index.json", names)
    found = open_checkpoint(tmp_path)
    assert sorted(tensors(found)[0]) == ["a", "b"]
    assert set(found.left_out) == {"model.safetensors.index.json"}
    assert found.warnings == ()


def test_a_shard_that_the_index_does_not_name_is_warned_of(tmp_path):
    write_sharded(tmp_path)
    write_weights(tmp_path / "model-00003-of-00003.safetensors", "d")
    found = open_checkpoint(tmp_path)
    assert found.left_out["model-00003-of-00003.safetensors"] == "not named by the index"
    assert len(found.warnings) == 1


def test_side_files_and_reasons(tmp_path):
    write_weights(tmp_path / "model.safetensors", "a")
    kept = [
        *("LICENSE", "NOTICE", "chat_template.jinja", "config.json", "generation_config.json"),
        *("additional_chat_templates/rag.jinja", "merges.txt", "tokenizer.model", "vocab.json"),
        "tokenizer/README.md",
    ]
    reasons = {
        "README.md": "replaced by the merge's own card",
        "merge_kit.json": "a record of an earlier merge",
        "mergekit_config.yml": "a record of an earlier merge",
        "pytorch_model.bin": STALE,
        "old/tf_model.h5": STALE,
        "x.ONNX": STALE,
        "model.gguf": STALE,
        "pytorch_model.bin.index.json": "rebuilt from the output's own shards",
        "modeling_x.py": "code is not copied",
        "optimizer.pt": "the state of a training run",
        "training_args.bin": "the state of a training run",
    }
    for name in [*kept, *reasons, ".git/config", ".gitattributes", "sub/.cache/x.json"]:
        (tmp_path / name).parent.mkdir(exist_ok=True, parents=True)
        (tmp_path / name).write_text("{}")
    found = open_checkpoint(tmp_path)
    assert found.side_files == tuple(sorted(kept))
    assert found.left_out == reasons


def test_a_pickled_component_without_safetensors_is_warned_of(tmp_path):
    write_weights(tmp_path / "model.safetensors", "a")
    (tmp_path / "pytorch_model.bin").write_bytes(b"stale")
    (tmp_path / "2_Dense").mkdir()
    (tmp_path / "2_Dense" / "pytorch_model.bin").write_bytes(b"needed")
    (warning,) = open_checkpoint(tmp_path).warnings
    assert warning.startswith("2_Dense/pytorch_model.bin is left out: pickled")


def test_checkpoints_of_a_training_run_are_no_components(tmp_path):
    write_weights(tmp_path / "run" / "checkpoint-20" / "model.safetensors", "a")
    with pytest.raises(CheckpointError, match=r"checkpoints of a training run: checkpoint-20/"):
        open_checkpoint(tmp_path / "run")
    write_weights(tmp_path / "run" / "model.safetensors", "a")
    found = open_checkpoint(tmp_path / "run")
    assert len(found.components) == 1
    assert len(found.warnings) == 1


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ([], "it is empty"),
        (["a.txt", "b.txt"], r"no .safetensors file; its 2 files are: a.txt, b.txt"),
        (["pytorch_model.bin", "x.gguf"], "never opens pickles"),
        (["unet/x.ckpt"], r"pickled weights only \(unet/x.ckpt\)"),
        (["x-Q4.gguf"], r"GGUF weights \(x-Q4.gguf\).*\n  hint: .*llama.cpp"),
        (["tf_model.h5"], "other formats only, expected safetensors: tf_model.h5"),
        (["training_args.bin"], "no .safetensors file"),
    ],
)
def test_a_folder_without_safetensors_says_what_it_holds(tmp_path, files, message):
    for name in files:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    with pytest.raises(CheckpointError, match=message) as caught:
        open_checkpoint(tmp_path)
    assert caught.value.hint


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("x.bin", "mergekit convert"),
        ("x.gguf", "llama.cpp"),
        ("x.txt", "no .safetensors file"),
        ("model.safetensors.index.json", "name its folder"),
        ("model-00001-of-00002.safetensors", "one of 2 shards"),
    ],
)
def test_a_file_that_is_no_model_says_what_to_name(tmp_path, name, message):
    write_weights(tmp_path / name, "a")
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(tmp_path / name)


def test_a_missing_path_says_how_to_download_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for path in ("no/where", "no\0where", "x" * 5000):
        with pytest.raises(CheckpointError) as caught:
            open_checkpoint(Path(path))
        assert path in caught.value.where
    with pytest.raises(CheckpointError, match="there is no such folder or file here") as caught:
        open_checkpoint(Path("no/where"))
    assert caught.value.hint == "download it first: hf download no/where --local-dir DIR"


def test_every_broken_shard_is_reported(tmp_path):
    write_sharded(tmp_path)
    for i in (1, 2):
        os.truncate(tmp_path / f"model-0000{i}-of-00002.safetensors", 5)
    with pytest.raises(Problems) as caught:
        open_checkpoint(tmp_path)
    assert len(caught.value.errors) == 2
    assert caught.value.code() == 3


def test_a_checkpoint_without_tensors_is_refused(tmp_path):
    write_weights(tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match="no tensors"):
        open_checkpoint(tmp_path)


def test_a_config_that_is_not_utf8_is_refused(tmp_path):
    write_weights(tmp_path / "model.safetensors", "a")
    (tmp_path / "config.json").write_bytes(b"{\xff}")
    with pytest.raises(CheckpointError, match="not UTF-8, at byte 1"):
        open_checkpoint(tmp_path)


def cached(tmp_path):
    """Write a repository as the Hub's cache keeps it and return its snapshot."""
    repository = tmp_path / "models--org--tiny-model"
    snapshot = repository / "snapshots" / "abc123"
    write_weights(repository / "blobs" / "0f" / ".." / "0f1e", "a")
    (repository / "blobs" / "77").write_text("{}")
    (snapshot / "tokenizer").mkdir(parents=True)
    (snapshot / "model.safetensors").symlink_to("../../blobs/0f1e")
    (snapshot / "config.json").symlink_to("../../blobs/77")
    (snapshot / "tokenizer" / "vocab.json").symlink_to("../../../blobs/77")
    return snapshot


def test_the_cache_of_the_hub_opens(tmp_path):
    found = open_checkpoint(cached(tmp_path))
    assert found.name == "tiny-model"
    assert tensors(found) == [["a"]]
    assert found.components[0].config_text == "{}"
    assert found.side_files == ("config.json", "tokenizer/vocab.json")
    assert found.left_out == {}


def test_a_repository_of_the_cache_points_to_its_snapshot(tmp_path):
    snapshot = cached(tmp_path)
    with pytest.raises(CheckpointError, match="repository of the Hub's cache") as caught:
        open_checkpoint(snapshot.parent.parent)
    assert caught.value.hint == f"name a snapshot: {snapshot}"


def test_links_that_leave_the_folder_are_not_copied(tmp_path):
    folder = tmp_path / "model"
    write_weights(folder / "model.safetensors", "a")
    write_weights(tmp_path / "other" / "model.safetensors", "b")
    (folder / "LICENSE").write_text("free")
    (folder / "COPYING").symlink_to("LICENSE")
    (folder / "secret.txt").symlink_to("/etc/hostname")
    (folder / "part").symlink_to(tmp_path / "other")
    (folder / "self").symlink_to(".")
    (folder / "gone.txt").symlink_to("nothing")
    os.mkfifo(folder / "pipe.txt")
    found = open_checkpoint(folder)
    assert tensors(found) == [["a"]]
    assert found.side_files == ("COPYING", "LICENSE")
    assert found.left_out == {
        "gone.txt": "a broken link",
        "part": "a link that leaves the folder",
        "pipe.txt": "neither a file nor a folder",
        "secret.txt": "a link that leaves the folder",
        "self": "a link to a folder or device",
    }


def test_a_linked_root_is_followed(tmp_path):
    write_weights(tmp_path / "real" / "model.safetensors", "a")
    (tmp_path / "link").symlink_to("real")
    assert tensors(open_checkpoint(tmp_path / "link")) == [["a"]]


def test_names_that_cannot_be_printed_are_left_out_escaped(tmp_path):
    write_weights(tmp_path / "model.safetensors", "a")
    (tmp_path / "a\nb.txt").write_text("")
    (tmp_path / os.fsdecode(b"\xff.txt")).write_text("")
    found = open_checkpoint(tmp_path)
    assert found.side_files == ()
    assert set(found.left_out) == {r"'a\nb.txt'", r"'\udcff.txt'"}


def test_two_models_of_191_shards_open(tmp_path):
    specs = [TensorSpec(f"model.layers.{i}.weight", "BF16", (4, 4)) for i in range(1137)]
    names = shard_names("model", 191)
    weight_map = {spec.name: names[i * 191 // 1137] for i, spec in enumerate(specs)}
    for name in names:
        held = [spec for spec in specs if weight_map[spec.name] == name]
        (tmp_path / name).write_bytes(build_header(held)[0] + bytes(32 * len(held)))
    text = build_index(weight_map, 32 * 1137)
    (tmp_path / "model.safetensors.index.json").write_text(text)
    first, second = open_checkpoint(tmp_path), open_checkpoint(tmp_path)
    assert len(first.components[0].tensors) == 1137
    assert first == second


def test_opening_imports_neither_torch_nor_the_library(tmp_path):
    write_sharded(tmp_path)
    program = (
        "import sys; from pathlib import Path\n"
        "from merge_kit.io.checkpoint import open_checkpoint\n"
        "open_checkpoint(Path(sys.argv[1]))\n"
        "print(sorted({'torch', 'safetensors', 'numpy', 'mmap'} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, tmp_path],
        cwd=Path(merge_kit.__file__).parent.parent,
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout == "[]\n"
