"""config.json is read strictly; dtype and ties are patched where readers look."""

from __future__ import annotations

import json

import pytest
from tiny_architectures import MAKERS, config_text

from merge_kit.architecture.config import read_config, with_dtype, with_tied
from merge_kit.architecture.ties import is_tied
from merge_kit.errors import CheckpointError


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ('{"a": 1, "b": {"c": 1, "c": 2}}', "'c' appears twice"),
        ('{"a": NaN}', "holds NaN"),
        ('{"a": -Infinity}', "holds -Infinity"),
        ('{"a": 1e999}', "holds 1e999"),
        ("[1]", "holds a list"),
        ('{"a": 1', "no valid JSON"),
        ("", "no valid JSON"),
        ('\ufeff{"a": 1}', "no valid JSON"),
        ('{"a": ' + "1" * 5000 + "}", "digits"),
        ('{"a": ' + "[" * 70 + "]" * 70 + "}", "levels deep"),
        ("[" * 200_000, "levels deep"),
    ],
)
def test_a_broken_config_is_refused_with_its_place(text, problem):
    with pytest.raises(CheckpointError, match=problem) as caught:
        read_config(text, "model/config.json")
    assert caught.value.where.startswith("model/config.json")
    assert caught.value.hint


def test_a_syntax_error_names_line_and_column():
    with pytest.raises(CheckpointError) as caught:
        read_config('{\n  "a" 1\n}', "config.json")
    assert caught.value.where == "config.json:2:7"


def test_whichever_dtype_key_is_there_is_patched_in_every_part():
    text = (
        '{"model_type": "llava", "torch_dtype": "float16", "text_config": {"dtype": "float32"}, '
        '"vision_config": {"torch_dtype": null}, "quantization_config": {"dtype": "int8"}}'
    )
    expected = (
        '{"model_type": "llava", "torch_dtype": "bfloat16", "text_config": {"dtype": "bfloat16"}, '
        '"vision_config": {"torch_dtype": "bfloat16"}, "quantization_config": {"dtype": "int8"}}'
    )
    assert with_dtype(text, "bfloat16") == expected


def test_a_config_without_dtype_gets_the_key_that_all_transformers_read():
    text = '{"model_type": "llama"}'
    assert with_dtype(text, "float16") == '{"model_type": "llama", "torch_dtype": "float16"}'


def test_a_config_that_is_not_of_transformers_gets_no_dtype():
    text = '{"_class_name": "UNet2DConditionModel"}'
    assert with_dtype(text, "float16") == text


@pytest.mark.parametrize("kind", sorted(MAKERS))
def test_transformers_reads_the_dtype_back(kind):
    patched = json.loads(with_dtype(config_text(kind), "bfloat16"))
    config = type(MAKERS[kind]()[1]).from_dict(patched)
    assert str(config.dtype) == "torch.bfloat16"


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("kind", ["llama", "gpt2", "gemma3", "llava"])
def test_transformers_reads_the_tie_back_at_the_top_and_in_the_text_config(kind, tied):
    patched = json.loads(with_tied(config_text(kind), tied))
    config = type(MAKERS[kind]()[1]).from_dict(patched)
    assert config.tie_word_embeddings is tied
    assert config.get_text_config().tie_word_embeddings is tied
    assert is_tied(patched) is tied


def test_a_config_that_says_so_already_is_not_changed():
    text = config_text("llama")
    assert with_tied(text, tied=False) == text
