"""Several stacks in one model: each is built, the config follows each, transformers agrees."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch.nn import ModuleList

from merge_kit.api import merge, plan
from merge_kit.architecture.several_stacks import stacked_configs
from merge_kit.architecture.stacks import Stack, same_place
from merge_kit.errors import PlanError
from merge_kit.plan.describe_steps import layer_lines
from tests import models
from tests.models import load, logits
from tests.toys import toy


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Let torch use one thread, which is the fastest for models as small as these."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    return tmp_path_factory.mktemp("saved")


def slices(*parts: tuple[Path, list[int]]) -> dict[str, Any]:
    return {"slices": [{"sources": [{"model": str(m), "layers": found}]} for m, found in parts]}


def module(model: Any, path: str) -> Any:
    for part in path.split("."):
        model = getattr(model, part)
    return model


CASES = [
    (
        "whisper",
        {"encoder": "model.encoder.layers", "decoder": "model.decoder.layers"},
        {"encoder": [[0], [1, 2], [1]], "decoder": [[1], [0, 1]]},
        {"encoder_layers": 4, "decoder_layers": 3},
        ["model.encoder.layer_norm", "model.decoder.layer_norm"],
    ),
    (
        "t5",
        {"encoder": "encoder.block", "decoder": "decoder.block"},
        {"encoder": [[0], [2]], "decoder": [[0], [1, 2], [1, 2]]},
        {"num_layers": 2, "num_decoder_layers": 5},
        ["encoder.final_layer_norm", "decoder.final_layer_norm"],
    ),
    (
        "llava",
        {
            "text_decoder": "model.language_model.layers",
            "vision_tower": "model.vision_tower.encoder.layers",
        },
        {"text_decoder": [[0], [1, 2], [1, 2, 3]], "vision_tower": [[2], [0]]},
        {"text_config.num_hidden_layers": 6, "vision_config.num_hidden_layers": 2},
        ["model.language_model.norm", "lm_head", "model.vision_tower.post_layernorm"],
    ),
]
"""Kind; module -> its path in a loaded model; module -> runs of layers, the first of one model and
the others of another; config.json; what stands after the layers."""


@pytest.mark.parametrize(("kind", "paths", "layers", "settings", "after"), CASES)
@pytest.mark.parametrize("backwards", [False, True], ids=["", "backwards"])
def test_both_stacks_are_built_and_compute_what_their_layers_compute(
    kind, paths, layers, settings, after, backwards, saved, tmp_path
):
    a, b = models.pair(kind, saved)
    # the first layer stays the first model's, where T5 keeps its table of positions
    parts = {
        name: slices(*((b if i else a, run) for i, run in enumerate(runs)))
        for name, runs in layers.items()
    }
    if backwards:
        parts = dict(reversed(parts.items()))
    recipe = {"merge_method": "passthrough", "base_model": str(a), "modules": parts}
    done = merge(recipe, tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    for key, wanted in settings.items():
        held: Any = config
        for part in key.split("."):
            held = held.get(part)
        assert held == wanted, key
    found = load(kind, tmp_path / "out")
    one, other = load(kind, a), load(kind, b)
    for name, path in paths.items():
        places = [(other if i else one, k) for i, run in enumerate(layers[name]) for k in run]
        made = module(found, path)
        assert len(made) == len(places)
        for i, (model, k) in enumerate(places):
            source = dict(module(model, path)[k].state_dict())
            for tensor, weight in made[i].state_dict().items():
                if "relative_attention_bias" not in tensor:
                    assert torch.equal(weight, source[tensor]), (name, i, tensor)
        blocks = [module(model, path)[k] for model, k in places]
        setattr(module(one, path.rpartition(".")[0]), path.rpartition(".")[2], ModuleList(blocks))
    for path in after:
        module(one, path).load_state_dict(module(other, path).state_dict())
    with torch.inference_mode():
        answers = logits(kind, found, use_cache=False)
        assert torch.isfinite(answers).all()
        if kind != "llava":  # which looks at layers by hooks that modules of another model lack
            assert torch.equal(answers, logits(kind, one, use_cache=False))
    for path in after:
        weights, wanted = module(found, path).state_dict(), module(other, path).state_dict()
        assert all(torch.equal(weights[tensor], wanted[tensor]) for tensor in wanted)
    ends = [path.rpartition(".")[2] for path in paths.values()]
    stacks = dict.fromkeys(line.split(" ", 1)[0] for line in layer_lines(done.plan))
    assert sorted(name.rpartition(".")[2] for name in stacks) == sorted(ends)


def text(**keys: Any) -> str:
    return json.dumps({"model_type": "invented", **keys})


def stack(prefix: str, count: int) -> Stack:
    return Stack(prefix, count, tuple(range(count)))


ENCODER, DECODER = stack("encoder.block", 3), stack("decoder.block", 3)


@pytest.mark.parametrize("backwards", [False, True])
@pytest.mark.parametrize(
    ("held", "found"),
    [
        ({"num_layers": 3}, {"num_layers": 2, "num_decoder_layers": 4}),
        (
            {"num_layers": 3, "num_decoder_layers": 3},
            {"num_layers": 2, "num_decoder_layers": 4},
        ),
    ],
)
def test_a_count_of_both_sides_becomes_one_for_each(held, found, backwards):
    config = text(is_encoder_decoder=True, **held)
    built = [
        (ENCODER, [(config, i) for i in (0, 1)]),
        (DECODER, [(config, i) for i in (0, 1, 1, 2)]),
    ]
    after = stacked_configs(config, built[:: -1 if backwards else 1], (ENCODER, DECODER))
    assert json.loads(after) == json.loads(config) | found


def test_the_decoders_own_count_stays_where_the_encoder_is_sliced():
    config = text(is_encoder_decoder=True, num_layers=3, num_decoder_layers=5)
    decoder = stack("decoder.block", 5)
    after = stacked_configs(config, [(ENCODER, [(config, 0)])], (ENCODER, decoder))
    assert json.loads(after) == json.loads(config) | {"num_layers": 1}


PARALLEL = (stack("transformer.attentions", 3), stack("transformer.ffns", 3))


def test_a_count_of_two_stacks_is_refused_where_only_one_of_them_changes():
    config = text(n_layers=3)
    with pytest.raises(PlanError, match=r"n_layers describes .*attentions and .*ffns"):
        stacked_configs(config, [(PARALLEL[0], [(config, 0)])], PARALLEL)
    built = [(PARALLEL[0], [(config, 0)]), (PARALLEL[1], [(config, 0), (config, 1)])]
    with pytest.raises(PlanError, match=r"n_layers describes .*attentions and .*ffns"):
        stacked_configs(config, built, PARALLEL)


def test_a_count_of_two_stacks_follows_both():
    config = text(n_layers=3, intermediate_size=[4, 5, 6])
    built = [(one, [(config, 2), (config, 0)]) for one in PARALLEL]
    after = json.loads(stacked_configs(config, built, PARALLEL))
    assert (after["n_layers"], after["intermediate_size"]) == (2, [6, 4])


def test_lists_that_two_stacks_would_order_differently_are_refused():
    config = text(n_layers=3, intermediate_size=[4, 5, 6])
    built = [
        (PARALLEL[0], [(config, 2), (config, 0)]),
        (PARALLEL[1], [(config, 0), (config, 2)]),
    ]
    with pytest.raises(PlanError, match="intermediate_size describes"):
        stacked_configs(config, built, PARALLEL)


def test_two_modules_that_slice_one_stack_are_refused(tmp_path):
    folder = toy(tmp_path / "a", layers=3)
    parts = {"model.layers.0": slices((folder, [0])), "model": slices((folder, [1]))}
    recipe = {"merge_method": "passthrough", "modules": parts}
    with pytest.raises(PlanError, match=r"two modules slice model\.layers"):
        plan(recipe)


def pipeline(folder: Path) -> Path:
    """Write two components with layers, each with a config of its own."""
    folder.mkdir()
    (folder / "model_index.json").write_text(json.dumps({"_class_name": "Invented"}))
    encoder = ("text_encoder", "encoder.layers", {"model_type": "clip", "num_hidden_layers": 3})
    for part, lead, config in (encoder, ("transformer", "blocks", {"num_layers": 3})):
        (folder / part).mkdir()
        tensors = {f"{lead}.{i}.weight": torch.full((2,), float(i)) for i in range(3)}
        save_file(tensors, folder / part / "model.safetensors")
        (folder / part / "config.json").write_text(json.dumps(config))
    return folder


def test_the_config_of_a_component_follows_its_own_stack(tmp_path):
    folder = pipeline(tmp_path / "a")
    parts = {"transformer": slices((folder, [2, 0])), "text_encoder": slices((folder, [1]))}
    recipe = {"merge_method": "passthrough", "base_model": str(folder), "modules": parts}
    done = merge(recipe, tmp_path / "out")
    found = {
        name: json.loads((tmp_path / "out" / name / "config.json").read_text()) for name in parts
    }
    assert found == {
        "transformer": {"num_layers": 2},
        "text_encoder": {"model_type": "clip", "num_hidden_layers": 1, "torch_dtype": "float32"},
    }
    made = models.stored(tmp_path / "out")
    assert {name: float(weight[0]) for name, weight in made.items()} == {
        "transformer/blocks.0.weight": 2,
        "transformer/blocks.1.weight": 0,
        "text_encoder/encoder.layers.0.weight": 1,
    }
    assert layer_lines(done.plan) == [
        "transformer/blocks 0 from input-1:a 2",
        "transformer/blocks 1 from input-1:a 0",
        "text_encoder/encoder.layers 0 from input-1:a 1",
    ]


def test_a_count_without_parts_is_the_language_models_and_not_the_vision_towers():
    config = text(num_hidden_layers=3)
    language, vision = stack("model.layers", 3), stack("vision_tower.layers", 3)
    after = stacked_configs(config, [(language, [(config, 0)])], (language, vision))
    assert json.loads(after)["num_hidden_layers"] == 1
    with pytest.raises(PlanError, match=r"num_hidden_layers describes vision_tower\.layers and"):
        stacked_configs(config, [(vision, [(config, 0)])], (language, vision))


def test_counts_of_parts_are_changed_each_for_itself():
    config = text(
        text_config={"num_hidden_layers": 3}, vision_config={"num_hidden_layers": 3, "x": 1}
    )
    language, vision = stack("language_model.layers", 3), stack("vision_tower.layers", 3)
    built = [(vision, [(config, 0)]), (language, [(config, 0), (config, 2)])]
    found = json.loads(stacked_configs(config, built, (language, vision)))
    assert found["text_config"] == {"num_hidden_layers": 2}
    assert found["vision_config"] == {"num_hidden_layers": 1, "x": 1}


def test_a_model_without_the_stack_is_refused_with_the_stacks_that_it_has(tmp_path):
    folder, plain = pipeline(tmp_path / "a"), toy(tmp_path / "plain", layers=4)
    parts = {"transformer": slices((folder, [0]), (plain, [1]))}
    recipe = {"merge_method": "passthrough", "base_model": str(folder), "modules": parts}
    with pytest.raises(PlanError, match="input-2:plain has no layers of this place") as caught:
        plan(recipe)
    assert caught.value.hint == "its layers: model.layers (4)"


def test_a_stack_is_found_under_a_longer_name():
    short, long = stack("encoder.layers", 3), stack("model.encoder.layers", 4)
    assert same_place(long, (short, stack("decoder.layers", 3))) == short
    assert same_place(short, (stack("layers", 2), long)) is None  # which of the two?
    assert same_place(short, (short, long)) == short


def test_a_count_that_may_be_of_two_encoders_is_refused_where_one_changes():
    config = text(encoder_layers=3, decoder_layers=4, speech_encoder_layers=3)
    speech, words = stack("speech_encoder.encoder.layers", 3), stack("text_encoder.layers", 3)
    with pytest.raises(PlanError, match=r"encoder_layers describes speech_encoder.* text_encoder"):
        stacked_configs(config, [(speech, [(config, 0)])], (speech, words))
