"""Quantised checkpoints are told by their method."""

from __future__ import annotations

import pytest

from merge_kit.architecture.quantised import quantisation_problem


@pytest.mark.parametrize(
    ("held", "dtypes", "words"),
    [
        ({"quant_method": "gptq", "bits": 4}, {"I32", "F16"}, ["gptq (4 bits)", "I32"]),
        ({"quant_method": "awq", "bits": 4}, {"I32", "F16"}, ["awq (4 bits)", "I32"]),
        ({"load_in_4bit": True}, {"U8", "F32"}, ["bitsandbytes (4 bits)", "U8"]),
        ({"load_in_8bit": True, "load_in_4bit": False}, {"I8"}, ["bitsandbytes (8 bits)", "I8"]),
        ({"quant_method": "fp8"}, {"F8_E4M3", "BF16", "F32"}, ["fp8", "F8_E4M3"]),
        ({"quant_method": "compressed-tensors"}, {"BF16"}, ["compressed-tensors", "may store"]),
        ({"quant_method": "mxfp4"}, {"U8", "BF16"}, ["mxfp4", "U8"]),
        ({}, {"I32"}, ["does not name", "I32"]),
    ],
)
def test_the_method_and_the_stored_dtype_are_named(held, dtypes, words):
    for config in ({"quantization_config": held}, {"text_config": {"quantization_config": held}}):
        problem = quantisation_problem(config, dtypes)
        assert problem is not None
        assert all(word in problem for word in words)


def test_scaled_dtypes_are_a_problem_without_a_config():
    problem = quantisation_problem({}, {"F8_E5M2", "BF16"})
    assert problem is not None
    assert "F8_E5M2" in problem


@pytest.mark.parametrize("dtypes", [{"BF16", "I64"}, {"F32", "BOOL", "U8"}, set()])
def test_ordinary_checkpoints_are_not_quantised(dtypes):
    assert (
        quantisation_problem({"model_type": "llama", "quantization_config": None}, dtypes) is None
    )
