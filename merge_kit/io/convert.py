"""Pickled checkpoints as safetensors: a child process opens the pickles, this one never does."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from merge_kit.errors import CheckpointError, OutputError, OutputExistsError
from merge_kit.io.checkpoint import open_checkpoint
from merge_kit.io.pickled import Pickled, find_pickled

# Isolated (-I): no variable of the environment and no file of the working directory decides what
# the child imports; the package is found where this one lies.
_BOOTSTRAP = (
    "import sys; root = sys.argv[1]; root in sys.path or sys.path.insert(0, root); "
    "from merge_kit.io.convert_child import main; main()"
)
_PASSED_ON = ("PATH", "HOME", "TMPDIR", "LANG", "LC_ALL", "LD_LIBRARY_PATH")
_PUBLISHED_HINT = "use a checkpoint that was saved as safetensors, or save it again from its code"


@dataclass(frozen=True, slots=True)
class Conversion:
    """What was converted.

    Attributes:
        output: The new folder.
        tensors: Tensors written.
        notes: What the user should know, one sentence each.
    """

    output: Path
    tensors: int
    notes: tuple[str, ...]


def convert_pickled(source: Path, output: Path, shard_size_bytes: int) -> Conversion:
    """Write a pickled checkpoint as a folder of safetensors, with its config and tokenizer files.

    The child loads with torch's restricted unpickler, which runs no code of the file, one file at
    a time. The output appears whole or not at all.

    Args:
        source: A pickled file, or a folder with some.
        output: The folder to make.
        shard_size_bytes: Most bytes of tensors in one file, unless one tensor is larger.

    Raises:
        OutputExistsError: If the output is there, or inside the source.
        CheckpointError: If the source is missing, incomplete, broken, or needs code to be opened.
        OutputError: If the output cannot be written.
    """
    _check_output(source, output)
    pickled = find_pickled(source)
    partial = output.parent / f".{output.name}.converting-{os.getpid()}"
    try:
        partial.mkdir(parents=True)
        answer = _run_child(pickled, source, partial, shard_size_bytes)
        for name, path in pickled.copied.items():
            (partial / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, partial / name)
        open_checkpoint(partial)  # what was written is held to what every input is
        _rename(partial, output)
    except OSError as exc:
        problem = f"cannot write: {exc.strerror}"
        raise OutputError(problem, where=str(output), hint="check space and permissions") from exc
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return Conversion(output, answer["tensors"], tuple(answer["notes"]))


def _check_output(source: Path, output: Path) -> None:
    hint = "name another folder with -o"
    if os.path.lexists(output):
        raise OutputExistsError("is there already", where=str(output), hint=hint)
    if Path(os.path.realpath(output)).is_relative_to(os.path.realpath(source)):
        raise OutputExistsError(f"lies inside the input {source}", where=str(output), hint=hint)


def _rename(partial: Path, output: Path) -> None:
    if os.path.lexists(output):  # it appeared meanwhile; an empty folder would be replaced silently
        raise OutputExistsError("is there already", where=str(output), hint="remove it")
    partial.rename(output)
    folder = os.open(output.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def _run_child(
    pickled: Pickled, source: Path, partial: Path, shard_size_bytes: int
) -> dict[str, Any]:
    job = {
        "parts": [asdict(part) for part in pickled.parts],
        "output": str(partial),
        "shard_size_bytes": shard_size_bytes,
    }
    root = str(Path(__file__).parents[2])
    done = subprocess.run(  # noqa: S603  (our own interpreter, and a list of arguments)
        [sys.executable, "-I", "-c", _BOOTSTRAP, root],
        input=json.dumps(job, default=str),
        capture_output=True,
        text=True,
        check=False,
        env={name: os.environ[name] for name in _PASSED_ON if name in os.environ},
    )
    if done.returncode != 0:
        raise _crashed(done, source)
    answer: dict[str, Any] = json.loads(done.stdout)
    if "problem" in answer:
        raise _reported(answer)
    return answer


def _crashed(done: subprocess.CompletedProcess[str], source: Path) -> CheckpointError:
    last = done.stderr.strip().rpartition("\n")[2][:300]
    if done.returncode < 0:
        problem = f"cannot be converted: signal {-done.returncode} ended the process that read it"
        hint = "signal 9 mostly means that memory ran out; otherwise the file is damaged"
        return CheckpointError(problem, where=str(source), hint=hint)
    problem = f"cannot be converted: {last}"
    return CheckpointError(problem, where=str(source), hint=_PUBLISHED_HINT)


def _reported(answer: dict[str, Any]) -> CheckpointError | OutputError:
    if answer["is_output"]:
        hint = "free some space or choose another folder, and run again"
        return OutputError(answer["problem"], where=answer["where"], hint=hint)
    hint = answer["hint"] or _PUBLISHED_HINT
    return CheckpointError(answer["problem"], where=answer["where"], hint=hint)
