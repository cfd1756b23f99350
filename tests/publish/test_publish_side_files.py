from __future__ import annotations

import os
import stat

import pytest

from merge_kit.errors import CheckpointError, OutputError
from merge_kit.plan.values import SideFile
from merge_kit.publish.side_files import file_list, write_side_files


@pytest.fixture
def out(tmp_path):
    folder = tmp_path / "out"
    folder.mkdir()
    return folder


def test_texts_are_written_as_utf8_with_their_own_line_ends(out):
    write_side_files(out, [SideFile("unet/config.json", text="{é}\n")])
    assert (out / "unet/config.json").read_bytes() == b"{\xc3\xa9}\n"


def test_files_are_copied_byte_for_byte_without_their_mode(tmp_path, out):
    source, content = tmp_path / "vocab", os.urandom(3 << 20)
    source.write_bytes(content)
    source.chmod(0o400)
    (tmp_path / "link").symlink_to("vocab")
    before = os.umask(0o022)
    try:
        write_side_files(out, [SideFile("a/vocab", tmp_path / "link")])
    finally:
        os.umask(before)
    assert (out / "a/vocab").read_bytes() == content
    assert stat.S_IMODE((out / "a/vocab").lstat().st_mode) == 0o644
    assert stat.S_IMODE((out / "a").stat().st_mode) == 0o755


@pytest.mark.parametrize(
    "name",
    ["../x", "a/../../x", "/etc/x", "", "a//x", "./x", "a\0", "..", ".merge_kit/journal.jsonl"],
)
def test_a_name_that_leaves_the_folder_is_refused(tmp_path, out, name):
    with pytest.raises(CheckpointError, match="does not stay in the output"):
        write_side_files(out, [SideFile(name, text="x")])
    assert [path.name for path in tmp_path.rglob("*")] == ["out"]


def test_links_in_the_folder_are_not_followed(tmp_path, out):
    (tmp_path / "kept").write_text("kept")
    (tmp_path / "elsewhere").mkdir()
    (out / "config.json").symlink_to(tmp_path / "kept")
    (out / "unet").symlink_to(tmp_path / "elsewhere")
    write_side_files(out, [SideFile("config.json", text="new")])
    with pytest.raises(OutputError, match="is a link"):
        write_side_files(out, [SideFile("unet/config.json", text="new")])
    assert (tmp_path / "kept").read_text() == "kept"
    assert (out / "config.json").read_text() == "new"
    assert list((tmp_path / "elsewhere").iterdir()) == []


def test_what_an_earlier_run_left_is_replaced(out):
    for text in ("a longer text", "short"):
        write_side_files(out, [SideFile("config.json", text=text)])
    assert (out / "config.json").read_text() == "short"


def test_a_source_that_is_gone_or_no_file_is_an_error_of_the_input(tmp_path, out):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(CheckpointError, match="gone: cannot read: No such file") as caught:
        write_side_files(out, [SideFile("x", tmp_path / "gone")])
    assert caught.value.code() == 3
    with pytest.raises(CheckpointError, match="no regular file"):
        write_side_files(out, [SideFile("x", tmp_path / "pipe")])
    with pytest.raises(CheckpointError, match="no regular file"):
        write_side_files(out, [SideFile("x", tmp_path)])


def test_a_full_disk_is_a_system_error(out):
    (out / "full").mkdir()
    with pytest.raises(OutputError, match="full: cannot write: ") as caught:
        write_side_files(out, [SideFile("full", text="x")])
    assert caught.value.code() == 4


def test_a_push_sends_neither_hidden_files_nor_links(tmp_path, out):
    for name in ("model.safetensors", "unet/a", ".hidden", ".merge_kit/journal.jsonl", "a/.git/x"):
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        (out / name).touch()
    (out / "passwd").symlink_to("/etc/passwd")
    (out / "linked").symlink_to("unet")
    os.mkfifo(out / "pipe")
    assert file_list(out) == ["model.safetensors", "unet/a"]


def test_a_folder_that_is_not_there_has_no_file_list(tmp_path):
    with pytest.raises(CheckpointError, match="cannot read: No such file"):
        file_list(tmp_path / "gone")
