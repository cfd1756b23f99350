"""Steps that yield factors: every output written, hashed, journalled and gone on from."""

from __future__ import annotations

import itertools
import json
import threading
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import pytest
import torch
from safetensors.torch import load_file

from merge_kit.engine.run import run_plan
from merge_kit.errors import InterruptedRun, NonFiniteError
from merge_kit.methods.base import PerModel, Yield
from merge_kit.methods.linear import Linear
from merge_kit.methods.updates import AdapterMethod, Spectrum, Work
from merge_kit.plan.sources import Merged, Transposed
from tests.engine.handmade import plan, step, stored

GENERATOR = torch.Generator().manual_seed(3)


def normal(*shape, dtype=torch.float32):
    return torch.randn(*shape, generator=GENERATOR).to(dtype)


@dataclass(frozen=True, kw_only=True)
class Stacked(AdapterMethod):
    """Lays factors side by side for each adapter that is made, with its coefficients in b."""

    method_name: ClassVar[str] = "stacked"

    def merge(self, slab, scans):
        out_features, in_features = slab.shape
        a = [v.view(-1, in_features) for k, v in slab.aux.items() if k[0] == "a"]
        b = [v.view(out_features, -1) for k, v in slab.aux.items() if k[0] == "b"]
        uses = len(slab.ranks)
        assert all(x.dtype == torch.float64 for x in (*a, *b))
        tensors, facts = [], []
        for use in range(uses):
            weights = slab.weights[use * len(a) : (use + 1) * len(a)]
            left = torch.cat([w * x for w, x in zip(weights, b, strict=True)], dim=1)
            right = torch.cat(a)
            tensors += [right, left]
            facts.append({"norm": float((left @ right).norm()), "residual": 0.0})
        return Yield(tensors, facts)

    def work(self, shape, ranks: Sequence[int], made: Sequence[int]) -> Work:
        return Work(8 * sum(shape) * (sum(ranks) + sum(made)), 5.0 * sum(ranks))


@dataclass(frozen=True, kw_only=True)
class Halved(AdapterMethod):
    """Takes the first rows of a merged matrix apart: identity and rows."""

    works_on: ClassVar[str] = "elements"

    def merge(self, slab, scans):
        matrix = slab.tensors[0].view(slab.shape)
        (rank,) = slab.ranks
        b = torch.zeros(slab.shape[0], rank, dtype=matrix.dtype)
        b[:rank] = torch.eye(rank, dtype=matrix.dtype)
        return Yield([matrix[:rank], b], [{"norm": float(matrix.norm())}])

    def fit(self, slab, scans):
        return [Spectrum(1, float(slab.tensors[0].norm()))]


def adapters(folder, shapes=((3, 5), (2, 5)), rows=7, dtype=torch.bfloat16, name="m"):
    """Return factors of a module by their names in a step: tensors, and sources."""
    tensors = {}
    for i, (rank, columns) in enumerate(shapes):
        tensors[f"a{i}"] = normal(rank, columns, dtype=dtype)
        tensors[f"b{i}"] = normal(rows, rank, dtype=dtype)
    sources = tuple((k, stored(folder, f"{name}-{k}", t)) for k, t in tensors.items())
    return tensors, sources


def stacked_step(folder, *, name="m", dtype="BF16", uses=((1.0, 1.0), (0.5, -2.0)), **more):
    """Return the tensors of two adapters, and the step that combines them once a use."""
    tensors, sources = adapters(folder, name=name, **more)
    columns, rows = tensors["a0"].shape[1], tensors["b0"].shape[0]
    rank = tensors["a0"].shape[0] + tensors["a1"].shape[0]
    made = step(
        Stacked(),
        (),
        base=None,
        dtype=dtype,
        shapes=[(rank, columns), (rows, rank)] * len(uses),
        name=name,
        compute="F64",
        aux=sources,
        shape=(rows, columns),
    )
    weights = tuple(w for use in uses for w in use)
    return tensors, replace(made, weights=weights, models=("input-1:one", "input-2:two"))


def run(steps, folder, *, workers=2, blocks=None, **options):
    folder.mkdir(parents=True, exist_ok=True)
    report = run_plan(plan(steps, workers=workers, blocks=blocks), folder, **options)
    return load_file(folder / "model.safetensors"), report


def test_every_adapter_that_a_step_makes_is_written_with_its_facts(tmp_path):
    tensors, one = stacked_step(tmp_path)
    written, report = run([one], tmp_path / "out")
    a = torch.cat([tensors["a0"], tensors["a1"]])
    assert torch.equal(written["m.0"], a)
    assert torch.equal(written["m.2"], a)
    assert torch.equal(written["m.1"], torch.cat([tensors["b0"], tensors["b1"]], dim=1))
    halved = torch.cat([0.5 * tensors["b0"].double(), -2 * tensors["b1"].double()], dim=1)
    assert torch.equal(written["m.3"], halved.bfloat16())
    assert list(report.facts) == ["m.0", "m.2"]  # the a of each adapter
    norm = float((halved @ a.double()).norm())
    assert report.facts["m.2"] == pytest.approx({"norm": norm, "residual": 0.0}, rel=1e-12)
    assert set(report.hashes) == set(written)


def test_factors_that_have_the_shape_of_a_result_are_whole_too(tmp_path):
    """A range of them would be cut off: a0 has the shape of the first output here."""
    tensors, one = stacked_step(tmp_path, shapes=((5, 9), (1, 9)), rows=6, dtype=torch.float32)
    square = tuple((name, source) for name, source in one.aux if name[1] == "0")
    targets = tuple(
        replace(t, spec=replace(t.spec, dtype="F32", shape=shape))
        for t, shape in zip(one.outputs, [(5, 9), (6, 5)], strict=False)
    )
    alone = replace(one, aux=square, outputs=targets, weights=(1.0,), models=("input-1",))
    written, _ = run([alone], tmp_path / "out")
    assert torch.equal(written["m.0"], tensors["a0"])
    assert torch.equal(written["m.1"], tensors["b0"])


def test_hashes_of_factors_are_those_of_their_bytes(tmp_path):
    shapes = ((40, 5000), (24, 5000))  # more than a block
    _, one = stacked_step(tmp_path, shapes=shapes, rows=70)
    written, report = run([one], tmp_path / "out")
    copies = []
    for key, tensor in written.items():
        source = stored(tmp_path, f"copy-{key}", tensor)
        made = step(Linear(weight=PerModel((1.0,))), [source], dtype="BF16", name=key)
        copies.append(replace(made, action="copy", method=None))
    _, copied = run(copies, tmp_path / "copies")
    assert dict(report.hashes) == dict(copied.hashes)


def test_changes_that_are_formed_are_spilled_and_compressed(tmp_path):
    x, y = normal(31, 4001), normal(31, 4001)
    sources = [stored(tmp_path, "x", x), stored(tmp_path, "y", y)]
    inner = step(Linear(weight=PerModel((1.0, 1.0))), sources, name="inner")
    mean = (x * 0.5).add(y, alpha=0.5)
    for turned in (False, True):
        source = Merged(inner, "F32", x.shape)
        matrix = mean.T if turned else mean
        made = step(
            Halved(),
            [Transposed(source) if turned else source],
            shapes=[(3, matrix.shape[1]), (matrix.shape[0], 3)],
            compute="F64",
            shape=tuple(matrix.shape),
        )
        results = [
            run([made], tmp_path / f"{turned}-{blocks}-{workers}", blocks=blocks, workers=workers)
            for blocks, workers in itertools.product((1, None), (1, 2))
        ]
        for written, report in results:
            assert torch.equal(written["x.0"], matrix[:3])
            assert report.facts["x.0"]["norm"] == pytest.approx(float(mean.double().norm()))
            assert report.facts == results[0][1].facts
            assert report.hashes == results[0][1].hashes


def test_a_run_that_stopped_goes_on_with_the_facts_of_the_first(tmp_path):
    steps = [stacked_step(tmp_path, name=f"m{i}")[1] for i in range(6)]
    whole, full = run(steps, tmp_path / "whole")
    stop, out = threading.Event(), tmp_path / "out"
    out.mkdir()
    seen = []

    def interrupt(progress):
        seen.append(progress)
        if len(seen) == 9:
            stop.set()

    with pytest.raises(InterruptedRun):
        run_plan(plan(steps, workers=1), out, on_progress=interrupt, stop=stop)
    written, report = run(steps, out)
    assert 0 < report.resumed < 6
    assert report.facts == full.facts
    assert list(report.facts) == list(full.facts)
    assert report.hashes == full.hashes
    assert all(torch.equal(whole[key], written[key]) for key in whole)


def test_journals_without_facts_are_gone_on_from(tmp_path):
    _, one = stacked_step(tmp_path)
    run([one], tmp_path / "out")
    journal = tmp_path / "out" / ".merge_kit" / "journal.jsonl"
    entry = json.loads(journal.read_text())
    assert entry.pop("facts")
    journal.write_text(json.dumps(entry) + "\n")
    _, report = run([one], tmp_path / "out")
    assert report.resumed == 1
    assert report.facts == {}


def test_factors_that_are_not_finite_name_their_adapter(tmp_path):
    tensors, sources = adapters(tmp_path, name="bad")
    tensors["b1"][2, 1] = float("nan")
    tensors["a1"][0, 0] = float("inf")
    _, one = stacked_step(tmp_path)
    for key in ("a1", "b1"):
        sources = tuple(
            (k, stored(tmp_path, f"nan-{k}", tensors[k])) if k == key else (k, s)
            for k, s in (sources if key == "b1" else one.aux)
        )
    bad = replace(one, aux=sources)
    with pytest.raises(NonFiniteError) as caught:
        run([bad], tmp_path / "out")
    assert str(caught.value).startswith(
        "m.0: 2 NaN or infinite values in the inputs: 2 in input-2:two"
    )


def test_the_bill_counts_factors_in_float64_and_never_the_matrix(tmp_path):
    _, small = stacked_step(tmp_path, shapes=((8, 20_000), (8, 20_000)), rows=30_000)
    made = plan([small]).steps[0]
    factors = 2 * 8 * (20_000 + 30_000)  # elements
    work = 8 * 50_000 * (16 + 2 * 16)
    assert made.peak_bytes >= 8 * factors + work
    assert made.peak_bytes < 8 * factors + work + 24 * 4 * factors + 4e6
    assert made.peak_bytes < 20_000 * 30_000 * 4 / 10
    assert plan([small]).bill.flops == 5.0 * 16
