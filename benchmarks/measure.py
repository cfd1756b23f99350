"""Whole processes, measured from outside; and the machine that they ran on.

A child's peak memory is never less than that of the process that starts it, so programs that
measure import nothing large.
"""

from __future__ import annotations

import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path


@dataclass(frozen=True, slots=True)
class Finished:
    """A process that has ended well.

    Attributes:
        seconds: Wall time from start to end, the interpreter's start included.
        peak_bytes: Largest resident memory, as the kernel counted it.
        output: What it wrote to stdout.
    """

    seconds: float
    peak_bytes: int
    output: str


def finish(command: Sequence[str | Path], env: Mapping[str, str] | None = None) -> Finished:
    """Run a command to its end and return what it took.

    Settings of OpenBLAS are not passed on: some machines carry old ones, which slow numpy.

    Raises:
        SystemExit: If it fails, with the end of what it wrote to stderr.
    """
    arguments = [str(word) for word in command]
    kept = {key: value for key, value in os.environ.items() if not key.startswith("OPENBLAS_")}
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as errors:
        start = time.perf_counter()
        child = subprocess.Popen(arguments, stdout=out, stderr=errors, env={**kept, **(env or {})})
        _, status, usage = os.wait4(child.pid, 0)
        seconds = time.perf_counter() - start
        child.returncode = os.waitstatus_to_exitcode(status)
        out.seek(0)
        errors.seek(0)
        if child.returncode:
            tail = errors.read()[-2000:]
            sys.exit(f"{' '.join(arguments)}\nended with {child.returncode}:\n{tail}")
        unit = 1 if sys.platform == "darwin" else 1024
        return Finished(seconds, usage.ru_maxrss * unit, out.read())


def program(option: Path | None, name: str = "mergekit") -> Path:
    """Return a program of this interpreter's environment, or the one that was asked for."""
    path = option or Path(sys.executable).parent / name
    if not path.exists():
        sys.exit(f"{path} does not exist: install the package, or name the program")
    return path


def machine() -> str:
    """Return processor, cores, memory, Python and torch, in one line."""
    pages = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return (
        f"{_processor()}, {os.cpu_count()} cores, {pages / 2**30:.0f} GiB, "
        f"Python {platform.python_version()}, torch {version('torch')}"
    )


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def commit() -> str:
    """Return the commit of this checkout, with a `+` if there are uncommitted changes."""
    folder = Path(__file__).parent

    def git(*words: str) -> str:
        return subprocess.run(
            ["git", "-C", folder, *words], capture_output=True, text=True, check=True
        ).stdout.strip()

    changed = git("status", "--porcelain", "--untracked-files=no", "--", "../merge_kit")
    return git("rev-parse", "--short=10", "HEAD") + ("+" if changed else "")


def record(title: str, command: str, table: str) -> None:
    """Append a run to RESULTS.md."""
    entry = (
        f"\n## {title}\n\n- machine: {machine()}, load {os.getloadavg()[0]:.1f} at the end\n"
        f"- commit: {commit()}\n"
        f"- date: {time.strftime('%Y-%m-%d')}\n- command: `{command}`\n\n{table}\n"
    )
    with (Path(__file__).parent / "RESULTS.md").open("a", encoding="utf-8") as file:
        file.write(entry)


def command_line(script: str, **places: Path | None) -> str:
    """Return the command of this process, with names in place of the paths of this machine."""
    line = " ".join([f"python benchmarks/{script}", *sys.argv[1:]])
    for name, path in sorted(places.items(), key=lambda place: -len(str(place[1]))):
        line = line.replace(str(path), name) if path else line
    return line


def markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a table, its columns padded to read well as plain text too."""
    widths = [max(len(row[i]) for row in [head, *rows]) for i in range(len(head))]

    def line(cells: Sequence[str]) -> str:
        padded = (c.ljust(w) for c, w in zip(cells, widths, strict=True))
        return f"| {' | '.join(padded)} |"

    rule = f"|{'|'.join('-' * (w + 2) for w in widths)}|"
    return "\n".join([line(head), rule, *(line(row) for row in rows)])
