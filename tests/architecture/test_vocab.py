"""Two tokenizers are the same if they give the same tokens the same ids."""

from __future__ import annotations

import json
from base64 import b64encode
from typing import Any

import pytest
import sentencepiece
from hypothesis import given
from hypothesis import strategies as st

from merge_kit.architecture.sentencepiece import pieces
from merge_kit.architecture.vocab import is_tokenizer_file, same_vocabulary
from merge_kit.errors import CheckpointError

VOCAB = {"a": 0, "b": 1, "ab": 2}


def dumped(value: Any) -> bytes:
    return json.dumps(value).encode()


def fast(vocab: Any, *added: tuple[str, int], merges: tuple[str, ...] = ()) -> dict[str, bytes]:
    tokens = [{"id": number, "content": token} for token, number in added]
    model = {"type": "BPE", "vocab": vocab, "merges": list(merges)}
    return {"tokenizer.json": dumped({"model": model, "added_tokens": tokens})}


def test_equal_bytes_are_the_same_without_being_read():
    broken = {"tokenizer.json": b"no json"}
    assert same_vocabulary(broken, dict(broken)) is True


def test_ids_decide_not_order_settings_or_templates():
    a = fast(VOCAB, ("<s>", 3)) | {"tokenizer_config.json": dumped({"chat_template": "x"})}
    b = fast(dict(reversed(VOCAB.items())), ("<s>", 3), merges=("a b",))
    assert same_vocabulary(a, b) is True


@pytest.mark.parametrize(
    "other",
    [
        fast({**VOCAB, "c": 3}),
        fast({"a": 1, "b": 0, "ab": 2}),
        fast(VOCAB, ("<pad>", 3)),
        fast(VOCAB) | {"added_tokens.json": dumped({"<pad>": 3})},
        fast(VOCAB)
        | {"tokenizer_config.json": dumped({"added_tokens_decoder": {"3": {"content": "<pad>"}}})},
    ],
)
def test_a_token_more_or_at_another_id_is_different(other):
    assert same_vocabulary(fast(VOCAB), other) is False


def test_an_added_token_may_be_said_in_two_places():
    decoder = {"added_tokens_decoder": {"3": {"content": "<s>"}}}
    a = fast(VOCAB, ("<s>", 3)) | {"tokenizer_config.json": dumped(decoder)}
    assert same_vocabulary(a, fast(VOCAB, ("<s>", 3))) is True


def test_a_list_of_pieces_counts_from_0():
    a, b = fast([["a", -1.0], ["b", -2.0]]), fast([["a", -3.0], ["b", -2.0]])
    assert same_vocabulary(a, b) is True
    assert same_vocabulary(a, fast([["b", -2.0], ["a", -1.0]])) is False


@pytest.mark.parametrize(
    ("name", "a", "same", "different"),
    [
        ("vocab.json", dumped(VOCAB), dumped(dict(reversed(VOCAB.items()))), dumped({"a": 0})),
        ("vocab.txt", b"a\nb\xc2\x85c\n", b"a\r\nb\xc2\x85c", b"b\xc2\x85c\na\n"),
        (
            "tiktoken.model",
            b64encode(b"a") + b" 0\n" + b64encode(b"\xff") + b" 1\n",
            b64encode(b"\xff") + b" 1\n" + b64encode(b"a") + b" 0",
            b64encode(b"\xff") + b" 0\n" + b64encode(b"a") + b" 1\n",
        ),
        (
            "tekken.json",
            dumped({"config": {}, "vocab": [{"rank": 0, "token_bytes": "YQ=="}]}),
            dumped({"config": {"x": 1}, "vocab": [{"rank": 0, "token_bytes": "YQ=="}]}),
            dumped(
                {
                    "config": {"default_num_special_tokens": 2},
                    "vocab": [{"rank": 0, "token_bytes": "YQ=="}],
                }
            ),
        ),
    ],
)
def test_other_formats(name, a, same, different):
    assert same_vocabulary({name: a}, {name: same}) is True
    assert same_vocabulary({name: a}, {name: different}) is False


def test_without_a_common_format_nobody_can_tell():
    assert same_vocabulary({}, {}) is None
    assert same_vocabulary(fast(VOCAB), {"vocab.txt": b"a\n"}) is None
    assert same_vocabulary({"chat_template.jinja": b"x"}, {"chat_template.jinja": b"x"}) is None


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("tokenizer.json", b"{"),
        ("tokenizer.json", b"\xff\xfe"),
        ("tokenizer.json", b'{"model": {}}'),
        ("tokenizer.json", b'{"model": {"vocab": [1]}}'),
        ("tokenizer.json", b'{"model": {"vocab": {}}, "added_tokens": [{"id": 1}]}'),
        ("tokenizer.json", b'{"model": {"vocab": {}}, "added_tokens": 7}'),
        ("tekken.json", b"{}"),
        ("tekken.json", b'{"config": {}, "vocab": [1]}'),
        ("tekken.json", b'{"config": {}, "vocab": [{"rank": "x"}]}'),
        ("tiktoken.model", b"a b c\n"),
        ("tokenizer.model", b"\xff\xff\xff"),
        ("tokenizer.model", b""),
        ("vocab.txt", b"\xff"),
    ],
)
def test_a_broken_file_is_named(name, content):
    with pytest.raises(CheckpointError) as caught:
        same_vocabulary({name: content}, {name: content + b" "})
    assert caught.value.where.startswith(name)


def trained(tmp_path: Any, sentences: list[str]) -> bytes:
    """Return the bytes of a small sentencepiece model."""
    lead = tmp_path / "spm"
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(sentences),
        model_prefix=str(lead),
        vocab_size=20,
        hard_vocab_limit=False,
        minloglevel=5,
    )
    return lead.with_suffix(".model").read_bytes()


def test_pieces_are_those_that_sentencepiece_reads(tmp_path):
    content = trained(tmp_path, ["the cat sat", "the hat", "a cat ate", "caf\u00e9 at sea"])
    processor = sentencepiece.SentencePieceProcessor(model_proto=content)
    expected = [processor.id_to_piece(i) for i in range(processor.get_piece_size())]
    assert pieces("tokenizer.model", content) == expected
    changed = content + b"\x22\x00"  # an empty field 4: other bytes, the same pieces
    assert same_vocabulary({"tokenizer.model": content}, {"tokenizer.model": changed}) is True


@given(st.binary(max_size=40))
def test_random_bytes_end_in_pieces_or_in_an_error_that_names_the_file(content):
    try:
        assert pieces("tokenizer.model", content)
    except CheckpointError as exc:
        assert exc.where == "tokenizer.model"  # noqa: PT017  (either answer will do)


@pytest.mark.parametrize(
    ("name", "belongs"),
    [
        ("tokenizer.json", True),
        ("tokenizer_2/spiece.model", True),
        ("additional_chat_templates/rag.jinja", True),
        ("chat_template.jinja", True),
        ("tokenizer.model.v3", True),
        ("qwen.tiktoken", True),
        ("config.json", False),
        ("generation_config.json", False),
        ("preprocessor_config.json", False),
        ("model.safetensors", False),
        ("templates/rag.jinja", False),
        ("Tokenizer.json", False),
    ],
)
def test_which_files_follow_the_tokenizer(name, belongs):
    assert is_tokenizer_file(name) is belongs
