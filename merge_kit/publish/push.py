"""Sends a finished merge to the Hub."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from merge_kit.errors import CheckpointError, HubError
from merge_kit.publish.side_files import file_list
from merge_kit.publish.staging import STATE

TIMEOUT_SECONDS = 120.0
"""Longest silence of the Hub; its client would wait for ever."""

_AGAIN = "push again: what has arrived is not sent twice"
_HINTS = {
    400: "does the model card have valid metadata, and do all files have valid names?",
    401: "log in with `hf auth login`, or pass a token that may write",
    403: "does the token have the permission to write to this repository?",
    404: "are repository and revision there, and may the token see them?",
    412: "the repository has changed meanwhile; push again",
    413: "set a smaller shard_size",
    429: "wait a while and push again",
}


def push(
    folder: str | os.PathLike[str],
    repo_id: str,
    *,
    private: bool = False,
    revision: str | None = None,
    create_pr: bool = False,
    message: str | None = None,
    token: str | None = None,
) -> str:
    """Send a folder to the Hub in one commit, and return where it can be seen.

    Sent are regular files, no links, and nothing hidden. What the repository holds already is not
    sent again; other files of it stay.

    Args:
        folder: The output of a merge.
        repo_id: "user/name" or "organization/name"; it is created if it is not there.
        private: Make a new repository private, else what is usual for the account.
        revision: Branch that is committed to, which must be there; default: main.
        create_pr: Open a pull request instead.
        message: First line of the commit.
        token: Default: HF_TOKEN, or the one that `hf auth login` stored.

    Returns:
        The page of the repository, at its revision, or of the pull request.

    Raises:
        CheckpointError: If the folder cannot be read, or is no finished merge.
        HubError: If the Hub refuses, or cannot be reached; the folder stays as it is.
    """
    folder = Path(folder)
    names = _names(folder)
    import huggingface_hub as hub  # noqa: PLC0415  (slow to load)

    with _failures(repo_id, token or hub.get_token()), _patience(hub.get_session()):
        api = hub.HfApi(endpoint=os.environ.get("HF_ENDPOINT"), token=token)
        page = str(api.create_repo(repo_id, private=private or None, exist_ok=True))
        done = api.create_commit(
            repo_id,
            [hub.CommitOperationAdd(name, str(folder / name)) for name in names],
            commit_message=message or f"Upload {folder.resolve().name}",
            revision=revision,
            create_pr=create_pr,
        )
    if done.pr_url is not None:
        return done.pr_url
    return f"{page}/tree/{revision}" if revision is not None else page


def _names(folder: Path) -> list[str]:
    """Return the files to send."""
    if (folder / STATE).exists():
        problem = "is an unfinished merge"
        raise CheckpointError(problem, where=str(folder), hint="run the merge again to finish it")
    names = file_list(folder)
    if not names:
        problem = "holds no files, expected a merged model"
        raise CheckpointError(problem, where=str(folder), hint="is it the right folder?")
    return names


@contextmanager
def _patience(client: Any) -> Iterator[None]:
    """Let the Hub's client give up after a while, unless it is set up to do so already."""
    before = client.timeout
    if before.read is None:
        client.timeout = TIMEOUT_SECONDS
    try:
        yield
    finally:
        client.timeout = before


@contextmanager
def _failures(repo_id: str, token: str | None) -> Iterator[None]:
    """Turn whatever the Hub's client raises into a HubError of one line, without the token."""
    try:
        yield
    except Exception as exc:  # noqa: BLE001  (errors of the client, its HTTP library, the system)
        status, problem = _explained(exc)
        error = HubError(_hidden(problem, token), where=repo_id, hint=_hint(status, exc))
        is_safe = token is None or not any(token in str(cause) for cause in _causes(exc))
        raise error from (exc if is_safe else None)


def _causes(exc: BaseException) -> Iterator[BaseException]:
    """Yield an error and what caused it, outermost first."""
    found: BaseException | None = exc
    while found is not None:
        yield found
        found = found.__cause__ or found.__context__


def _explained(exc: BaseException) -> tuple[int | None, str]:
    """Return the status that the Hub answered with, if it did, and the problem in one line."""
    for cause in _causes(exc):
        response = getattr(cause, "response", None)
        status = getattr(response, "status_code", None)
        if isinstance(status, int):
            said = getattr(cause, "server_message", None) or getattr(response, "reason_phrase", "")
            return status, f"the Hub answered {status}: {_line(str(said)) or 'nothing more'}"
    if any("Timeout" in type(cause).__name__ for cause in _causes(exc)):
        return None, "the Hub did not answer in time"
    innermost = list(_causes(exc))[-1] if isinstance(exc, RuntimeError) else exc
    text = _line(str(innermost)) or type(innermost).__name__
    return None, f"cannot push: {text}"


def _line(text: str) -> str:
    """Return the first line that says something, not too long."""
    lines = (" ".join(line.split()) for line in text.splitlines())
    return next((line for line in lines if line), "")[:300]


def _hidden(text: str, token: str | None) -> str:
    return text.replace(token, "<token>") if token else text


def _hint(status: int | None, exc: BaseException) -> str:
    if status is None and isinstance(exc, ValueError):
        return "name the repository as user/name"
    if status is None:
        return f"check the connection and {_AGAIN}"
    return _HINTS.get(status, _AGAIN)
