"""Runs a command line to its exit code; nothing but a defect gets past it."""

from __future__ import annotations

import os
import signal
import sys
import traceback
from collections.abc import Sequence

import click

from merge_kit.cli.commands import app
from merge_kit.cli.failures import message, system_error
from merge_kit.errors import MergeKitError

TRACEBACK = "MERGE_KIT_TRACEBACK"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code.

    Args:
        arguments: The words after the program's name; those of the process if None.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    try:
        return _run(words)
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
            app.invoke(context)
        _flush()
    except click.exceptions.Exit as exc:
        _flush()
        return exc.exit_code
    except click.ClickException as exc:
        exc.show()
        return exc.exit_code
    return 0


def _flush() -> None:
    print(end="", flush=True)  # unlike sys.stdout.flush, works where there is no standard output


def _fail(exc: Exception) -> int:
    """Print what went wrong and return the exit code."""
    known = exc if isinstance(exc, MergeKitError) else system_error(exc)
    if known is not None:
        print(message(known), file=sys.stderr)
        return known.code()
    if os.environ.get(TRACEBACK) == "1":
        traceback.print_exception(exc)
    print(f"error: unexpected {type(exc).__name__}: {exc}", file=sys.stderr)
    hint = f"this is a defect: please report it with the output under {TRACEBACK}=1"
    print(f"  hint: {hint}", file=sys.stderr)
    return 1
