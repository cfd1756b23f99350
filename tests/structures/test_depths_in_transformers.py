"""Upscaled and expanded models in transformers compute what their layers do, cached too."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import deepened
import pytest
from deepened import assert_generates, differences
from families import FAMILIES, Family

from merge_kit.api import merge
from tests import models

pytestmark = pytest.mark.usefixtures("single_thread")


def upscaled(folders: Sequence[Path], out: Path, **parameters: Any) -> None:
    listed = [{"model": str(folder)} for folder in folders]
    merge({"merge_method": "depth_upscale", "models": listed, "parameters": parameters}, out)


EXPANDED = [kind for kind in FAMILIES if not FAMILIES[kind].module and kind != "stablelm"]


@pytest.mark.parametrize("kind", ["llama", "mistral", "qwen3", "gpt2", "gpt_neox"])
@pytest.mark.parametrize("two", [False, True], ids=["one", "two"])
def test_what_solar_drops_is_dropped(kind, two, pair, tmp_path):
    family, (folders, sources) = FAMILIES[kind], pair(kind)
    lower, upper = ("a", "b") if two else ("b", "b")
    n, k = family.depth(lower), family.depth(upper)
    upscaled([folders[lower], folders[upper]] if two else [folders[lower]], tmp_path / "out",
             target_layers=n + k - 2)  # fmt: skip
    order = [(lower, i) for i in range(n - 1)] + [(upper, i) for i in range(1, k)]
    made = deepened.load(family, tmp_path / "out")
    assert differences(family, made, deepened.deeper(family, sources, order)) == 0
    assert_generates(family, made)


def halves(family: Family, sources: Any, pairs: Sequence[Any]) -> Any:
    """Return a model of layers that are one of a source or the mean of two, made by hand."""
    first = [pair[0] for pair in pairs]
    made = deepened.deeper(family, sources, first)
    listed = made.get_submodule(family.layers)
    for number, pair in enumerate(pairs):
        states = [sources[n].get_submodule(family.layers)[i].state_dict() for n, i in pair]
        listed[number].load_state_dict(
            {name: sum(s[name] for s in states) / len(states) for name in states[0]}
        )
    last = sources[pairs[-1][-1][0]]
    for path in family.after:
        if path != "lm_head" or not deepened.text_of(last.config).tie_word_embeddings:
            made.get_submodule(path).load_state_dict(last.get_submodule(path).state_dict())
    return made.eval()


@pytest.mark.parametrize("kind", ["llama", "mistral", "phi3", "gpt2", "mixtral"])
@pytest.mark.parametrize("two", [False, True], ids=["one", "two"])
def test_pairs_where_the_copies_meet_are_means(kind, two, pair, tmp_path):
    family, (folders, sources) = FAMILIES[kind], pair(kind)
    lower, upper = ("a", "b") if two else ("a", "a")
    n, k = family.depth(lower), family.depth(upper)
    upscaled([folders[lower], folders[upper]] if two else [folders[lower]], tmp_path / "out",
             overlap=2, overlap_mode="sum")  # fmt: skip
    pairs = [[(lower, i)] for i in range(n - 2)]
    pairs += [[(lower, n - 2 + i), (upper, i)] for i in range(2)]
    pairs += [[(upper, i)] for i in range(2, k)]
    made = deepened.load(family, tmp_path / "out")
    assert len(made.get_submodule(family.layers)) == n + k - 2
    by_hand = halves(family, sources, pairs)
    # A mean of two float32 numbers is rounded once by both.
    models.assert_same_tensors(made.state_dict(), by_hand.state_dict())
    assert differences(family, made, by_hand) == 0
    assert_generates(family, made)


@pytest.mark.parametrize("kind", EXPANDED)
def test_a_model_with_identities_computes_what_it_did(kind, pair, tmp_path):
    family, (folders, sources) = FAMILIES[kind], pair(kind)
    upscaled([folders["a"]], tmp_path / "out", target_layers=family.depth("a") + 2,
             block_expansion=True)  # fmt: skip
    made = deepened.load(family, tmp_path / "out")
    assert len(made.get_submodule(family.layers)) == family.depth("a") + 2
    assert differences(family, made, sources["a"]) < 1e-5
    assert_generates(family, made)
