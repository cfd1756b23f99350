"""Whole recipes: typical ones of the dialect, those of the documentation and of the repository."""

from __future__ import annotations

import re
from pathlib import Path

import jsonschema
import pytest
import yaml

from merge_kit.errors import MergeKitError, Problems, RecipeError
from merge_kit.methods.registry import names
from merge_kit.recipe import keys as language
from merge_kit.recipe import load_recipe, parse_recipe, recipe_schema

ROOT = Path(__file__).parents[2]
DOCUMENT = (ROOT / "docs" / "recipes.md").read_text(encoding="utf-8")
DOCUMENTED = re.findall(r"^```yaml\n(.*?)^```$", DOCUMENT, re.DOTALL | re.MULTILINE)
FILES = sorted((ROOT / "recipes").rglob("*.y*ml"))

WILD = {
    "ties": """
models:
  - model: psmathur/orca_mini_v3_13b
    parameters:
      density: [1, 0.7, 0.1] # density gradient
      weight: 1.0
  - model: garage-bAInd/Platypus2-13B
    parameters:
      density: 0.5
      weight: [0, 0.3, 0.7, 1]
  - model: WizardLM/WizardMath-13B-V1.0
    parameters:
      density: 0.33
      weight:
        - filter: mlp
          value: 0.5
        - value: 0
merge_method: ties
base_model: TheBloke/Llama-2-13B-fp16
parameters:
  normalize: true
  int8_mask: true
dtype: float16
""",
    "dare_ties": """
models:
  - model: mistralai/Mistral-7B-v0.1
    # No parameters necessary for base model
  - model: samir-fama/SamirGPT-v1
    parameters: {density: 0.53, weight: 0.4}
  - model: abacusai/Slerp-CM-mist-dpo
    parameters: {density: 0.53, weight: 0.3}
merge_method: dare_ties
base_model: mistralai/Mistral-7B-v0.1
parameters:
  int8_mask: true
dtype: bfloat16
""",
    "slerp": """
slices:
  - sources:
      - model: OpenPipe/mistral-ft-optimized-1218
        layer_range: [0, 32]
      - model: mlabonne/NeuralHermes-2.5-Mistral-7B
        layer_range: [0, 32]
merge_method: slerp
base_model: OpenPipe/mistral-ft-optimized-1218
parameters:
  t:
    - filter: self_attn
      value: [0, 0.5, 0.3, 0.7, 1]
    - filter: mlp
      value: [1, 0.5, 0.7, 0.3, 0]
    - value: 0.5 # fallback for rest of tensors
dtype: bfloat16
""",
    "goliath": """
slices:
- sources:
  - model: xwin
    layer_range: ["0", "16"]
- sources:
  - model: euryale
    layer_range: ["8", "24"]
- sources:
  - model: xwin
    layer_range: ["17", "32"]
- sources:
  - model: euryale
    layer_range: ["25", "40"]
merge_method: passthrough
dtype: float16
""",
    "scaled_duplicates": """
slices:
  - sources:
    - model: mistralai/Mistral-7B-Instruct-v0.2
      layer_range: [0, 24]
  - sources:
    - model: mistralai/Mistral-7B-Instruct-v0.2
      layer_range: [8, 24]
      parameters:
        scale:
          - filter: o_proj
            value: 0.0
          - filter: down_proj
            value: 0.0
          - value: 1.0
merge_method: passthrough
dtype: bfloat16
""",
    "model_stock": """
models:
  - model: NousResearch/Meta-Llama-3-8B
  - model: NousResearch/Meta-Llama-3-8B-Instruct
  - model: nbeerbower/llama-3-bophades-v1-8B
merge_method: model_stock
base_model: NousResearch/Meta-Llama-3-8B
dtype: bfloat16
""",
    "linear_soup": """
models:
  - model: OpenBuddy/openbuddy-mistral-7b-v13-base
    parameters:
      weight: 0.2
  - model: mistralai/Mistral-7B-v0.1
    parameters:
      weight: "0.5"
merge_method: linear
parameters: {normalize: 1}
dtype: float16
""",
    "task_arithmetic": """
merge_method: task_arithmetic
base_model: mistralai/Mistral-7B-v0.1
models:
  - model: mistralai/Mistral-7B-v0.1
  - model: teknium/OpenHermes-2.5-Mistral-7B
    parameters: {weight: 0.6, density: 0.5}
  - model: Intel/neural-chat-7b-v3-3
    parameters: {weight: -2e-1}
parameters: {lambda: 0.8, rescale: true}
dtype: float32
out_dtype: bfloat16
tokenizer_source: base
""",
    "adapters": """
models:
  - model: NousResearch/Llama-2-7b-hf+org/alpaca-lora
    parameters: {weight: 1}
  - model: NousResearch/Llama-2-7b-hf@main+org/other@v2
    parameters: {weight: 1}
merge_method: linear
dtype: float16
""",
    "breadcrumbs": """
models:
  - model: a/one
    parameters: {weight: 0.5, density: 0.9, gamma: 0.01}
  - model: a/two
    parameters: {weight: 0.5, density: 0.9, gamma: 0.01}
merge_method: breadcrumbs_ties
base_model: a/base
dtype: bfloat16
""",
    "della": """
merge_method: della
base_model: a/base
models:
  - {model: a/one, parameters: {weight: 0.5, density: 0.6, epsilon: 0.1}}
parameters: {lambda: 1.1, normalize: true, int8_mask: true}
dtype: bfloat16
tokenizer: {source: union}
""",
    "residual": """
slices:
  - sources:
      - {model: a/one, layer_range: [0, 10]}
      - {model: a/two, layer_range: [0, 10]}
    residual_weight: 0.5
  - sources:
      - {model: a/one, layer_range: [10, 20.0]}
      - {model: a/two, layer_range: [10, 20]}
    parameters: {t: [0.1, 0.9]}
merge_method: slerp
base_model: a/one
parameters: {t: 0.5}
dtype: torch.bfloat16
name: residual
""",
    "several": """
name: one-two
merge_method: slerp
base_model: a/one
models: [{model: a/one}, {model: a/two}]
parameters: {t: 0.5}
dtype: bfloat16
---
name: three-four
merge_method: linear
models:
  - {model: a/three, parameters: {weight: 1}}
  - {model: a/four, parameters: {weight: 1}}
---
merge_method: slerp
base_model: one-two
models:
  - model: one-two
  - model: three-four
parameters:
  t: {filter: '*', value: [0, 1]}
---
""",
    "vision": """
merge_method: task_arithmetic
base_model: a/vl
modules:
  text_decoder:
    models:
      - model: a/vl-chat
        parameters: {weight: 1}
  vision_tower:
    models:
      - model: a/vl-ocr
        parameters: {weight: [0, 1]}
dtype: bfloat16
""",
    "anchors": """
merge_method: linear
models:
  - model: &one a/one
    parameters: &weights {weight: [{filter: lm_head, value: 0}, {value: 1}]}
  - model: a/two
    parameters: *weights
base_model: *one
parameters: {normalize: yes}
""",
    "sce": """
merge_method: sce
base_model: a/base
models: [{model: a/one}, {model: a/two}]
parameters: {select_topk: 0.1}
dtype: bfloat16
""",
}


def documents(text):
    return [document for document in yaml.safe_load_all(text) if document is not None]


def validator():
    schema = recipe_schema()
    jsonschema.Draft202012Validator.check_schema(schema)
    return jsonschema.Draft202012Validator(schema)


def known(text):
    return all(document["merge_method"] in names() for document in documents(text))


@pytest.mark.parametrize("name", WILD)
def test_typical_recipes_of_the_dialect_are_read(name):
    text = WILD[name]
    if known(text):
        assert parse_recipe(text).stages
        return
    with pytest.raises(RecipeError, match="unknown merge method"):
        parse_recipe(text)  # and nothing else is wrong with it


@pytest.mark.parametrize("name", [name for name in WILD if known(WILD[name])])
def test_reading_what_was_written_gives_the_same_recipe(name):
    text = WILD[name]
    recipe = parse_recipe(text)
    again = parse_recipe(parse_recipe(text, overrides=["seed=0"]).text)
    assert [stage.models for stage in again.stages] != []
    assert [shape(stage) for stage in again.stages] == [shape(stage) for stage in recipe.stages]


def shape(stage):
    """A stage without the places at which it stands."""
    return re.sub(r"Mark\([^)]*\)", "", repr(stage))


def test_typical_recipes_fit_the_schema():
    check = validator()
    for text in WILD.values():
        if known(text):
            for document in documents(text):
                check.validate(document)


@pytest.mark.parametrize("text", DOCUMENTED, ids=range(len(DOCUMENTED)))
def test_documented_recipes_are_read_without_a_note_and_fit_the_schema(text):
    assert parse_recipe(text).notes == ()
    for document in documents(text):
        validator().validate(document)


def test_the_documentation_has_an_example_of_every_key():
    examples = "\n".join(DOCUMENTED)
    unsupported = {"chat_template", "tokens", "pad_to_multiple_of", "override_architecture"}
    tables = [table for name, table in vars(language).items() if name.endswith("_KEYS")]
    every = {key for table in tables for key in table}
    missing = {
        key
        for key in every - unsupported - set(language.DEAD_KEYS)
        if not re.search(rf"(^|[\s{{]){key}:", examples, re.MULTILINE)
    }
    assert not missing
    assert all(re.search(rf"\b{key}\b", DOCUMENT) for key in every)


def test_recipes_of_the_repository_are_read_and_fit_the_schema():
    for path in FILES:
        assert load_recipe(path).stages, path
        for document in documents(path.read_text(encoding="utf-8")):
            validator().validate(document)


@pytest.mark.parametrize(
    "text",
    [
        "merge_method: linear\nmodls: []",
        "merge_method: liner",
        "merge_method: linear\nmodels: [{modle: a}]",
        "merge_method: linear\nparameters: {wieght: 1}",
        "merge_method: linear\nparameters: {weight: null}",
        "merge_method: linear\nparameters: {weight: [{fliter: a, value: 1}]}",
        "merge_method: linear\nslices: [{sources: [{model: a}]}]",
        "merge_method: linear\nslices: [{sources: [{model: a, layer_range: [-1, 2]}]}]",
        "merge_method: linear\ndtype: bf16",
        "merge_method: linear\nchat_template: auto",
        "merge_method: linear\ntokenizer: base",
        "models: [{model: a}]",
    ],
)
def test_the_schema_refuses_what_the_reader_refuses(text):
    assert not validator().is_valid(yaml.safe_load(text))
    with pytest.raises(MergeKitError):
        parse_recipe(text)


def test_every_key_of_the_schema_is_described():
    def check(schema):
        for key, shape in schema.get("properties", {}).items():
            assert len(shape["description"]) > 10, key
        for child in schema.values():
            if isinstance(child, dict):
                check(child)

    check(recipe_schema())


def test_a_wrong_recipe_of_every_kind_is_one_list():
    with pytest.raises(Problems) as caught:
        parse_recipe(WILD["slerp"].replace("layer_range: [0, 32]", "layer_rnge: [0, 32]"))
    assert len(caught.value.errors) == 4  # two unknown keys, two that are missing
