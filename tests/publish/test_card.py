from __future__ import annotations

import re
from dataclasses import replace

import pytest
import yaml
from huggingface_hub import ModelCard
from hypothesis import given
from hypothesis import strategies as st

from merge_kit.plan.values import Fate, LayerOrigin
from merge_kit.publish.card import model_card
from merge_kit.publish.markdown import code, fence, plain


def card_of(plan, recipe, nonfinite=None):
    return ModelCard(model_card(plan, recipe_text=recipe, nonfinite=nonfinite or {}))


def front_matter(card):
    return yaml.safe_load(card.content.split("---\n")[1])


def test_the_front_matter_is_what_the_hub_reads(make_plan, recipe):
    card = card_of(make_plan(), recipe)
    assert front_matter(card) == {
        "base_model": ["org/code"],
        "base_model_relation": "merge",
        "library_name": "transformers",
        "tags": ["merge", "merge_kit", "task_arithmetic"],
    }
    assert card.data.base_model == ["org/code"]


def test_without_hub_models_and_config_nothing_is_claimed(make_plan, recipe):
    plan = make_plan(architecture="", inputs=make_plan().inputs[:1])
    assert front_matter(card_of(plan, recipe)).keys() == {"base_model_relation", "tags"}


def test_the_card_says_what_was_merged_and_how(make_plan, recipe):
    text = card_of(make_plan(), recipe, {"norm": 2}).text
    for line in (
        "# Merge of `base` and `org/code`",
        "`task_arithmetic`: Add weighted task vectors (fine-tune minus base) to a base. Seed 3.",
        "Source: Ilharco et al. 2023, Editing models with task arithmetic, <https://arxiv.org/abs/2212.04089>",
        "| `input-1` | `base` |  | base | 1.5 MB |",
        "| `input-2` | [org/code](https://huggingface.co/org/code) | `abc123` |  | 1.5 MB |",
        "base_model: input-1:base",
        "- llama, 1 layer, 4 parameters",
        "- dtypes: F32 2",
        "- merged 1, copied 1, dropped 1 tensors",
        "- merged by `task_arithmetic`: 1",
        "- left out (a rule says so): `extra of input-2`",
        "- **2 values are NaN or infinite**, in `norm`",
    ):
        assert line in text.splitlines()
    assert "alice" not in text


def test_the_recipe_of_the_card_is_the_portable_one(make_plan, recipe):
    fenced = re.search(
        r"^```yaml\n(.*?)^```$", card_of(make_plan(), recipe).text, re.MULTILINE | re.DOTALL
    )[1]
    assert yaml.safe_load(fenced) == {
        "merge_method": "task_arithmetic",
        "base_model": "input-1:base",
        "models": [{"model": "org/code", "parameters": {"weight": 0.5}}],
        "parameters": {"lambda": 1.0},
        "output": "out",
    }


def test_layers_are_shown_in_ranges(make_plan, recipe):
    origins = [("input-1", 0), ("input-1", 1), ("input-2", 1), ("input-2", 2)]
    layers = tuple(LayerOrigin("model.layers", i, (o,)) for i, o in enumerate(origins))
    text = card_of(make_plan(layer_map=layers), recipe).text
    first, second = re.findall("^- `(model.layers .*)`$", text, re.MULTILINE)
    assert re.fullmatch(r"model\.layers 0-1 from input-1(:base)? 0-1", first)
    assert re.fullmatch(r"model\.layers 2-3 from input-2(:code)? 1-2", second)
    assert "## Layers" not in card_of(make_plan(), recipe).text


def test_long_lists_are_cut(make_plan, recipe):
    fates = tuple(Fate("input-1", f"t{i}", "dropped") for i in range(1008))
    text = card_of(make_plan(fates=fates), recipe).text
    assert "- left out: `t0 of input-1`, " in text
    assert "`t4 of input-1` and 1,003 more\n" in text


def test_two_merges_of_the_same_models_have_the_same_card(make_plan, recipe):
    assert card_of(make_plan(), recipe).content == card_of(make_plan(), recipe).content


@given(
    name=st.text(min_size=1)
    | st.sampled_from(
        [
            "a|b",
            "a\\|b",
            "```",
            "`x",
            "<script>",
            "a\n---\nlicense: mit",
            "[x](y)",
            "\u202eabc",
            "**",
        ]
    )
)
def test_hostile_names_stay_text(make_plan, recipe, name):
    plan = make_plan()
    base, hub = plan.inputs
    plan = replace(
        plan,
        inputs=(replace(base, name=name), replace(hub, hub_id=name, revision=name)),
        fates=(Fate("input-1", name, "dropped", name),),
        architecture=name,
        layer_map=(LayerOrigin(name, 0, (("input-1", 0),)),),
    )
    card = card_of(plan, recipe, {name: 1})
    assert front_matter(card).keys() <= {
        "base_model",
        "base_model_relation",
        "library_name",
        "tags",
    }
    assert front_matter(card)["tags"] == ["merge", "merge_kit", "task_arithmetic"]
    headings = [line for line in card.text.splitlines() if line.startswith("#")]
    assert [h.split()[1] for h in headings] == [
        *("Merge", "Method", "Models", "Layers", "Recipe", "Result"),
    ]
    rows = [line for line in card.text.splitlines() if line.startswith("| ")]
    assert len(rows) == 4
    assert all(len(re.split(r"(?<!\\)\|", row)) == 7 for row in rows)
    outside = re.sub(r"(`+)(?!`).*?(?<!`)\1(?!`)", "", card.text, flags=re.DOTALL)
    assert "<" not in outside.replace("<https://arxiv.org/abs/2212.04089>", "")


@given(text=st.text(alphabet="`a \n|\\", min_size=1))
def test_inline_code_holds_no_run_as_long_as_its_own(text):
    shown = code(text)
    assert "\n" not in shown
    assert "|" not in shown
    if shown.startswith("`"):
        ticks = re.match("`+", shown)[0]
        runs = re.findall("`+", shown)
        assert runs.count(ticks) == 2
        assert shown.endswith(ticks)


@given(text=st.text(alphabet="`~a \n", min_size=1))
def test_a_fence_is_longer_than_any_run_in_its_text(text):
    first, *inner, last = fence(text, "yaml")
    assert first == f"{last}yaml"
    assert "\n".join(inner) == text.rstrip("\n")
    assert last not in "\n".join(inner)


def test_a_recipe_cannot_leave_its_fence(make_plan):
    recipe = "merge_method: linear\nchat_template: |\n  ```\n  # Heading\n  ````\n"
    text = card_of(make_plan(), recipe).text
    assert "\n`````yaml\n" in text
    assert text.count("\n`````\n") == 1


@pytest.mark.parametrize(
    "text", ["*a*", "<b>", "a|b", "\\", "_x_", "[l](u)", "&amp;", "~~a~~", "$x$"]
)
def test_plain_text_has_no_meaning_in_markdown(text):
    assert not set("*<|\\_[]~$`") & set(plain(text))
    assert "&amp;" not in plain(text)


def test_a_hub_id_that_is_none_is_not_linked(make_plan, recipe):
    base, hub = make_plan().inputs
    card = card_of(make_plan(inputs=(base, replace(hub, hub_id="x](http://evil"))), recipe)
    assert "| `input-2` | `x](http://evil` |" in card.text
    assert "base_model" not in front_matter(card)
