"""What finding routers of prompts takes: memory, bytes read, operations."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from math import prod

from merge_kit.architecture.vocab import is_tokenizer_file
from merge_kit.core.tensors import nbytes
from merge_kit.plan.building.routers_tasks import (
    MOST_TOKENS,
    EmbeddedRouters,
    HiddenRouters,
    Question,
    most_tokens,
)
from merge_kit.plan.cost import sized, worker_count
from merge_kit.plan.residency import kept_bytes, raw_bytes, spare_bytes
from merge_kit.plan.sources import Source, elements
from merge_kit.plan.values import Artefact
from merge_kit.plan.walk import merged_below, stored

TOKENIZER_BYTES = 130_000_000
"""What reading a tokenizer loads of transformers, and stays: its peak over that of a process with
torch, of 5.23 on Linux, was 114 MB."""

MODEL_BYTES = 60_000_000
"""What building a model loads besides: 47 MB, measured the same way."""

VOCABULARY_FACTOR = 20
"""Bytes that a tokenizer takes for each byte of its files while it is read: 18.5 for 150,000 tokens
in 9.5 MB."""

_CALL_BYTES = 1000
"""What is noted of the call of one layer for one prompt, about."""

_THREAD_BYTES = 10_000_000
"""What an allocator keeps of a thread that has computed a result of another stage."""

_F32 = 4


def embedded_bill(key: str, task: EmbeddedRouters) -> Artefact:
    """Return the artefact of routers from embeddings."""
    question = task.question
    lengths, width = _tokens(question), _width(question)
    tokens = sum(lengths)
    return Artefact(
        key,
        task,
        peak_bytes=_F32 * width * (tokens + 4 * max(lengths, default=0))
        + _one_reading(question.embedding, tokens * width),
        kept_bytes=_row_room(question, 1),
        read_bytes=_row_bytes(question, tokens),
        library_bytes=TOKENIZER_BYTES + _vocabulary_bytes(question),
    )


def hidden_bill(key: str, task: HiddenRouters, config: Mapping[str, object]) -> Artefact:
    """Return the artefact of routers from hidden states."""
    question, sources = task.question, [s for layer in task.weights for s in layer.values()]
    lengths = [min(count, MOST_TOKENS) for count in _tokens(question)]
    tokens, longest, width = sum(lengths), max(lengths, default=0), _width(question)
    layer = max((sum(map(elements, one.values())) for one in task.weights), default=0)
    heads = _whole_number(config, "num_attention_heads")
    inner = _whole_number(config, "intermediate_size")
    states = tokens * (2 * width + _rotary(config, width, heads)) + len(lengths) * 2 * width
    calls = _CALL_BYTES * len(lengths) * len(task.weights)
    moment = longest * (12 * width + 4 * inner) + 2 * heads * longest**2
    return Artefact(
        key,
        task,
        peak_bytes=_F32 * (layer + states + moment)
        + calls
        + max(_one_reading(question.embedding, tokens * width), _reading_bytes(sources)),
        kept_bytes=_row_room(question, len(task.layers)),
        read_bytes=_row_bytes(question, tokens) + sum(map(_read_bytes, sources)),
        flops=2.0 * tokens * sum(map(elements, sources)),
        library_bytes=TOKENIZER_BYTES + MODEL_BYTES + _vocabulary_bytes(question),
    )


def _rotary(config: Mapping[str, object], width: int, heads: int) -> int:
    """Return the elements that a token keeps for its place in every head."""
    own = _whole_number(config, "head_dim")
    return 2 * (own or width // max(1, heads))


def _whole_number(config: Mapping[str, object], key: str) -> int:
    found = config.get(key)
    return found if isinstance(found, int) else 0


def _tokens(question: Question) -> list[int]:
    return [most_tokens(text) for one in question.sets for text in one.texts]


def _width(question: Question) -> int:
    return prod(question.embedding.shape[1:])


def _row_room(question: Question, layers: int) -> int:
    """Return the memory of the rows that are found."""
    return _F32 * layers * len(question.sets) * _width(question)


def _vocabulary_bytes(question: Question) -> int:
    """Return the memory of the tokenizer, which no allocator gives back."""
    files = [path for path in question.folder.glob("*") if is_tokenizer_file(path.name)]
    return VOCABULARY_FACTOR * sum(path.stat().st_size for path in files)


def _row_bytes(question: Question, rows: int) -> int:
    """Return the bytes of so many rows of the embedding, at most all of it."""
    whole = _read_bytes(question.embedding)
    return min(whole, whole * rows // max(1, question.embedding.shape[0]))


def _read_bytes(source: Source) -> int:
    return sum(nbytes(one.dtype, elements(one)) for one in stored(source))


def _reading_bytes(sources: Iterable[Source]) -> int:
    """Return what reading any of these whole takes beside what is read."""
    return max((_one_reading(source, elements(source)) for source in sources), default=0)


def _one_reading(source: Source, count: int) -> int:
    own = kept_bytes(source, _F32) + spare_bytes(source, count, _F32) + raw_bytes(source, count)
    steps = [sized(merged.step, None).peak_bytes for merged in merged_below(source)]
    return own + (worker_count(None) * (max(steps) + _THREAD_BYTES) if steps else 0)
