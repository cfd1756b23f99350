"""Prompts as tokens, by the tokenizer beside a model: transformers reads it, and says nothing."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from merge_kit.errors import CheckpointError, MergeKitError, PlanError
from merge_kit.plan.building.routers_tasks import PromptSet, Question, most_tokens

Tokens = tuple[int, ...]


@contextmanager
def transformers_of(label: str, what: str) -> Iterator[Any]:
    """Lend transformers, silent; what it raises becomes an error about a model.

    Args:
        label: The model.
        what: What it is used for, as in "read the tokenizer".

    Raises:
        MergeKitError: Whatever goes wrong inside.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            import transformers  # noqa: PLC0415  (an extra, which takes seconds to import)

            with _silent(transformers):
                yield transformers
    except ImportError as exc:
        problem = f"transformers cannot {what}: {_first_line(exc)}"
        hint = 'pip install "transformers>=5" sentencepiece protobuf'
        raise CheckpointError(problem, where=label, hint=hint) from exc
    except (MergeKitError, MemoryError):
        raise
    except Exception as exc:
        problem = f"transformers cannot {what}: {_first_line(exc)}"
        hint = "does it load in transformers, without code of its own? or take router: random"
        raise CheckpointError(problem, where=label, hint=hint) from exc


@contextmanager
def _silent(transformers: Any) -> Iterator[None]:
    """Keep its log and its progress bars from the screen, and leave its settings as they were."""
    settings = transformers.utils.logging
    level, bars = settings.get_verbosity(), settings.is_progress_bar_enabled()
    settings.set_verbosity(logging.CRITICAL + 1)
    settings.disable_progress_bar()
    try:
        yield
    finally:
        settings.set_verbosity(level)
        if bars:
            settings.enable_progress_bar()


def tokenised(question: Question) -> Mapping[str, Tokens]:
    """Return the tokens of each prompt, by its text: those of the text after the sign of a start.

    Raises:
        MergeKitError: If the tokenizer cannot be read, or does not fit the model.
    """
    with transformers_of(question.label, "read the tokenizer") as transformers:
        tokenizer = transformers.AutoTokenizer.from_pretrained(
            str(question.folder), local_files_only=True, trust_remote_code=False
        )
        start = tokenizer.bos_token or ""
        found = {}
        for one in question.sets:
            for text in one.texts:
                ids = tokenizer(start + text, add_special_tokens=False)["input_ids"]
                found[text] = tuple(int(token) for token in ids)
    for one in question.sets:
        _check(question, one, found)
    return found


def _check(question: Question, one: PromptSet, found: Mapping[str, Tokens]) -> None:
    rows = question.embedding.shape[0]
    for text in one.texts:
        tokens = found[text]
        if not tokens:
            raise PlanError(
                f"a prompt of {one.expert} has no tokens: {_shown(text)}",
                where=question.label,
                hint="write some words",
            )
        if len(tokens) > most_tokens(text):
            raise PlanError(
                f"a prompt of {one.expert} has more tokens than bytes: {_shown(text)}",
                where=question.label,
                hint="write it in plain letters",
            )
        if max(tokens) >= rows or min(tokens) < 0:
            raise CheckpointError(
                f"the tokenizer gives token {max(tokens)} for {_shown(text)}, and the embedding "
                f"has {rows} rows",
                where=question.label,
                hint="are the tokenizer's files those of this model?",
            )


def _shown(text: str) -> str:
    return repr(text if len(text) <= 40 else text[:39] + "…")


def _first_line(exc: BaseException) -> str:
    line = (str(exc).strip() or type(exc).__name__).splitlines()[0]
    return line if len(line) <= 200 else line[:199] + "…"
