"""Routers of prompts are what transformers would find, with one layer in memory."""

from __future__ import annotations

import pytest
import torch

from tests.structures import prompted
from tests.structures.prompted import CODE, HIDDEN, LAYERS, PROMPTS, SUMS, WEATHER

KINDS = tuple(prompted.OWN)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("bases")
    return {kind: prompted.save(kind, root / kind) for kind in KINDS}


def unit(vector):
    return vector / vector.norm()


def expected(kind, model, sets, pick):
    """Return layer -> (experts, hidden), of hooks on the whole model."""
    rows = []
    for one in sets:
        sides = []
        for texts in (one.positive, one.negative):
            found = [
                [pick(h.double()) for h in prompted.entering(model, prompted.ids(kind, text))]
                for text in texts
            ]
            sides.append([sum(layer) / len(texts) for layer in zip(*found, strict=True)])
        positive, negative = sides
        each = zip(positive, negative, strict=True) if negative else ((p, 0.0) for p in positive)
        rows.append([unit(p - n) for p, n in each])
    return [torch.stack(layer) for layer in zip(*rows, strict=True)]


PICKS = {"hidden": lambda h: h[-1], "hidden_avg": lambda h: h.mean(dim=0)}


@pytest.mark.parametrize("router", PICKS)
@pytest.mark.parametrize("kind", KINDS)
def test_hidden_rows_are_those_of_hooks_on_the_whole_model(kind, router, folders):
    rows, shared = prompted.read(*prompted.planned(folders[kind], router))
    wanted = expected(kind, prompted.build(kind), PROMPTS, PICKS[router])
    assert shared == {}
    assert sorted(rows) == list(range(LAYERS))
    for layer, found in rows.items():
        assert found.shape == (3, HIDDEN)
        assert (found - wanted[layer]).abs().max() < 1e-5


def test_a_window_that_slides_changes_the_rows():
    """The prompts are longer than the window, so that the test above would miss nothing."""
    model = prompted.build("mistral")
    before = expected("mistral", model, PROMPTS, PICKS["hidden"])
    model.config.sliding_window = None
    after = expected("mistral", model, PROMPTS, PICKS["hidden"])
    assert (before[-1] - after[-1]).abs().max() > 1e-3


def test_embedded_rows_are_sums_of_the_tokens_embeddings(folders):
    rows, shared = prompted.read(
        *prompted.planned(folders["llama"], "cheap_embed", shared=CODE, with_shared=True)
    )
    table = prompted.build("llama").model.embed_tokens.weight.detach().double()

    def summed(texts):
        return unit(sum(table[prompted.ids("llama", text)].sum(dim=0) for text in texts))

    wanted = [
        summed(WEATHER.positive),
        unit(summed(SUMS.positive) - summed(SUMS.negative)),
        summed(CODE.positive),
    ]
    for layer in range(LAYERS):
        assert (rows[layer] - torch.stack(wanted)).abs().max() < 1e-6
        assert torch.equal(shared[layer], rows[layer][2:])
