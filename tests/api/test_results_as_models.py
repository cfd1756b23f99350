from __future__ import annotations

import pytest
import torch

import merge_kit as mk
from tests.api.conftest import assert_same


def everywhere(family):
    """Yield the family as models on disk, in memory, and mixed."""
    names = ("base", "code", "math")
    paths = [family.path(name) for name in names]
    dicts = [getattr(family, name) for name in names]
    for sources in (paths, dicts, [paths[0], *dicts[1:]], [dicts[0], *paths[1:]]):
        yield [mk.load(source) for source in sources]


def test_a_result_is_an_operand_and_gives_the_bytes_of_a_recipe_of_stages(family, tmp_path):
    recipe = tmp_path / "stages.yaml"
    recipe.write_text(
        f"name: sum\nmerge_method: task_arithmetic\nbase_model: {family.path('base')}\n"
        f"models: [{{model: {family.path('code')}, parameters: {{weight: 0.7}}}},\n"
        f"  {{model: {family.path('math')}, parameters: {{weight: 0.1}}}}]\n---\n"
        f"merge_method: slerp\nbase_model: {family.path('base')}\nmodels: [{{model: sum}}]\n"
        "parameters: {t: 0.3}\n"
    )
    mk.merge(recipe, tmp_path / "recipe")
    wanted = (tmp_path / "recipe" / "model.safetensors").read_bytes()
    for i, (base, code, math) in enumerate(everywhere(family)):
        inner = mk.task_arithmetic(base, [code, math], weight=[0.7, 0.1])
        outer = mk.slerp(base, [inner], t=0.3)
        outer.save(tmp_path / str(i))
        assert (tmp_path / str(i) / "model.safetensors").read_bytes() == wanted
        assert_same(outer.state_dict(), mk.load(tmp_path / "recipe").state_dict())


def test_an_expression_is_an_operand(family):
    for base, code, math in everywhere(family):
        total = base + 0.7 * (code - base) + 0.1 * (math - base)
        wanted = mk.task_arithmetic(base, [code, math], weight=[0.7, 0.1])
        found = mk.slerp(base, [total], t=0.3).state_dict()
        assert_same(found, mk.slerp(base, [wanted], t=0.3).state_dict())


def test_a_sum_that_no_method_says_is_an_operand(family, tmp_path):
    kept = [
        mk.slerp(base, [base + ((code - base) + (math - base)).prune(0.5)], t=0.5)
        for base, code, math in everywhere(family)
    ]
    wanted = kept[0].state_dict()
    for i, merge in enumerate(kept):
        assert_same(merge.state_dict(), wanted)
        assert_same(mk.load(merge.save(tmp_path / str(i))).state_dict(), wanted)
    assert (tmp_path / "0" / "config.json").is_file()


def test_results_take_part_in_arithmetic(family):
    base, code, math = (mk.load(m) for m in (family.base, family.code, family.math))
    mean = mk.linear([code, math])
    task = mean - base
    assert isinstance(task, mk.TaskVector)
    found = (base + 0.5 * task).state_dict()["model.layers.0.w"].double()
    rows = [m["model.layers.0.w"].double() for m in (family.base, family.code, family.math)]
    wanted = 0.5 * rows[0] + 0.25 * (rows[1] + rows[2])
    torch.testing.assert_close(found, wanted, rtol=2.0**-8, atol=2.0**-18)  # bfloat16
    assert task.norm() == pytest.approx(mk.TaskVector(mean, base).norm(), rel=1e-15)


def test_one_result_may_stand_in_several_places(family):
    base, code, math = (mk.load(family.path(n)) for n in ("base", "code", "math"))
    mean = mk.linear([code, math])
    both = mk.linear([mk.slerp(base, [mean], t=0.5), mean], weight=[1.0, 0.0])
    assert_same(both.state_dict(), mk.slerp(base, [mean], t=0.5).state_dict())


def test_copies_inside_keep_their_dtypes(family):
    base = mk.load(family.base)
    through = mk.passthrough([mk.passthrough([base])])
    assert_same(through.state_dict(), family.base)
    merged = mk.passthrough([mk.linear([family.code, family.math])]).state_dict()
    assert_same(merged, mk.linear([family.code, family.math]).state_dict())


def test_whole_model_statistics_of_an_inner_merge_are_its_own(family, tmp_path):
    results = [
        mk.linear([mk.magnitude(base, [code], density=0.2, scope="model"), math], weight=[1.0, 0.0])
        for base, code, math in everywhere(family)
    ]
    wanted = mk.magnitude(family.base, [family.code], density=0.2, scope="model").state_dict()
    for i, merge in enumerate(results):
        assert_same(merge.state_dict(), wanted)
        assert_same(mk.load(merge.save(tmp_path / str(i))).state_dict(), wanted)


def test_there_is_one_seed(family):
    base, code, math = family.base, family.code, family.math
    inner = mk.dare_linear(base, [code], density=0.5, seed=3)
    outer = mk.dare_linear(base, [inner, math], density=0.5)
    assert_same(
        outer.state_dict(), mk.dare_linear(base, [inner, math], density=0.5, seed=3).state_dict()
    )
    with pytest.raises(mk.UsageError, match="the seeds 3 and 4"):
        mk.dare_linear(base, [inner, math], density=0.5, seed=4).state_dict()


def test_packed_weights_are_refused_and_may_be_copied():
    packed = {
        "fc.qweight": torch.ones(4, 2, dtype=torch.int32),
        "fc.scales": torch.ones(1, 2),
        "norm.weight": torch.ones(2),
    }
    with pytest.raises(mk.Problems, match=r"fc\.qweight holds packed .* that need fc\.scales"):
        mk.linear([packed, dict(packed)]).state_dict()
    assert mk.passthrough([packed]).state_dict()["fc.qweight"].dtype == torch.int32
    bits = {"fc.weight": torch.ones(4, dtype=torch.uint8), "fc.weight.absmax": torch.ones(1)}
    with pytest.raises(mk.MergeKitError, match="packed weights"):
        mk.linear([bits, dict(bits)]).state_dict()
    plain = {
        "ids": torch.arange(3),
        "mask": torch.ones(2, dtype=torch.uint8),
        "scale": torch.ones(1),
    }
    assert_same(mk.linear([plain, dict(plain)]).state_dict(), plain)
