"""What the library refuses of adapters."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import save_file

import merge_kit as mk
from tests.api.conftest import assert_same
from tests.api.low_rank import EMBED, Q, factors, write_adapter


def test_an_adapter_without_a_base_is_refused_with_the_way_to_write_it(made):
    for call in (
        lambda: mk.linear([made.path("sort"), made.path("code")]),
        lambda: mk.ties(made.path("sort"), [made.path("code")]),
        lambda: mk.TaskVector(made.path("code"), made.path("sort")),
        lambda: mk.load(made.path("code")) - mk.load(made.path("sort")),
        lambda: mk.greedy_soup([made.path("sort")], lambda _: 1.0),
    ):
        with pytest.raises(mk.UsageError, match="is an adapter, expected a model") as caught:
            call()
        assert "BASE+ADAPTER" in caught.value.hint


def test_sums_of_a_loaded_adapter_are_refused(made):
    merge = mk.load(made.path("code")) + mk.load(made.path("sort"))
    with pytest.raises(mk.MergeKitError, match="is an adapter"):
        merge.state_dict()


@pytest.mark.parametrize(
    ("adapter", "weight", "problem"),
    [
        (3, 1.0, "type int, expected an adapter"),
        ("sort", float("nan"), "the weight is nan, expected a finite number"),
        ("sort", True, "the weight is True, expected a finite number"),
        ("sort", "1", "the weight is '1', expected a finite number"),
    ],
)
def test_what_is_no_adapter_is_refused(made, adapter, weight, problem):
    named = made.path(adapter) if isinstance(adapter, str) else adapter
    with pytest.raises(mk.UsageError, match=problem):
        mk.load(made.path("base")).with_adapter(named, weight)
    with pytest.raises(mk.UsageError, match="is no adapter"):
        mk.load(made.path("base")).with_adapter(mk.load(made.path("code")))
    with pytest.raises(mk.CheckpointError):
        mk.load(made.path("base")).with_adapter(made.path("code"))


def test_a_folder_of_a_model_and_an_adapter_is_either(made, tmp_path):
    write_adapter(tmp_path / "both", factors(100, (*Q, EMBED)))
    save_file(made.base, tmp_path / "both" / "model.safetensors")
    assert_same(mk.load(tmp_path / "both").state_dict(), made.base)
    found = mk.load(f"{tmp_path / 'both'}+{tmp_path / 'both'}")
    assert_same(found.state_dict(), mk.load(made.on_base("sort")).state_dict())


def test_an_adapter_on_an_adapter_is_refused(made):
    with pytest.raises(mk.UsageError, match="is an adapter, expected a model below"):
        mk.load(made.path("sort")).with_adapter(made.path("add"))
    with pytest.raises(mk.UsageError, match="is an adapter, expected a model below"):
        mk.load(f"{made.path('sort')}+{made.path('add')}")


def test_parts_that_are_not_there_are_named(made):
    with pytest.raises(mk.CheckpointError, match="no such folder or file"):
        mk.load(f"{made.path('base')}+{made.path('nothing')}")
    with pytest.raises(mk.UsageError, match="is no reference"):
        mk.load(f"{made.path('base')}+")
    with pytest.raises(mk.CheckpointError, match="no such folder or file"):
        mk.load(f"{made.path('base')}@v1+{made.path('sort')}")
    with pytest.raises(mk.MergeKitError):
        mk.load("base+\0")
    with pytest.raises(mk.MergeKitError):
        mk.load("+".join(["a"] * 5000))


def test_an_adapter_that_does_not_fit_is_refused_when_it_is_put_on_top(made, tmp_path):
    wide = {n: torch.cat([t, t], 1) if "lora_A" in n else t for n, t in factors(1, Q).items()}
    folder = write_adapter(tmp_path / "wide", wide)
    with pytest.raises(mk.MismatchError, match=r"q_proj"):
        mk.load(made.path("base")).with_adapter(folder)


def test_an_adapter_of_several_possible_bases_is_refused(made):
    task = mk.TaskVector.from_adapter(made.path("sort"))
    merge = (mk.load(made.path("base")) + mk.load(made.path("code"))) / 2 + task
    with pytest.raises(mk.UsageError, match=r"found 2 models that .* could be an adapter of"):
        merge.state_dict()
    merge = mk.linear([made.path("base"), made.path("code")]) + task
    with pytest.raises(mk.UsageError, match="has no tensors yet"):
        merge.state_dict()


def test_no_output_replaces_an_adapter_that_is_read(made):
    merge = mk.linear([mk.load(made.base).with_adapter(made.path("sort"))])
    with pytest.raises(mk.OutputExistsError):
        merge.save(made.path("sort"), overwrite=True)
    assert (made.path("sort") / "adapter_config.json").exists()
