from __future__ import annotations

import json
import os
import time

import numpy as np
import pytest
from adapter_making import CONFIG, LINEAR, write_file, write_folder
from hypothesis import given
from hypothesis import strategies as st

from merge_kit.errors import CheckpointError, MergeKitError, Problems
from merge_kit.io.adapter import is_adapter, open_adapter
from merge_kit.io.adapter_bytes import same_bytes
from merge_kit.io.adapter_files import MAX_CONFIG_BYTES
from merge_kit.io.adapter_settings import MAX_RANK, read_settings
from merge_kit.io.header import read_header

A, B = LINEAR


def refused(folder, match):
    """Return the error of an adapter that must not open."""
    with pytest.raises(CheckpointError, match=match) as caught:
        open_adapter(folder)
    assert caught.value.hint
    assert str(folder) in caught.value.where
    return caught.value


WRONG_VALUES = {
    "huge rank": ("r", 10**12),
    "rank of hundreds of digits": ("r", 10**400),
    "negative rank": ("r", -2),
    "rank of zero": ("r", 0),
    "rank true": ("r", True),
    "rank a float": ("r", 2.0),
    "rank a string": ("r", "2"),
    "rank null": ("r", None),
    "alpha a string": ("lora_alpha", "8"),
    "alpha true": ("lora_alpha", True),
    "alpha of hundreds of digits": ("lora_alpha", 10**400),
    "rank_pattern a list": ("rank_pattern", ["q_proj"]),
    "rank_pattern of strings": ("rank_pattern", {"q_proj": "2"}),
    "rank_pattern of zero": ("rank_pattern", {"q_proj": 0}),
    "alpha_pattern of lists": ("alpha_pattern", {"q_proj": [8]}),
    "use_rslora a string": ("use_rslora", "yes"),
    "use_dora a number": ("use_dora", 1),
    "fan_in_fan_out a string": ("fan_in_fan_out", "false"),
    "bias unknown": ("bias", "some"),
    "bias a list": ("bias", ["all"]),
    "target_modules a number": ("target_modules", 7),
    "target_modules of numbers": ("target_modules", [7]),
    "modules_to_save a string": ("modules_to_save", "lm_head"),
    "target_parameters a string": ("target_parameters", "down_proj"),
    "tokens true": ("trainable_token_indices", [True]),
    "tokens a string": ("trainable_token_indices", {"embed": "3"}),
    "base a list": ("base_model_name_or_path", ["base"]),
    "base with a control character": ("base_model_name_or_path", "base\x1b[2J"),
    "revision a number": ("revision", 3),
    "init_lora_weights a list": ("init_lora_weights", ["pissa"]),
    "peft_type a list": ("peft_type", ["LORA"]),
}


@pytest.mark.parametrize("fault", WRONG_VALUES)
def test_wrong_values_of_the_config_are_named(tmp_path, fault):
    key, value = WRONG_VALUES[fault]
    write_folder(tmp_path, LINEAR, **{key: value})
    error = refused(tmp_path, key)
    assert "adapter_config.json" in error.where
    assert len(str(error)) < 1000


@pytest.mark.parametrize("alpha", ["1e999", "-1e999", "NaN", "Infinity"])
def test_an_alpha_that_is_not_finite_is_refused(tmp_path, alpha):
    write_folder(tmp_path, LINEAR)
    text = json.dumps(CONFIG).replace('"lora_alpha": 8', f'"lora_alpha": {alpha}')
    (tmp_path / "adapter_config.json").write_text(text)
    refused(tmp_path, "lora_alpha|no JSON number")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"r": 2, "r": 3}', "appears twice"),
        (b"[]", "holds a JSON list"),
        (b"{", "not valid JSON"),
        (b"", "not valid JSON"),
        (b'{"r": "\xff"}', "not UTF-8"),
        (b'{"a":' * 100_000, "nested too deeply"),
        (b'{"r": ' + b"9" * 10_000 + b"}", "not valid JSON"),
    ],
)
def test_a_config_that_is_no_clean_json_is_refused(tmp_path, content, message):
    write_folder(tmp_path, LINEAR)
    (tmp_path / "adapter_config.json").write_bytes(content)
    refused(tmp_path, message)


def test_a_config_above_the_size_limit_is_not_read(tmp_path):
    write_folder(tmp_path, LINEAR)
    with (tmp_path / "adapter_config.json").open("wb") as file:
        file.truncate(MAX_CONFIG_BYTES + 1)
    refused(tmp_path, f"expected at most {MAX_CONFIG_BYTES}")


def test_a_config_outside_the_folder_is_not_followed(tmp_path):
    folder = write_folder(tmp_path / "mine", LINEAR)
    (folder / "adapter_config.json").rename(tmp_path / "elsewhere.json")
    (folder / "adapter_config.json").symlink_to(tmp_path / "elsewhere.json")
    refused(folder, "a link that leaves the folder")


def test_a_pipe_in_the_place_of_the_config_is_not_waited_for(tmp_path):
    folder = write_folder(tmp_path, LINEAR)
    (folder / "adapter_config.json").unlink()
    os.mkfifo(folder / "adapter_config.json")
    refused(folder, "neither a file nor a folder")


@pytest.mark.parametrize(
    ("kind", "message", "hint"),
    [
        ("LOHA", "peft_type is LoHa", "merge it into its base"),
        ("ADALORA", "peft_type is AdaLoRA", "merge it into its base"),
        ("PREFIX_TUNING", "peft_type is prefix tuning", "nothing can be merged"),
        ("LORRA", "peft_type is 'LORRA'", "did you mean 'LORA'"),
    ],
)
def test_other_peft_types_are_refused_by_name(tmp_path, kind, message, hint):
    write_folder(tmp_path, LINEAR, peft_type=kind)
    assert hint in refused(tmp_path, message).hint


@pytest.mark.parametrize(
    ("key", "value", "name"),
    [
        ("use_qalora", True, "QA-LoRA"),
        ("use_bdlora", {"nblocks": 2}, "BD-LoRA"),
        ("alora_invocation_tokens", [1, 2], "activated LoRA"),
        ("velora_config", {"num_groups": 4}, "VeLoRA"),
        ("kasa_config", {"beta": 1}, "KaSA"),
        ("monteclora_config", {"num_samples": 4}, "MonteCLoRA"),
        ("arrow_config", {"top_k": 2}, "Arrow"),
        ("layer_replication", [[0, 2], [1, 3]], "replicated layers"),
        ("megatron_config", {"a": 1}, "Megatron"),
        ("enable_lora", [True, False, True], "merged linear layers"),
        ("use_tomorrow", True, "what it changes is not known"),
    ],
)
def test_keys_that_change_the_maths_are_refused_when_set(tmp_path, key, value, name):
    write_folder(tmp_path, LINEAR, **{key: value})
    assert key in str(refused(tmp_path, name))
    write_folder(tmp_path, LINEAR, **{key: None})
    assert open_adapter(tmp_path).updates


@pytest.mark.parametrize("init", ["pissa", "pissa_niter_16", "olora", "corda", "lora_ga", "PiSSA"])
def test_an_init_that_changes_the_base_is_refused_with_the_way_out(tmp_path, init):
    write_folder(tmp_path, LINEAR, init_lora_weights=init)
    error = refused(tmp_path, "the base was changed")
    assert "path_initial_model_for_weight_conversion" in error.hint


def test_loftq_is_refused_and_unknown_inits_too(tmp_path):
    write_folder(tmp_path, LINEAR, init_lora_weights="loftq", loftq_config={"loftq_bits": 4})
    refused(tmp_path, "the base was changed")
    write_folder(tmp_path, LINEAR, init_lora_weights="tomorrow")
    refused(tmp_path, "whether it changes the base is not known")


@pytest.mark.parametrize(
    "init", [True, False, None, "gaussian", "eva", "orthogonal", "mica", "true"]
)
def test_harmless_inits_are_accepted(tmp_path, init):
    write_folder(tmp_path, LINEAR, init_lora_weights=init, eva_config={"rho": 2.0})
    assert open_adapter(tmp_path).updates


FAULTY = {
    "a without b": ({A: (2, 8)}, {}, "half of a pair of factors: .*no b"),
    "b without a": ({B: (6, 2)}, {}, "half of a pair of factors: .*no a"),
    "a magnitude alone": ({"m.lora_magnitude_vector": (6,)}, {}, "half of a pair"),
    "rank against the config": (LINEAR, {"r": 4}, "has rank 2 by its shape, and 4 by"),
    "rank against a pattern": (LINEAR, {"rank_pattern": {"q_proj": 3}}, "has rank 2 .* and 3 by"),
    "factors of two ranks": ({A: (2, 8), B: (6, 3)}, {}, "do not fit"),
    "a factor of no rank": ({A: (0, 8), B: (6, 0)}, {}, "do not fit"),
    "a factor of one axis": ({A: (2,), B: (6, 2)}, {}, "do not fit"),
    "a factor of no axis": ({A: (), B: (6, 2)}, {}, "do not fit"),
    "a kernel in b": ({A: (2, 8, 3), B: (6, 2, 3)}, {}, "do not fit"),
    "a bias that is not said": ({**LINEAR, "l.q_proj.lora_B.bias": (6,)}, {}, "holds a bias"),
    "no bias where one is said": (LINEAR, {"lora_bias": True}, "holds no bias"),
    "a bias of another size": (
        {**LINEAR, "l.q_proj.lora_B.bias": (5,)},
        {"lora_bias": True},
        r"has shape \[5\], expected 6",
    ),
    "a bias of a": ({**LINEAR, "l.q_proj.lora_A.bias": (2,)}, {}, "neither a low-rank factor"),
    "lengths not said": ({**LINEAR, "l.q_proj.lora_magnitude_vector": (6,)}, {}, "holds a magn"),
    "no lengths where said": (LINEAR, {"use_dora": True}, "holds no magnitude"),
    "lengths of another size": (
        {**LINEAR, "l.q_proj.lora_magnitude_vector": (8,)},
        {"use_dora": True},
        r"has shape \[8\], expected 6",
    ),
    "a whole tensor": ({**LINEAR, "l.k_proj.weight": (6, 8)}, {}, "neither a low-rank factor"),
    "a bias of the base": ({**LINEAR, "l.q_proj.bias": (6,)}, {}, "neither a low-rank factor"),
    "a base layer alone": ({**LINEAR, "e.base_layer.weight": (9, 8)}, {}, "neither a low-rank"),
    "an original alone": ({**LINEAR, "h.original_module.bias": (9,)}, {}, "neither a low-rank"),
    "a lone alpha": ({**LINEAR, "l.k_proj.alpha": ()}, {}, "neither a low-rank"),
    "rows without tokens": (
        {**LINEAR, "e.token_adapter.trainable_tokens_delta": (2, 8)},
        {},
        "name no tokens",
    ),
    "rows of two embeddings": (
        {
            **LINEAR,
            "e.token_adapter.trainable_tokens_delta": np.zeros((1, 8), np.float32),
            "h.token_adapter.trainable_tokens_delta": np.ones((1, 8), np.float32),
        },
        {"trainable_token_indices": [1]},
        "rows of 'e' and 'h' differ",
    ),
    "rows of a token twice": (
        {**LINEAR, "e.token_adapter.trainable_tokens_delta": (2, 8)},
        {"trainable_token_indices": [3, 3]},
        "for 'e' are .3, 3., expected tokens from 0, each once",
    ),
    "rows of a token below 0": (
        {**LINEAR, "e.token_adapter.trainable_tokens_delta": (1, 8)},
        {"trainable_token_indices": {"e": [-1]}},
        "expected tokens from 0",
    ),
    "rows of other tokens": (
        {**LINEAR, "e.token_adapter.trainable_tokens_delta": (2, 8)},
        {"trainable_token_indices": [1, 2, 3]},
        "name 3 tokens",
    ),
    "tokens without rows": (LINEAR, {"trainable_token_indices": [1]}, "which the file lacks"),
    "two adapters": (
        {"l.lora_A.x.weight": (2, 8), "l.lora_B.y.weight": (6, 2)},
        {},
        "holds 2 adapters, expected one: x, y",
    ),
    "the same part twice": ({**LINEAR, "l.q_proj.lora_A.default.weight": (2, 8)}, {}, "same part"),
    "integers": ({A: np.zeros((2, 8), np.int8), B: (6, 2)}, {}, "is I8, expected F32"),
    "quantised": ({**LINEAR, "l.q_proj.base_layer.qweight": (6, 8)}, {}, "quantisation"),
    "AdaLoRA": ({**LINEAR, "l.q_proj.lora_E": (2, 1)}, {}, "AdaLoRA"),
    "KaSA": ({**LINEAR, "l.q_proj.lora_diag": (2,)}, {}, "KaSA"),
    "MLX": ({"l.q_proj.lora_a": (8, 2), "l.q_proj.lora_b": (2, 6)}, {}, "MLX's LoRA"),
    "prompt tuning": ({"prompt_embeddings": (4, 8)}, {}, "prompt tuning"),
    "nested factors without parameters": (
        {"m.base_layer.lora_A.weight": (2, 8), "m.base_layer.lora_B.weight": (5, 2)},
        {},
        "target_parameters names none of that module",
    ),
    "a bias of a parameter": (
        {"e.lora_A.weight": (4, 8), "e.lora_B.weight": (6, 4), "e.lora_B.bias": (6,)},
        {"target_parameters": ["e.w"]},
        "has a bias too",
    ),
    "a copy that differs": (
        {
            **LINEAR,
            "h.bias": np.zeros(3, np.float32),
            "h.modules_to_save.bias": np.ones(3, np.float32),
        },
        {"modules_to_save": ["h"]},
        "neither a low-rank factor",
    ),
    "an alpha against the config": (
        {**LINEAR, "l.q_proj.alpha": np.array(4, np.float32)},
        {},
        "has alpha 4 beside it, and 8 by",
    ),
    "experts of another rank": (
        {"e.lora_A.weight": (5, 8), "e.lora_B.weight": (6, 5)},
        {"target_parameters": ["e.w"]},
        "not those of whole experts of rank 2",
    ),
}


@pytest.mark.parametrize("fault", FAULTY)
def test_faulty_adapters_are_refused_and_say_why(tmp_path, fault):
    tensors, config, message = FAULTY[fault]
    write_folder(tmp_path, tensors, **config)
    refused(tmp_path, message)


def test_a_model_is_no_adapter(tmp_path):
    write_file(tmp_path / "model.safetensors", {"l.q_proj.weight": (6, 8)})
    refused(tmp_path, "none of its 1 tensors is a low-rank factor: l.q_proj.weight")
    write_folder(tmp_path / "empty", {})
    refused(tmp_path / "empty", "none of its 0 tensors")


def test_a_file_that_shrinks_while_it_is_opened_is_noticed(tmp_path):
    path = write_file(tmp_path / "x.safetensors", {"a": (2,)})
    stored = read_header(path).tensors[0]
    os.truncate(path, stored.span.stop - 2)
    with pytest.raises(CheckpointError, match="ends at byte"):
        same_bytes(stored, stored)
    path.unlink()
    with pytest.raises(CheckpointError, match="cannot read"):
        same_bytes(stored, stored)


@pytest.mark.parametrize(
    ("alpha", "message"),
    [
        (np.array(np.nan, np.float32), "is nan, expected a finite number"),
        (np.array(np.inf, np.float16), "is inf, expected a finite number"),
        (np.zeros(2, np.float32), "expected one number"),
        (np.zeros(1, np.uint8), "is U8"),
    ],
)
def test_an_alpha_that_is_no_number_is_refused(tmp_path, alpha, message):
    tensors = {"lora_unet_x.lora_down.weight": (2, 8), "lora_unet_x.lora_up.weight": (6, 2)}
    write_file(tmp_path / "x.safetensors", tensors | {"lora_unet_x.alpha": alpha})
    refused(tmp_path / "x.safetensors", message)


def test_every_wrong_module_is_reported_up_to_ten(tmp_path):
    tensors = {
        f"l.{n}.q_proj.{name}.weight": shape
        for n in range(12)
        for name, shape in {"lora_A": (2, 8), "lora_B": (6, 2)}.items()
    }
    write_folder(tmp_path, tensors, r=4)
    with pytest.raises(Problems) as caught:
        open_adapter(tmp_path)
    assert len(caught.value.errors) == 10


def test_pickled_adapters_are_not_opened(tmp_path):
    class Canary:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "executed"),)

    import pickle  # noqa: PLC0415 - the one test that writes one

    write_folder(tmp_path, LINEAR)
    (tmp_path / "adapter_model.safetensors").unlink()
    (tmp_path / "adapter_model.bin").write_bytes(pickle.dumps(Canary()))
    assert is_adapter(tmp_path)
    for path in (tmp_path, tmp_path / "adapter_model.bin"):
        error = refused(path, "pickled")
        assert "mergekit convert" in error.hint
    assert not (tmp_path / "executed").exists()


def test_a_config_without_weights_says_what_is_there(tmp_path):
    write_folder(tmp_path, LINEAR)
    (tmp_path / "adapter_model.safetensors").rename(tmp_path / "model.safetensors")
    refused(tmp_path, "no adapter_model.safetensors; its weights are model.safetensors")


def test_a_truncated_adapter_is_refused(tmp_path):
    write_folder(tmp_path, LINEAR)
    os.truncate(tmp_path / "adapter_model.safetensors", 300)
    refused(tmp_path, "truncated")


def test_nothing_at_the_path_is_said_so(tmp_path):
    refused(tmp_path / "absent", "no such folder or file")
    refused(tmp_path, "no .safetensors file")
    with pytest.raises(CheckpointError, match="cannot open"):
        open_adapter(tmp_path / ("x" * 5000))
    assert not is_adapter(tmp_path / ("x" * 5000))
    assert not is_adapter(tmp_path / "x\0")


@pytest.mark.parametrize("key", ["rank_pattern", "alpha_pattern"])
def test_a_pattern_that_would_never_end_ends(tmp_path, key):
    modules = [f"model.layers.{n}.self_attn.aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa" for n in range(500)]
    tensors = {f"{m}.lora_A.weight": (2, 8) for m in modules}
    tensors |= {f"{m}.lora_B.weight": (6, 2) for m in modules}
    write_folder(tmp_path, tensors, **{key: {"(a+)+b": 3, "((a|a)*)*c": 4}})
    start = time.process_time()
    assert len(open_adapter(tmp_path).updates) == 500
    assert time.process_time() - start < 5  # backtracking takes years; coverage slows this down


def test_patterns_that_cannot_be_bounded_are_refused_with_their_key(tmp_path):
    write_folder(tmp_path, LINEAR, rank_pattern={r"(q)_\1": 2})
    assert "rank_pattern" in refused(tmp_path, "a reference to a group").where


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3)
    ),
    max_leaves=5,
)
KEYS = st.sampled_from(
    [
        *("r", "lora_alpha", "rank_pattern", "alpha_pattern", "bias", "target_modules"),
        *("modules_to_save", "use_dora", "trainable_token_indices", "init_lora_weights"),
        *("peft_type", "target_parameters", "layer_replication", "anything"),
    ]
)


@given(config=st.dictionaries(KEYS, JSON, max_size=4))
def test_any_config_is_read_or_refused(config):
    try:
        rank = read_settings(config, where="config").rank
    except MergeKitError:
        rank = 1
    assert 1 <= rank <= MAX_RANK


SEGMENTS = st.sampled_from(
    [
        *("base_model", "model", "l", "q_proj", "experts", "base_layer", "lora_A", "lora_B"),
        *("lora_embedding_A", "lora_embedding_B", "lora_magnitude_vector", "weight", "bias"),
        *("token_adapter", "trainable_tokens_delta", "modules_to_save", "original_module"),
        *("default", "alpha", "dora_scale", "lora_down", "lora_up", "lora", "down", "up"),
        *("to_q_lora", "processor", "embed_tokens", "unet", "lora_unet_x"),
    ]
)
NAMES = st.lists(SEGMENTS, min_size=1, max_size=6).map(".".join)
SHAPES = st.lists(st.integers(0, 4), max_size=3).map(tuple)


@given(
    tensors=st.dictionaries(NAMES, SHAPES, max_size=5),
    config=st.sampled_from([None, CONFIG, CONFIG | {"target_parameters": ["up", "l.down"]}]),
)
def test_any_names_and_shapes_are_read_or_refused(tmp_path_factory, tensors, config):
    folder = tmp_path_factory.mktemp("any")
    write_file(folder / "adapter_model.safetensors", tensors)
    if config is not None:
        (folder / "adapter_config.json").write_text(json.dumps(config))
    try:
        adapter = open_adapter(folder)
    except MergeKitError:
        return
    used = [one for update in adapter.updates for one in update.stored]
    used += [one.stored for one in (*adapter.saved, *adapter.rows)]
    assert sorted([one.spec.name for one in used] + list(adapter.dropped)) == sorted(tensors)
