"""Runs a command line to its exit code; nothing but a defect gets past it."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

import click

from merge_kit.cli.commands import app
from merge_kit.cli.failures import message, system_error
from merge_kit.cli.streams import complain, prepare_streams
from merge_kit.errors import MergeKitError, OutputError

TRACEBACK = "MERGE_KIT_TRACEBACK"


def program() -> NoReturn:
    """Be the program `mergekit`: run the words of the process, and end it.

    At once: taking torch apart module by module takes a third of a second, all files are closed,
    and a standard stream that takes no more must not change the exit code.
    """
    code = main()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError, AttributeError):  # closed, or never there
            stream.flush()
    os._exit(code)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code.

    Args:
        arguments: The words after the program's name; those of the process if None.
    """
    if arguments is not None:
        return _main(arguments)
    code = _main(sys.argv[1:])
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # all is done, and what ends the process is quick
    return code


def _main(words: Sequence[str]) -> int:
    prepare_streams()
    try:
        return _run(list(words))
    except BrokenPipeError:  # the reader of our output went away: `mergekit plan x | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    except Exception as exc:  # noqa: BLE001  (the one place where a defect becomes a message)
        return _fail(exc)


def _run(words: list[str]) -> int:
    try:
        with app.make_context("mergekit", words) as context:
            _refuse_lost_directory()
            app.invoke(context)
        _flush()
    except click.exceptions.Exit as exc:
        _flush()
        return exc.exit_code
    except click.ClickException as exc:
        exc.show()
        return exc.exit_code
    return 0


def _refuse_lost_directory() -> None:
    """Refuse to work in a directory that was deleted: libraries end the process there."""
    try:
        Path.cwd()
    except OSError as exc:
        problem = f"the working directory cannot be found: {exc.strerror}"
        raise OutputError(problem, hint="go to a folder that is there, and run again") from exc


def _flush() -> None:
    print(end="", flush=True)  # unlike sys.stdout.flush, works where there is no standard output


def _fail(exc: Exception) -> int:
    """Print what went wrong and return the exit code."""
    known = exc if isinstance(exc, MergeKitError) else system_error(exc)
    if known is not None:
        complain(message(known))
        return known.code()
    if os.environ.get(TRACEBACK) == "1":
        complain("".join(traceback.format_exception(exc)))
    hint = f"this is a defect: please report it with the output under {TRACEBACK}=1"
    complain(f"error: unexpected {type(exc).__name__}: {exc}\n  hint: {hint}")
    return 1
