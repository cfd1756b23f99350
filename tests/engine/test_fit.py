"""Fits: what the weights of a step say before the layout of the output is known."""

from __future__ import annotations

import itertools
import json
import threading
from collections.abc import Sequence
from dataclasses import dataclass, replace

import pytest
import torch

from merge_kit.core.tensors import BLOCK
from merge_kit.engine.fit import fit_plan
from merge_kit.engine.journal import FOLDER
from merge_kit.errors import CheckpointError, InterruptedRun, NonFiniteError
from merge_kit.methods.base import PerModel
from merge_kit.methods.breadcrumbs import Breadcrumbs
from merge_kit.methods.iso_c import IsoC
from merge_kit.methods.linear import Linear
from merge_kit.methods.passthrough import Passthrough
from merge_kit.methods.ties import Ties
from merge_kit.methods.updates import AdapterMethod, Spectrum, Work
from merge_kit.plan import cost
from merge_kit.plan.sources import LowRank, Merged, View
from merge_kit.plan.values import Fitted
from tests.engine.handmade import plan, plan_input, step, stored

GENERATOR = torch.Generator().manual_seed(4)


def normal(*shape, dtype=torch.float32):
    return torch.randn(*shape, generator=GENERATOR).to(dtype)


@dataclass(frozen=True, kw_only=True)
class Ranked(AdapterMethod):
    """Finds the rank of a matrix, or of each weighted sum of products of factors."""

    def fit(self, slab, scans):
        if slab.aux:
            a = [v.view(-1, slab.shape[1]) for k, v in slab.aux.items() if k[0] == "a"]
            b = [v.view(slab.shape[0], -1) for k, v in slab.aux.items() if k[0] == "b"]
            uses = len(slab.ranks)
            return [
                _spectrum(sum(w * x @ y for w, x, y in zip(some, b, a, strict=True)))
                for some in torch.tensor(slab.weights).view(uses, -1).tolist()
            ]
        return [_spectrum(slab.tensors[0].view(slab.shape))]

    def work(self, shape, ranks: Sequence[int], made: Sequence[int]) -> Work:
        return Work(8 * 4 * shape[0] * shape[1], 0.0)


def _spectrum(matrix):
    return Spectrum(int(torch.linalg.matrix_rank(matrix, rtol=1e-5)), float(matrix.norm()))


def of_factors(folder, name, weights=(1.0, 1.0, 1.0, 0.0)):
    """Return a step of two changes of ranks 2 and 3 that makes two adapters."""
    sources = {
        f"{side}{i}": stored(folder, f"{name}-{side}{i}", normal(*shape))
        for i, rank in enumerate((2, 3))
        for side, shape in (("a", (rank, 9)), ("b", (8, rank)))
    }
    made = step(
        Ranked(),
        (),
        shapes=[(5, 9), (8, 5)] * 2,
        name=name,
        compute="F64",
        aux=tuple(sources.items()),
        shape=(8, 9),
    )
    return replace(made, weights=weights, models=("input-1", "input-2"))


def of_matrix(source, name):
    return step(
        Ranked(),
        [source],
        shapes=[(4, source.shape[1]), (source.shape[0], 4)],
        name=name,
        compute="F64",
        shape=source.shape,
    )


def fitted(fits, folder, *, workers=2, blocks=None, inputs=(), **options):
    folder.mkdir(parents=True, exist_ok=True)
    made = plan([], workers=workers, blocks=blocks, inputs=inputs, fits=fits)
    return fit_plan(made, folder, **options)


def test_each_adapter_of_a_step_has_a_fit_by_the_key_of_its_a(tmp_path):
    found = fitted([of_factors(tmp_path, "m"), of_factors(tmp_path, "n")], tmp_path / "out")
    assert [(one.key, one.rank) for one in found] == [
        ("m.0", 5),
        ("m.2", 2),
        ("n.0", 5),
        ("n.2", 2),
    ]
    assert all(one.norm > 0 for one in found)


def test_no_fits_find_nothing(tmp_path):
    assert fitted([], tmp_path / "out") == ()


def test_fits_are_the_same_for_every_slab_size_and_number_of_threads(tmp_path):
    w, a, b = normal(211, 801), normal(3, 801), normal(211, 3)
    base = stored(tmp_path, "w", w)
    change = LowRank(None, stored(tmp_path, "a", a), stored(tmp_path, "b", b), 0.5, w.shape)
    other = LowRank(None, change.a, stored(tmp_path, "b2", normal(211, 3)), 1.0, w.shape)
    ties = Ties(density=PerModel((0.3, 0.5)), weight=PerModel((1.0, 1.0)))
    inner = step(ties, [change, other], base=base, deltas=(True, True), name="inner")
    plain = step(Linear(weight=PerModel((1.0,))), [change], name="plain")
    fits = [
        of_matrix(Merged(inner, "F32", w.shape), "ties"),
        of_matrix(Merged(plain, "F32", w.shape), "plain"),
        of_factors(tmp_path, "m"),
    ]
    results = [
        fitted(fits, tmp_path / f"{blocks}-{workers}", workers=workers, blocks=blocks)
        for blocks, workers in itertools.product((1, None), (1, 2))
    ]
    assert all(one == results[0] for one in results)
    exact = 0.5 * b.double() @ a.double()
    assert results[0][1].rank == 3
    assert results[0][1].norm == pytest.approx(float(exact.norm()), rel=1e-6)
    assert not list(tmp_path.rglob("scratch*"))


def test_a_run_that_died_goes_on_with_what_it_found(tmp_path):
    fits = [of_factors(tmp_path, f"m{i}") for i in range(6)]
    whole = fitted(fits, tmp_path / "whole")
    out, stop, seen = tmp_path / "out", threading.Event(), []

    def interrupt(progress):
        seen.append(progress)
        if len(seen) == 3:
            stop.set()

    with pytest.raises(InterruptedRun):
        fitted(fits, out, workers=1, stop=stop, on_progress=interrupt)
    journal = out / FOLDER / "fitted.jsonl"
    lines = journal.read_text().splitlines()
    assert len(lines) == 3
    kept = json.loads(lines[0])
    kept["fitted"][0]["norm"] = 123.0  # to see that it is not looked at again
    journal.write_text(json.dumps(kept) + "\n" + lines[1] + "\n" + lines[2][:20])  # torn
    again = fitted(fits, out)
    assert again[0] == replace(whole[0], norm=123.0)
    assert again[1:] == whole[1:]
    assert len(journal.read_text().splitlines()) == 7  # the torn one, and four new ones


def test_entries_of_another_plan_are_looked_at_again(tmp_path):
    fitted([of_factors(tmp_path, "m")], tmp_path / "out")
    found = fitted([of_factors(tmp_path, "other")], tmp_path / "out")
    assert [one.key for one in found] == ["other.0", "other.2"]


def test_progress_ends_at_the_bytes_that_fits_read(tmp_path):
    seen = []
    fits = [of_factors(tmp_path, "m"), of_factors(tmp_path, "n")]
    fitted(fits, tmp_path / "out", on_progress=seen.append)
    factors = 4 * (2 * (9 + 8) + 3 * (9 + 8))
    assert seen[-1].done_bytes == seen[-1].total_bytes == 2 * factors


def test_inputs_that_are_not_finite_are_named(tmp_path):
    bad = of_factors(tmp_path, "m")
    b1 = normal(8, 3)
    b1[1, 1] = float("nan")
    aux = (*bad.aux[:-1], ("b1", stored(tmp_path, "nan", b1)))
    with pytest.raises(NonFiniteError) as caught:
        fitted([replace(bad, aux=aux)], tmp_path / "out")
    problem = "m.0: 1 NaN or infinite values in the inputs: 1 in input-2"
    assert str(caught.value).startswith(problem)


def test_inputs_that_changed_since_the_plan_are_refused(tmp_path):
    made = of_factors(tmp_path, "m")
    path = made.aux[0][1].span.path
    given = plan_input(path)
    path.write_bytes(path.read_bytes() + b"\0")
    with pytest.raises(CheckpointError):
        fitted([made], tmp_path / "out", inputs=(given,))


def question(one, other, name):
    asked = step(Passthrough(), [one], base=other, name=name)
    return replace(asked, action="copy", method=None)


def test_a_copy_asks_whether_two_tensors_hold_the_same_bytes(tmp_path):
    x = normal(300, 1001, dtype=torch.bfloat16)
    y = x.clone()
    y[299, 1000] += 1
    base, same, off = (stored(tmp_path, n, t) for n, t in (("x", x), ("x2", x), ("y", y)))
    wide = stored(tmp_path, "wide", x.float())
    zeros = stored(tmp_path, "a", torch.zeros(2, 1001)), stored(tmp_path, "b", normal(300, 2))
    fits = [
        question(same, base, "same"),
        question(off, base, "off"),
        question(wide, base, "wide"),
        question(LowRank(base, *zeros, 1.0, x.shape), base, "unchanged"),
        question(
            LowRank(base, wide, stored(tmp_path, "c", normal(300, 300)), 1.0, x.shape),
            base,
            "changed",
        ),
    ]
    assert fitted(fits, tmp_path / "out") == (
        Fitted("same", 0, 0.0),
        Fitted("off", 1, 0.0),
        Fitted("wide", 1, 0.0),
        Fitted("unchanged", 0, 0.0),
        Fitted("changed", 1, 0.0),
    )


KINDS = {
    "ties": Ties(density=PerModel((0.3, 0.5)), weight=PerModel((1.0, 1.0))),
    "rows": Breadcrumbs(
        density=PerModel((0.3, 0.5)),
        gamma=PerModel((0.1, 0.1)),
        weight=PerModel((1.0, 1.0)),
        variant="paper",
    ),
    "whole": IsoC(weight=PerModel((1.0, 1.0))),
}


def merged(folder, kind, w, *others):
    """Return models minus w, merged by a method, and then wanted as a tensor of its own."""
    base = stored(folder, f"{kind}-w", w)
    held = [stored(folder, f"{kind}-{i}", other) for i, other in enumerate(others)]
    return Merged(step(KINDS[kind], held, base=base, name=f"{kind}-inner"), "F32", w.shape), base


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("blocks", "workers"), [(1, 1), (None, 2)])
def test_tensors_that_are_merged_are_compared(tmp_path, kind, blocks, workers):
    w = normal(211, 801)
    same, base = merged(tmp_path, kind, w, w, w)
    turned = View(same, 0, w.shape)
    (tmp_path / "2").mkdir()
    other, _ = merged(tmp_path / "2", kind, w, w + normal(211, 801), w)
    fits = [
        question(same, base, "same"),
        question(turned, base, "view"),
        question(base, same, "same, the other way round"),
        question(other, base, "other"),
        question(other, other, "twice"),
    ]
    made = fitted(fits, tmp_path / "out", workers=workers, blocks=blocks)
    assert [one.rank for one in made] == [0, 0, 0, 1, 0]
    assert not list(tmp_path.rglob("scratch*"))


def test_a_comparison_spills_what_is_not_merged_slab_by_slab(tmp_path):
    w = normal(30, 801)
    bills = {}
    for kind in KINDS:
        inner, base = merged(tmp_path, kind, w, w, w)
        bills[kind] = plan([], fits=[question(inner, base, kind)]).bill.scratch_bytes
    assert bills["ties"] == 0
    assert bills["rows"] == bills["whole"] == 4 * 30 * 801


def test_a_comparison_holds_two_slabs_beside_the_merges_below_it(tmp_path):
    w = normal(1000, 1003)
    inner, base = merged(tmp_path, "ties", w, w, w)
    own = {}
    for blocks in (1, 8):
        (asked,) = plan([], fits=[question(inner, base, "x")], blocks=blocks).fits
        own[blocks] = asked.peak_bytes - cost.sized(inner.step, blocks).peak_bytes
    slabs, raw = 2 * 8 * BLOCK * 4, 8 * BLOCK * 4
    assert own[8] == slabs + raw
    assert own[1] < own[8]


def test_a_comparison_pays_for_the_solves_below_it(tmp_path):
    w = normal(30, 801)
    inner, base = merged(tmp_path, "whole", w, w, w)
    bill = cost.bill([], 1, 0, scanned=[question(inner, base, "x")])
    assert bill.flops == cost.bill([inner.step], 1, 0).flops > 0


def test_what_is_not_finite_below_a_comparison_is_named(tmp_path):
    w = normal(30, 801)
    bad = w.clone()
    bad[3, 4] = float("nan")
    inner, base = merged(tmp_path, "ties", w, w, bad)
    with pytest.raises(NonFiniteError) as caught:
        fitted([question(inner, base, "x")], tmp_path / "out")
    problem = "ties-inner: 1 NaN or infinite values in the inputs: 1 in input-2"
    assert str(caught.value).startswith(problem)
    (found,) = fitted([question(inner, base, "x")], tmp_path / "allowed", allow_nonfinite=True)
    assert found.rank == 1


def test_differences_that_overflow_below_a_comparison_are_named(tmp_path):
    w = torch.full((3, 5), 3e38)
    inner, base = merged(tmp_path, "ties", w, -w, w)
    with pytest.raises(NonFiniteError) as caught:
        fitted([question(inner, base, "x")], tmp_path / "out")
    assert str(caught.value).startswith("ties-inner: differences between the models are too large")
