"""Finds bases of hidden states: of embeddings, or of a file; in float64."""

from __future__ import annotations

import threading
from collections.abc import Mapping

import torch
from torch import Tensor

from merge_kit.core.tensors import BLOCK
from merge_kit.engine.operands import Operands
from merge_kit.engine.workspace import Workspace
from merge_kit.errors import InterruptedRun, NonFiniteError, SolveError
from merge_kit.plan.building.width_basis import EmbeddingBasis, GivenBasis

_ROWS = 8 * BLOCK
"""Elements of embeddings whose products are added at once."""

_LEAST = 1e-6
"""Ratio of singular values at which a basis has lost a direction."""


def embedding_basis(
    task: EmbeddingBasis, operands: Operands, stop: threading.Event
) -> Mapping[str, Tensor]:
    """Return P: eigenvectors of the Gram matrix of the columns, as rows.

    Raises:
        NonFiniteError: If embeddings are not finite.
        SolveError: If there is no decomposition.
    """
    gram = _gram(task, operands, stop)
    if not bool(torch.isfinite(gram).all()):
        problem = "holds NaN or infinity: there is no basis of it"
        raise NonFiniteError(problem, where=task.name, hint="repair the model, or give a matrix")
    try:
        _, vectors = torch.linalg.eigh(gram)
    except torch.linalg.LinAlgError as exc:  # type: ignore[attr-defined]
        problem = "its Gram matrix has no eigenvectors that could be found"
        raise SolveError(problem, where=task.name, hint="give a matrix as the basis") from exc
    onto = vectors.T.flip(0)[: task.rows]  # by falling eigenvalues
    largest = onto.abs().argmax(dim=1, keepdim=True)
    return {"onto": onto * torch.sign(onto.gather(1, largest))}


def _gram(task: EmbeddingBasis, operands: Operands, stop: threading.Event) -> Tensor:
    """Return E^T E, added block of rows by block of rows."""
    count, width = task.embedding.shape
    gram, work = torch.zeros(width, width, dtype=torch.float64), Workspace()
    tall = max(1, _ROWS // width)
    rows = torch.empty(min(tall, count), width, dtype=torch.float64)
    for low in range(0, count, tall):
        if stop.is_set():
            raise InterruptedRun(2, hint="run the same command again to go on from here")
        some = rows[: min(tall, count - low)]
        operands.read(task.embedding, low * width, (low + len(some)) * width, some.view(-1), work)
        gram.addmm_(some.T, some)
    return gram


def given_basis(
    task: GivenBasis, operands: Operands, stop: threading.Event
) -> Mapping[str, Tensor]:
    """Return P as it is given, and its pseudo-inverse.

    Raises:
        NonFiniteError: If it is not finite.
        SolveError: If it has not full rank.
    """
    del stop
    onto = operands.whole(task.matrix, torch.float64, Workspace())
    hint = "make its rows, or its columns if it has more rows, orthonormal (a QR does)"
    if not bool(torch.isfinite(onto).all()):
        raise NonFiniteError("the basis holds NaN or infinity", where=task.name, hint=hint)
    try:
        left, values, right = torch.linalg.svd(onto, full_matrices=False)
    except torch.linalg.LinAlgError as exc:  # type: ignore[attr-defined]
        problem = "the basis has no decomposition that could be found"
        raise SolveError(problem, where=task.name, hint=hint) from exc
    rank = int((values > _LEAST * values[0]).sum())
    if rank < len(values):
        problem = f"the basis has rank {rank}, expected {len(values)}"
        raise SolveError(problem, where=task.name, hint=hint)
    return {"onto": onto, "back": (right.T / values) @ left.T}
