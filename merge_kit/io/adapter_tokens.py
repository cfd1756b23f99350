"""Rows of embeddings that an adapter holds for some tokens, in place of the base's."""

from __future__ import annotations

from collections.abc import Mapping

from merge_kit.core.tensors import StoredTensor
from merge_kit.errors import CheckpointError
from merge_kit.io.adapter_bytes import same_bytes
from merge_kit.io.adapter_settings import Settings
from merge_kit.io.adapter_values import TokenRows
from merge_kit.io.strict_json import shown

_KEY = "trainable_token_indices"
_FETCH = "config and weights are of two adapters: fetch both again"


def token_rows(
    tokens: Mapping[str, StoredTensor], settings: Settings | None, where: str
) -> tuple[TokenRows, ...]:
    """Return the rows that an adapter holds, with the tokens that they are of.

    Args:
        tokens: By the path of the embedding.

    Raises:
        CheckpointError: If rows and `trainable_token_indices` do not fit.
    """
    known = settings.tokens if settings is not None else {}
    rows, used = [], set()
    for module, tensor in tokens.items():
        end = next((end for end in known if module.endswith(end)), None)
        if end is None:
            problem = f"rows of {shown(module)} are there, and {_KEY} name no tokens for them"
            raise CheckpointError(problem, where=where, hint=_FETCH)
        _check_count(tensor, known[end], where)
        _check_tokens(module, known[end], where)
        used.add(end)
        rows.append(TokenRows(module, known[end], tensor))
    _check_one_embedding(rows, known, where)
    _check_all_there(rows, {end: known[end] for end in known if end not in used}, where)
    return tuple(rows)


def _check_count(tensor: StoredTensor, tokens: tuple[int, ...], where: str) -> None:
    shape = tensor.spec.shape
    if len(shape) != 2 or shape[0] != len(tokens):
        problem = f"tensor {shown(tensor.spec.name)} has shape {list(shape)}, and {_KEY} name "
        raise CheckpointError(f"{problem}{len(tokens)} tokens", where=where, hint=_FETCH)


def _check_tokens(module: str, tokens: tuple[int, ...], where: str) -> None:
    if len(set(tokens)) < len(tokens) or min(tokens, default=0) < 0:
        problem = f"{_KEY} for {shown(module)} are {shown(list(tokens))}, expected tokens from 0"
        raise CheckpointError(f"{problem}, each once", where=where, hint=_FETCH)


def _check_one_embedding(
    rows: list[TokenRows], known: Mapping[str, tuple[int, ...]], where: str
) -> None:
    """Without a name, the tokens are those of the input embedding, and of a head tied to it."""
    if "" in known and not all(same_bytes(row.stored, rows[0].stored) for row in rows):
        named = " and ".join(shown(row.module) for row in rows[:2])
        problem = f"rows of {named} differ, and {_KEY} do not say whose tokens they name"
        raise CheckpointError(problem, where=where, hint=_FETCH)


def _check_all_there(
    rows: list[TokenRows], absent: Mapping[str, tuple[int, ...]], where: str
) -> None:
    """Only the head of a tied model may be absent: it has the rows of its embedding."""
    held = {row.tokens for row in rows}
    for end, tokens in absent.items():
        if tokens not in held:
            problem = f"{_KEY} name rows of {shown(end or 'the embedding')}, which the file lacks"
            raise CheckpointError(problem, where=where, hint=_FETCH)
