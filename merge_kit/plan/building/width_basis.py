"""Bases of hidden states: what is found before the run, and how projections read it."""

from __future__ import annotations

from dataclasses import dataclass

from merge_kit.architecture.ties import embedding_for
from merge_kit.core.dtypes import is_float
from merge_kit.core.tensors import nbytes
from merge_kit.errors import CheckpointError, MismatchError, PlanError
from merge_kit.plan.building.built import Site
from merge_kit.plan.models import Held, Model
from merge_kit.plan.sources import Found, Source, Transposed, elements
from merge_kit.plan.values import Artefact
from merge_kit.recipe.values import Mark

_SHOWN = 5

_SOLVER_BYTES = 10_000_000
"""What products and decompositions keep for themselves when a basis is found."""


@dataclass(frozen=True, slots=True)
class EmbeddingBasis:
    """The right singular vectors of a matrix, by falling singular values.

    Attributes:
        rows: How many, at most as many as the matrix has columns.
        name: Of the matrix, for messages.
    """

    embedding: Source
    rows: int
    name: str


@dataclass(frozen=True, slots=True)
class GivenBasis:
    """A matrix of a file, with its pseudo-inverse."""

    matrix: Source
    name: str


@dataclass(frozen=True, slots=True)
class Basis:
    """A basis as factors.

    Attributes:
        onto: P, (H', H), or (H, H) where further directions are zeros.
        back: Its pseudo-inverse.
    """

    onto: Source
    back: Source
    artefact: Artefact


def svd_basis(site: Site, model: Model, hidden: int) -> Basis:
    """Return the basis of a model's own embeddings.

    Raises:
        PlanError: If it has no embeddings.
    """
    name = embedding_for("lm_head.weight", model.specs)
    if name is None:
        problem = "has no embeddings of tokens to take a basis from"
        raise PlanError(problem, where=model.label, hint="give a matrix as the basis")
    source = model.tensors[name].source
    vocabulary, width = source.shape
    hidden = min(hidden, width)
    shape, key = (hidden, width), f"basis-{site.number}"
    task = EmbeddingBasis(source, hidden, f"{model.label}: {name}")
    artefact = Artefact(
        key,
        task,
        peak_bytes=8 * (7 * width * width + hidden * width) + 32_000_000 - _SOLVER_BYTES,
        kept_bytes=8 * hidden * width + _SOLVER_BYTES,
        read_bytes=nbytes(source.dtype, elements(source)),
        flops=2.0 * vocabulary * width**2 + 9.0 * width**3,
    )
    onto = Found(key, "onto", shape)
    return Basis(onto, Transposed(onto), artefact)


def given_basis(
    site: Site, text: str, mark: Mark, width: int, hidden: int | None
) -> tuple[Basis, int]:
    """Return the basis of a file, and the hidden size that it leads to.

    Args:
        width: Of the model.
        hidden: What it should lead to, None for any.

    Raises:
        MergeKitError: If there is no such matrix, or it is not of this shape.
    """
    found = _matrix(site, text, mark)
    shape = found.spec.shape
    wanted = f"[{'any' if hidden is None else hidden}, {width}]"
    if len(shape) != 2 or shape[1] != width or hidden not in (None, shape[0]) or not shape[0]:
        raise MismatchError(
            f"the basis {text} has shape {list(shape)}, expected {wanted}",
            where=str(mark),
            hint="its columns are the model's hidden size, its rows the new one",
        )
    if not is_float(found.spec.dtype):
        problem = f"the basis {text} is {found.spec.dtype}, expected floats"
        raise MismatchError(problem, where=str(mark), hint="store it as float32 or float64")
    key, size = f"basis-{site.number}", shape[0] * width
    artefact = Artefact(
        key,
        GivenBasis(found.source, text),
        peak_bytes=8 * (8 * size + 4 * max(shape) * min(shape)) + 32_000_000 - _SOLVER_BYTES,
        kept_bytes=2 * 8 * size + _SOLVER_BYTES,
        read_bytes=found.spec.nbytes,
        flops=14.0 * size * min(shape),
    )
    onto, back = Found(key, "onto", shape), Found(key, "back", (width, shape[0]))
    return Basis(onto, back, artefact), shape[0]


def _file(site: Site, path: str, mark: Mark) -> Model:
    """Return the file of a basis; where there is none, say what a basis may be.

    Raises:
        CheckpointError: If it is missing or broken.
    """
    try:
        return site.maker.evidence.lent(path, mark)
    except CheckpointError as error:
        if not error.problem.startswith("no folder or file"):
            raise
        close = error.hint.partition(" (")[0] if error.hint.startswith("did you mean") else ""
        hint = "basis is svd, or the path of a safetensors file: FILE or FILE:TENSOR"
        hint = f"{close} {hint}" if close else hint
        raise CheckpointError(error.problem, where=error.where, hint=hint) from error


def _matrix(site: Site, text: str, mark: Mark) -> Held:
    """Return the matrix that `FILE` or `FILE:TENSOR` means; an existing path wins over a colon."""
    path, _, name = text.rpartition(":")
    try:
        model, name = _file(site, text, mark), ""
    except CheckpointError:
        if not path:
            raise
        model = _file(site, path, mark)
    if name in model.tensors:
        return model.tensors[name]
    if not name and len(model.tensors) == 1:
        return next(iter(model.tensors.values()))
    names = ", ".join(list(model.tensors)[:_SHOWN]) or "nothing"
    problem = f"the basis {text} is one of {len(model.tensors)} tensors: {names}"
    if name:
        problem = f"there is no tensor {name!r} in the file of the basis; it holds {names}"
    raise MismatchError(problem, where=str(mark), hint="write FILE:TENSOR")
