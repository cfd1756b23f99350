"""What was found of prompts is found once: a run that goes on later keeps its numbers."""

from __future__ import annotations

import threading

import pytest

from merge_kit.api import merge
from merge_kit.engine import artefacts
from merge_kit.errors import InterruptedRun
from merge_kit.plan.building.routers_tasks import EmbeddedRouters, HiddenRouters
from tests.models import contents
from tests.structures import prompted

ROUTERS = {"hidden": HiddenRouters, "cheap_embed": EmbeddedRouters}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return prompted.save("llama", tmp_path_factory.mktemp("base") / "llama")


def recipe(base, router):
    models = [
        {"model": str(base), "positive_prompts": [text]} for text in ("sun rain", "sum", "loop if")
    ]
    return {
        "merge_method": "sparse_upcycle",
        "base_model": str(base),
        "models": models,
        "parameters": {"router": router, "noise_scale": 0.1},
    }


def weights(folder):
    return {k: v for k, v in contents(folder).items() if k.endswith(".safetensors")}


def stopped(made, out):
    """Start a run, and stop it after its first tensor."""
    stop = threading.Event()
    with pytest.raises(InterruptedRun):
        merge(made, out, stop=stop, threads=1, on_progress=lambda _: stop.set())
    (found,) = out.with_name(f"{out.name}.partial").glob(".merge_kit/found-*.safetensors")
    return found


@pytest.mark.parametrize("router", ROUTERS)
def test_a_run_that_goes_on_does_not_look_again(router, base, tmp_path, monkeypatch):
    merge(recipe(base, router), tmp_path / "whole")
    found = stopped(recipe(base, router), tmp_path / "out")
    assert found.name == "found-routers-0.safetensors"

    def refuse(*_):
        raise AssertionError("it was found already")

    monkeypatch.setitem(artefacts.FINDERS, ROUTERS[router], refuse)
    done = merge(recipe(base, router), tmp_path / "out")
    assert done.report.resumed > 0
    assert weights(tmp_path / "out") == weights(tmp_path / "whole")


@pytest.mark.parametrize(
    "damage",
    [
        lambda raw: raw[: len(raw) // 2],
        lambda raw: b"",
        lambda raw: raw[:-1] + bytes([raw[-1] ^ 1]),
        lambda raw: raw.replace(b"experts", b"expertz"),
    ],
    ids=["cut", "empty", "one bit", "another name"],
)
def test_what_is_damaged_is_found_again(damage, base, tmp_path):
    merge(recipe(base, "cheap_embed"), tmp_path / "whole")
    found = stopped(recipe(base, "cheap_embed"), tmp_path / "out")
    damaged = damage(found.read_bytes())
    assert damaged != found.read_bytes()
    found.write_bytes(damaged)
    merge(recipe(base, "cheap_embed"), tmp_path / "out")
    assert weights(tmp_path / "out") == weights(tmp_path / "whole")


def test_a_run_can_be_stopped_while_it_looks(base, tmp_path, monkeypatch):
    """Layer by layer: the flag is set after the plan, and seen before anything is written."""
    stop = threading.Event()
    with pytest.raises(InterruptedRun):
        merge(recipe(base, "hidden"), tmp_path / "out", stop=stop, on_plan=lambda _: stop.set())
    assert not list(tmp_path.glob("out.partial/.merge_kit/found-*.safetensors"))
    merge(recipe(base, "hidden"), tmp_path / "out")


def test_what_is_found_never_reaches_the_output(base, tmp_path):
    merge(recipe(base, "hidden"), tmp_path / "out")
    assert not [name for name in contents(tmp_path / "out") if "found" in name]
