from __future__ import annotations

import errno
import os
import signal
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from merge_kit.errors import LockedError, OutputError, OutputExistsError, UsageError
from merge_kit.publish import staging as staging_module
from merge_kit.publish import swap
from merge_kit.publish.staging import STATE, stage

JOURNAL = f"{STATE}/journal.jsonl"


def staged(output, *, overwrite=False, inputs=(), identity="a"):
    return stage(output, overwrite=overwrite, inputs=inputs, identity=identity)


def write(output, name="model", text="new", sync=False, **options):
    with staged(output, **options) as staging:
        (staging.folder / name).write_text(text)
        staging.commit(sync=sync)


def die(output, files=None, **options):
    """Write files (name -> text) into the partial folder, then fail."""
    with staged(output, **options) as staging:
        for name, text in (files or {}).items():
            (staging.folder / name).write_text(text)
        raise KeyError


def begin(output, name="model", **options):
    """Let a run finish one step and die."""
    with pytest.raises(KeyError):
        die(output, {name: "half", JOURNAL: "{}\n"}, **options)
    return output.with_name(f"{output.name}.partial")


def tree(folder):
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*"))


def test_the_output_appears_at_commit_and_nothing_else_is_left(tmp_path):
    output = tmp_path / "out"
    with staged(output) as staging:
        assert staging.folder == tmp_path / "out.partial"
        (staging.folder / "model").write_text("new")
        assert not output.exists()
        staging.commit(sync=False)
        assert output.is_dir()
    assert tree(tmp_path) == ["out", "out/model"]


def test_an_empty_folder_that_is_there_is_taken(tmp_path):
    (tmp_path / "out").mkdir()
    write(tmp_path / "out")
    assert tree(tmp_path) == ["out", "out/model"]


def test_a_folder_with_something_in_it_is_refused_and_kept(tmp_path):
    write(tmp_path / "out", text="old")
    with pytest.raises(OutputExistsError, match="is not empty") as caught:
        staged(tmp_path / "out").__enter__()
    assert "--overwrite" in caught.value.hint
    assert caught.value.code() == 2
    assert (tmp_path / "out/model").read_text() == "old"
    assert tree(tmp_path) == ["out", "out/model"]


@pytest.mark.parametrize("exchanges", [True, False])
def test_overwriting_leaves_only_the_new_files(tmp_path, monkeypatch, exchanges):
    if not exchanges:
        monkeypatch.setattr(swap, "exchange", lambda one, other: False)
    write(tmp_path / "out", name="old")
    write(tmp_path / "out", name="new", overwrite=True, sync=True)
    assert tree(tmp_path) == ["out", "out/new"]


def test_names_are_exchanged_in_one_step(tmp_path):
    for name in ("one", "other"):
        (tmp_path / name).mkdir()
        (tmp_path / name / name).touch()
    assert swap.exchange(tmp_path / "one", tmp_path / "other")
    assert tree(tmp_path) == ["one", "one/other", "other", "other/one"]


def test_a_system_without_exchange_is_told_from_a_failure(tmp_path, monkeypatch):
    def failing(number):
        def renameat2(*arguments):
            swap.ctypes.set_errno(number)
            return -1

        return lambda: renameat2

    monkeypatch.setattr(swap, "_renameat2", failing(errno.EINVAL))
    assert not swap.exchange(tmp_path, tmp_path)
    monkeypatch.setattr(swap, "_renameat2", lambda: None)
    assert not swap.exchange(tmp_path, tmp_path)
    monkeypatch.setattr(swap, "_renameat2", failing(errno.EIO))
    with pytest.raises(OSError, match="Input/output error"):
        swap.exchange(tmp_path, tmp_path)


def test_two_renames_are_rolled_back_when_the_second_fails(tmp_path, monkeypatch):
    write(tmp_path / "out", text="old")
    monkeypatch.setattr(swap, "exchange", lambda one, other: False)
    rename = Path.rename

    def failing(self, target):
        if self.name == "out.partial":
            raise OSError(errno.EIO, "Input/output error")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", failing)
    with pytest.raises(OutputError, match="out: cannot write: Input/output error"):
        write(tmp_path / "out", overwrite=True)
    assert (tmp_path / "out/model").read_text() == "old"
    assert tree(tmp_path) == ["out", "out/model"]


@pytest.mark.parametrize("output", ["base", "base/inner", "base/inner/out", ".", "link", "weights"])
@pytest.mark.parametrize("overwrite", [True, False])
def test_an_input_is_never_touched(tmp_path, output, overwrite):
    for name in ("base/inner/model", "weights/model"):
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).write_text("precious")
    (tmp_path / "link").symlink_to("base")
    (tmp_path / "base/linked").symlink_to("../weights/model")  # as in the Hub's cache
    before = tree(tmp_path)
    with pytest.raises(OutputExistsError, match=r"(is|lies inside|holds) the input .*base"):
        write(tmp_path / output, overwrite=overwrite, inputs=[tmp_path / "base"])
    assert tree(tmp_path) == before


def test_an_input_that_is_a_file_is_never_touched(tmp_path):
    (tmp_path / "models").mkdir()
    file = tmp_path / "models/a.safetensors"
    file.touch()
    for output in (file, tmp_path / "models"):
        with pytest.raises(OutputExistsError, match="the input"):
            write(output, overwrite=True, inputs=[file])
    write(tmp_path / "models/out", inputs=[file])
    assert file.exists()


def test_an_input_by_the_name_of_a_partial_folder_is_never_touched(tmp_path):
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial/merge_kit.json").touch()
    with pytest.raises(OutputExistsError, match="is the input"):
        write(tmp_path / "out", inputs=[tmp_path / "out.partial"])
    assert tree(tmp_path) == ["out.partial", "out.partial/merge_kit.json"]


def test_an_output_beside_an_input_is_fine(tmp_path):
    (tmp_path / "base").mkdir()
    write(tmp_path / "base2", inputs=[tmp_path / "base"])
    assert (tmp_path / "base2/model").exists()


@pytest.mark.parametrize("kind", ["working", "home"])
def test_the_working_and_the_home_directory_are_not_overwritten(tmp_path, monkeypatch, kind):
    inner = tmp_path / "a/b"
    inner.mkdir(parents=True)
    if kind == "working":
        monkeypatch.chdir(inner)
    else:
        monkeypatch.setenv("HOME", str(inner))
    with pytest.raises(OutputExistsError, match=f"holds the {kind} directory"):
        write(tmp_path / "a", overwrite=True)
    assert inner.is_dir()


def test_missing_parents_are_made_and_go_again_if_the_run_fails(tmp_path):
    output = tmp_path / "x/y/out"
    with pytest.raises(KeyError):
        die(output, {"model": "half"})
    assert tree(tmp_path) == []
    begin(output)
    assert (tmp_path / "x/y/out.partial").is_dir()
    write(output)
    assert tree(tmp_path) == ["x", "x/y", "x/y/out", "x/y/out/model"]


def test_parents_that_hold_something_else_stay(tmp_path):
    with pytest.raises(KeyError):
        die(tmp_path / "x/out", {"../other": "kept"})
    assert tree(tmp_path) == ["x", "x/other"]


@pytest.mark.parametrize("output", ["file", "file/out", "file/x/out", "f" * 250, "/proc/x/out"])
def test_a_place_that_cannot_be_written_is_a_system_error(tmp_path, output):
    (tmp_path / "file").write_text("kept")
    with pytest.raises(OutputError) as caught:
        staged(tmp_path / output).__enter__()
    assert caught.value.code() == 4
    assert tree(tmp_path) == ["file"]


def test_a_read_only_parent_is_refused_with_its_reason(tmp_path, monkeypatch):
    def read_only(*arguments, **options):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr("merge_kit.publish.lock.os.open", read_only)
    with pytest.raises(OutputError, match="cannot write: Read-only file system") as caught:
        staged(tmp_path / "x/out").__enter__()
    assert "-o" in caught.value.hint
    assert tree(tmp_path) == []


def test_a_read_only_folder_is_not_overwritten(tmp_path, monkeypatch):
    write(tmp_path / "out")
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    with pytest.raises(OutputError, match="read-only"):
        staged(tmp_path / "out", overwrite=True).__enter__()


def test_a_path_that_no_file_can_have_is_refused():
    with pytest.raises(UsageError, match="is no path"):
        staged(Path("a\0b"))


def test_a_mount_point_is_refused():
    with pytest.raises(OutputError, match="root of a file system"):
        staged(Path("/"))


def test_a_link_to_a_folder_is_followed(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    write(tmp_path / "link")
    assert tree(tmp_path) == ["link", "real", "real/model"]
    assert (tmp_path / "link").is_symlink()


def test_a_link_to_nothing_gets_its_folder(tmp_path):
    (tmp_path / "link").symlink_to("later")
    write(tmp_path / "link")
    assert (tmp_path / "later/model").read_text() == "new"


def test_a_link_in_a_circle_is_refused(tmp_path):
    (tmp_path / "link").symlink_to("link")
    with pytest.raises(OutputError, match="leads nowhere"):
        staged(tmp_path / "link")


def test_a_run_that_finished_nothing_leaves_nothing(tmp_path):
    with pytest.raises(KeyError):
        die(tmp_path / "out", {"model": "half", JOURNAL: "", f"{STATE}/scratch": "x"})
    assert tree(tmp_path) == []


def test_leaving_without_a_commit_leaves_nothing(tmp_path):
    with staged(tmp_path / "out"):
        pass
    assert tree(tmp_path) == []


def test_the_same_run_goes_on_from_its_journal(tmp_path):
    folder = begin(tmp_path / "out")
    assert not (tmp_path / "out").exists()
    with staged(tmp_path / "out") as staging:
        assert (staging.folder / "model").read_text() == "half"
        assert (folder / JOURNAL).read_text() == "{}\n"
        staging.commit(sync=False)
    assert tree(tmp_path) == ["out", "out/model"]


def test_another_run_starts_anew(tmp_path):
    begin(tmp_path / "out", identity="a")
    with staged(tmp_path / "out", identity="b") as staging:
        assert tree(staging.folder) == [STATE, f"{STATE}/identity"]


def test_a_partial_folder_of_somebody_else_is_not_deleted(tmp_path):
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial/thesis.tex").write_text("precious")
    with pytest.raises(OutputExistsError, match=r"out\.partial is needed"):
        staged(tmp_path / "out").__enter__()
    assert tree(tmp_path) == ["out.partial", "out.partial/thesis.tex"]


def test_a_partial_folder_that_is_a_link_or_a_file_is_refused(tmp_path):
    (tmp_path / "a.partial").touch()
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "b.partial").symlink_to("elsewhere")
    for name in ("a", "b"):
        with pytest.raises(OutputError, match=r"\.partial is no folder"):
            staged(tmp_path / name).__enter__()


def test_links_in_a_stale_partial_folder_are_removed_not_followed(tmp_path):
    folder = begin(tmp_path / "out", identity="a")
    (tmp_path / "kept").mkdir()
    (tmp_path / "kept/file").touch()
    (folder / "link").symlink_to(tmp_path / "kept")
    write(tmp_path / "out", identity="b")
    assert tree(tmp_path) == ["kept", "kept/file", "out", "out/model"]


def test_something_that_appears_during_the_run_is_not_replaced(tmp_path):
    with staged(tmp_path / "out") as staging:
        (staging.folder / JOURNAL).write_text("{}\n")
        (tmp_path / "out").mkdir()
        (tmp_path / "out/other").touch()
        with pytest.raises(OutputExistsError):
            staging.commit(sync=False)
    assert tree(tmp_path / "out") == ["other"]
    assert (tmp_path / "out.partial" / JOURNAL).exists()


@pytest.mark.parametrize("step", ["sync_tree", "put_in_place"])
@pytest.mark.parametrize("error", [OSError(errno.EIO, "Input/output error"), KeyboardInterrupt()])
def test_a_commit_that_fails_can_be_gone_on_from(tmp_path, monkeypatch, step, error):
    def failing(*paths):
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(staging_module, step, failing)
        with staged(tmp_path / "out") as staging:
            (staging.folder / JOURNAL).write_text("{}\n")
            with pytest.raises((OutputError, KeyboardInterrupt)):
                staging.commit(sync=True)
    assert not (tmp_path / "out").exists()
    with staged(tmp_path / "out") as staging:
        assert (staging.folder / JOURNAL).read_text() == "{}\n"
        staging.commit(sync=False)
    assert tree(tmp_path) == ["out"]


KILLED = """
import os, signal, sys
from pathlib import Path
from merge_kit.publish import staging, swap
exchange = swap.exchange
def kill(*paths):
    os.kill(os.getpid(), signal.SIGKILL)
def exchange_and_kill(*paths):
    exchange(*paths)
    kill()
if sys.argv[2] == "before":
    staging.put_in_place = kill
else:
    swap.exchange = exchange_and_kill
with staging.stage(Path(sys.argv[1]), overwrite=True, inputs=(), identity="a") as it:
    (it.folder / "model").write_text("new")
    (it.folder / ".merge_kit/journal.jsonl").write_text("{}\\n")
    it.commit(sync=False)
"""


def kill(output, when):
    """Let a run be killed in its commit, before or after old and new are exchanged."""
    command = [sys.executable, "-c", KILLED, str(output), when]
    assert subprocess.run(command, check=False, timeout=60).returncode == -signal.SIGKILL


def test_a_kill_before_the_rename_can_be_gone_on_from(tmp_path):
    kill(tmp_path / "out", "before")
    assert not (tmp_path / "out").exists()
    with staged(tmp_path / "out") as staging:
        assert (staging.folder / JOURNAL).read_text() == "{}\n"
        staging.commit(sync=False)
    assert tree(tmp_path) == ["out", "out/model"]


def test_a_kill_after_the_exchange_does_not_mix_old_and_new(tmp_path):
    write(tmp_path / "out", name="merge_kit.json")
    kill(tmp_path / "out", "after")
    assert tree(tmp_path / "out") == ["model"]
    assert tree(tmp_path / "out.partial") == ["merge_kit.json"]
    with staged(tmp_path / "out", overwrite=True) as staging:
        assert tree(staging.folder) == [STATE, f"{STATE}/identity"]
        staging.commit(sync=False)
    assert tree(tmp_path) == ["out"]


def test_a_kill_between_two_renames_gives_the_old_output_back(tmp_path):
    (tmp_path / "out.partial.replaced").mkdir()
    (tmp_path / "out.partial.replaced/model").write_text("old")
    with pytest.raises(OutputExistsError):
        staged(tmp_path / "out").__enter__()
    assert tree(tmp_path) == ["out", "out/model"]


def test_an_old_output_that_cannot_be_deleted_is_named(tmp_path, monkeypatch):
    write(tmp_path / "out", text="old")
    remove = staging_module.remove

    def failing(path):
        if path.name.endswith(".replaced") and path.exists():
            raise PermissionError(errno.EACCES, "Permission denied")
        remove(path)

    monkeypatch.setattr(staging_module, "remove", failing)
    with pytest.raises(OutputError, match="was written, but the old one cannot be deleted"):
        write(tmp_path / "out", overwrite=True)
    assert (tmp_path / "out/model").read_text() == "new"


def test_an_error_of_the_run_is_not_hidden_by_one_of_tidying_up(tmp_path, monkeypatch):
    def failing(path):
        raise OSError(errno.EIO, "Input/output error")

    staging, cause = staged(tmp_path / "out").__enter__(), KeyError()
    monkeypatch.setattr(staging_module, "remove", failing)
    staging.__exit__(KeyError, cause, None)
    assert "Input/output error" in cause.__notes__[0]


SECOND = """
import sys
from pathlib import Path
from merge_kit.publish.staging import stage
with stage(Path(sys.argv[1]), overwrite=True, inputs=(), identity="b") as staging:
    (staging.folder / "model").touch()
    print("in", flush=True)
    sys.stdin.read()
    staging.commit(sync=False)
"""


def test_two_runs_on_one_output_do_not_meet(tmp_path):
    command = [sys.executable, "-c", SECOND, str(tmp_path / "out")]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as other:
        assert other.stdout.readline() == "in\n"
        with pytest.raises(LockedError, match=f"is locked by process {other.pid}") as caught:
            staged(tmp_path / "out").__enter__()
        assert caught.value.code() == 4
        assert (tmp_path / "out.partial/model").exists()
        other.stdin.close()
        assert other.wait(timeout=30) == 0
    assert tree(tmp_path) == ["out", "out/model"]


def test_a_lock_of_a_killed_run_does_not_hold(tmp_path):
    command = [sys.executable, "-c", SECOND, str(tmp_path / "out")]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as other:
        other.stdout.readline()
        other.kill()
    assert (tmp_path / "out.partial.lock").exists()
    write(tmp_path / "out")
    assert tree(tmp_path) == ["out", "out/model"]


def test_a_lock_file_that_its_owner_removed_is_not_taken_for_one(tmp_path, monkeypatch):
    lock = tmp_path / "out.partial.lock"
    flock, calls = staging_module.Lock.__enter__.__globals__["fcntl"].flock, []

    def removing(descriptor, operation):
        if not calls:
            lock.unlink()  # as if another run had ended just now
        calls.append(descriptor)
        return flock(descriptor, operation)

    monkeypatch.setattr("merge_kit.publish.lock.fcntl.flock", removing)
    with staged(tmp_path / "out"), pytest.raises(LockedError):
        staged(tmp_path / "out").__enter__()
    assert len(calls) == 3


def test_modes_are_those_of_the_umask(tmp_path):
    before = os.umask(0o027)
    try:
        write(tmp_path / "x/out")
    finally:
        os.umask(before)
    modes = {
        name: stat.S_IMODE((tmp_path / name).stat().st_mode)
        for name in ("x", "x/out", "x/out/model")
    }
    assert modes == {"x": 0o750, "x/out": 0o750, "x/out/model": 0o640}


def test_sync_waits_for_every_file_and_every_name(tmp_path, monkeypatch):
    synced = set()
    monkeypatch.setattr(
        os, "fsync", lambda fd: synced.add(str(Path(f"/proc/self/fd/{fd}").readlink()))
    )
    with staged(tmp_path / "x/out") as staging:
        (staging.folder / "unet").mkdir()
        for name in ("model", "unet/model"):
            (staging.folder / name).touch()
        staging.commit(sync=True)
    partial = ("", "/model", "/unet", "/unet/model")
    expected = {f"{tmp_path}/x/out.partial{name}" for name in partial}
    assert synced == expected | {f"{tmp_path}/x", str(tmp_path)}
