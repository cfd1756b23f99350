"""Closed streams, full disks, small limits, few threads: a result or an error in words."""

from __future__ import annotations

import errno
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import threading
from functools import partial
from pathlib import Path

import pytest
from bench_of_faults import RECIPE, ROOT, Bench

from merge_kit.cli import main


@pytest.fixture
def bench(tmp_path, monkeypatch, capsys) -> Bench:
    monkeypatch.chdir(tmp_path)
    return Bench(tmp_path, capsys)


# surroundings ------------------------------------------------------------------------------------


def closed(*descriptors):
    def before():
        for descriptor in descriptors:
            os.close(descriptor)

    return before


@pytest.mark.parametrize("descriptors", [(2,), (0, 1, 2)])
def test_a_run_without_standard_streams_ends_well(bench, descriptors):
    words = ("run", "recipe.yaml", "-o", "out")
    done = bench.child(*words, before=closed(*descriptors))
    assert (done.code, done.err) == (0, "")
    assert bench.left() == {"out"}
    assert bench.do("verify", "out").code == 0


def test_where_nobody_can_read_the_message_the_code_remains(bench):
    with Path("/dev/full").open("w") as full:
        process = bench.start("run", "nowhere.yaml", stderr=full)
        process.communicate(timeout=60)
    assert process.returncode == 2


def test_a_file_of_the_run_never_gets_the_number_of_a_closed_stream():
    code = "from merge_kit.cli.streams import prepare_streams as p; p()\nimport sys\n"
    code += "sys.exit(open(sys.executable, 'rb').fileno())"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    words = [sys.executable, "-c", code]
    done = subprocess.run(words, env=environment, preexec_fn=closed(0, 1, 2), check=False)
    assert done.returncode >= 3


def test_characters_that_an_output_lacks_are_escaped(bench):
    (bench / "b").rename(bench / "bé")
    bench.recipe(RECIPE.replace("model: b", "model: bé"))
    ascii_only = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONIOENCODING": "ascii"}
    done = bench.child("plan", "recipe.yaml", env=ascii_only)
    assert (done.code, "input-2: b\\xe9" in done.out) == (0, True), done.err
    done = bench.child("plan", "recipe.yaml", "--json", env=ascii_only)
    assert [model["name"] for model in json.loads(done.out)["inputs"]] == ["a", "bé"]


def test_a_recipe_may_come_from_a_pipe(bench):
    with bench.start("run", "/dev/stdin", "-o", "out", stdin=subprocess.PIPE) as process:
        _, err = process.communicate(RECIPE)
    assert (process.returncode, err) == (0, "")
    with bench.start("run", "/dev/stdin", stdin=subprocess.PIPE) as process:
        _, err = process.communicate(RECIPE)
    assert (process.returncode, "with -o" in err) == (2, True)


def test_a_deleted_working_directory_is_said_to_be_deleted(bench, monkeypatch):
    (bench / "gone").mkdir()
    monkeypatch.chdir(bench / "gone")
    (bench / "gone").rmdir()
    bench.do("run", "../recipe.yaml").refuses(4, "the working directory cannot be found")


def test_a_signal_after_the_work_is_done_does_not_end_in_a_traceback(bench, monkeypatch):
    before = signal.getsignal(signal.SIGINT)
    monkeypatch.setattr(sys, "argv", ["mergekit", "plan", "recipe.yaml"])
    try:
        assert main() == 0
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize("most", [0, 100, 1300])
def test_a_limit_of_file_sizes_leaves_nothing(bench, most):
    words = ("run", "recipe.yaml", "-o", "out")
    limit = partial(resource.setrlimit, resource.RLIMIT_FSIZE, (most, most))
    bench.child(*words, before=limit).refuses(4, "cannot write: File too large")
    assert bench.left() == (set() if most < 1000 else {"out.partial"})  # the weights did fit


FULL = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def failing(times):
    """Return a function of the system that fails from its n-th call on, and counts the calls."""

    def make(real):
        def function(*args):
            function.calls += 1
            if function.calls > times:
                raise FULL
            return real(*args)

        function.calls = 0
        return function

    return make


@pytest.mark.parametrize("name", ["posix_fallocate", "pwrite", "mkdir", "rename", "ftruncate"])
def test_a_disk_that_fills_up_leaves_nothing_that_looks_like_an_output(bench, monkeypatch, name):
    real = getattr(os, name)
    for times in range(40):
        with monkeypatch.context() as patch:
            full = failing(times)(real)
            patch.setattr(os, name, full)
            done = bench.run("--threads", "1")
        if done.code == 0:
            assert bench.left() == {"out"}
            if full.calls <= times:
                return
            shutil.rmtree(bench / "out")
        else:
            done.refuses(4, "No space left on device")
            assert bench.left() <= {"out.partial", "out.partial.state"}
    pytest.fail(f"{name} is called more than 40 times")


@pytest.mark.parametrize("limit", [20])
def test_a_few_open_files_are_enough(bench, limit):
    limits = partial(resource.setrlimit, resource.RLIMIT_NOFILE, (limit, limit))
    done = bench.child("run", "recipe.yaml", "-o", "out", "--shard-size", "100", before=limits)
    assert done.code == 0, done.err


def test_too_few_open_files_are_an_error_in_words(bench):
    limits = partial(resource.setrlimit, resource.RLIMIT_NOFILE, (12, 12))
    words = ("run", "recipe.yaml", "-o", "out", "--shard-size", "1", "--threads", "1")
    bench.child(*words, before=limits).refuses(4, "Too many open files", "ulimit -n")
    assert bench.left() <= {"out.partial"}


# threads -----------------------------------------------------------------------------------------


def start_at_most(monkeypatch, count):
    """Let the system start so many threads, and no more."""
    start, started = threading.Thread.start, []

    def limited(thread):
        if len(started) >= count:
            raise RuntimeError("can't start new thread")
        started.append(thread)
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", limited)


def test_a_run_makes_do_with_fewer_threads_than_asked_for(bench, monkeypatch):
    start_at_most(monkeypatch, 1)
    assert set(bench.merged("--threads", "4")["model.norm.weight"].tolist()) == {2.0}


def test_a_system_that_starts_no_thread_is_an_error_in_words(bench, monkeypatch):
    start_at_most(monkeypatch, 0)
    bench.refused(4, "starts no more threads", "ulimit -u")
