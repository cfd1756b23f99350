"""Which sizes `pad`, `crop` and `project` lead to, and why they cannot."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache

from merge_kit.architecture.axes import KINDS, Kind, Sizes, family_of, sizes_of
from merge_kit.architecture.axis_names import Family
from merge_kit.errors import MergeKitError, MismatchError, PlanError
from merge_kit.methods.widths import WidthMethod
from merge_kit.plan.building.built import Site
from merge_kit.plan.models import Model

_HEAD_DIM = "the frequencies of positions and the scale of the softmax depend on it"


@dataclass(frozen=True, slots=True)
class Widths:
    """Sizes of a model before and after.

    Attributes:
        asked: The sizes that the recipe gives itself.
    """

    family: Family
    old: Sizes
    new: Sizes
    asked: frozenset[str]

    def changed(self) -> tuple[Kind, ...]:
        """Return the sizes that change."""
        return _changed(self.old, self.new)


@lru_cache(maxsize=16)
def _changed(old: Sizes, new: Sizes) -> tuple[Kind, ...]:
    return tuple(kind for kind in KINDS if old.of(kind) != new.of(kind))


def widths_of(site: Site, method: WidthMethod, model: Model, like: Model | None) -> Widths:
    """Return the sizes that a method leads to.

    Args:
        like: The model that lends its sizes.

    Raises:
        MergeKitError: If it cannot be told what the model's own sizes are.
    """
    family, old = _sizes(model)
    lent = {} if like is None else _lent(like)
    given = method.sizes()
    new = replace(old, **{kind: size for kind, size in lent.items() if kind in KINDS and size})
    new = replace(new, **given)
    widths = Widths(family, old, new, frozenset(given))
    if like is not None and lent["head_dim"] != old.head_dim:
        site.findings.problem(
            MismatchError(
                f"{model.label} has a head_dim of {old.head_dim}, {like.label} of "
                f"{lent['head_dim']}; it cannot change: {_HEAD_DIM}",
                where=str(site.stage.mark),
                hint="choose models of one head_dim",
            )
        )
    if not given and like is None and method.method_name != "project":
        problem = f"{method.method_name} has no size to reach"
        hint = "add parameters: {hidden_size: ...}, or a base_model of the size"
        site.findings.problem(PlanError(problem, where=str(site.stage.mark), hint=hint))
    return widths


def check(site: Site, method: WidthMethod, model: Model, widths: Widths) -> None:
    """Report sizes that cannot be reached."""
    for kind in widths.changed():
        why = widths.family.refused.get(kind)
        if why is not None:
            _report(site, kind, f"{_key(widths, kind)} of {model.label} cannot change: {why}", "")
    for kind in widths.changed():
        old, new = widths.old.of(kind), widths.new.of(kind)
        wrong = {"pad": new < old, "crop": new > old}.get(method.method_name, False)
        if wrong:
            other = "crop" if new < old else "pad"
            than = "smaller" if new < old else "larger"
            problem = f"{kind} is {new}, {than} than the {old} of {model.label}"
            _report(site, kind, problem, f"{other} makes it {than}")
    for kind, problem, hint in _heads(model, widths):
        _report(site, kind, problem, hint)


def _heads(model: Model, widths: Widths) -> Iterator[tuple[Kind, str, str]]:
    """Yield what is wrong with numbers of heads."""
    old, new = widths.old, widths.new
    heads, kv_heads = new.num_attention_heads, new.num_key_value_heads
    if heads * old.num_key_value_heads != old.num_attention_heads * kv_heads:
        group = old.num_attention_heads / old.num_key_value_heads
        problem = (
            f"{heads} attention heads and {kv_heads} key and value heads are no whole groups: "
            f"{model.label} has {group:g} heads for each of its {old.num_key_value_heads}"
        )
        yield "num_attention_heads", problem, _fitting(widths)
    changed = {"hidden_size", "num_attention_heads"} & set(widths.changed())
    if widths.family.whole_heads and changed and new.hidden_size % heads:
        problem = (
            f"hidden_size {new.hidden_size} is not divisible by {heads} attention heads, and "
            "readers of this architecture refuse such a config, whatever its head_dim"
        )
        yield "hidden_size", problem, "choose a multiple"
    if changed and _has_factors(model, widths.family) and _whole(new) != _whole(old):
        problem = (
            f"rope_scaling has a factor for each of the frequencies of a head, and hidden_size / "
            f"num_attention_heads, by which readers of this architecture count them, would be "
            f"{_whole(new)} in place of {_whole(old)}"
        )
        yield "hidden_size", problem, "change both in one proportion, or neither"


def _whole(sizes: Sizes) -> int:
    return sizes.hidden_size // sizes.num_attention_heads


def _has_factors(model: Model, family: Family) -> bool:
    """Return whether positions have factors, in an architecture that counts them by its sizes."""
    held = [(model.config or {}).get(key) for key in ("rope_parameters", "rope_scaling")]
    return family.factors_by_size and any(
        isinstance(one, dict) and ("short_factor" in one or "long_factor" in one) for one in held
    )


def _fitting(widths: Widths) -> str:
    """Return numbers that would do."""
    old, heads = widths.old, widths.new.num_attention_heads
    group, rest = divmod(old.num_attention_heads, old.num_key_value_heads)
    if rest:
        return "leave both as they are"
    if heads != old.num_attention_heads and heads % group == 0:
        return f"give num_key_value_heads: {heads // group} with it"
    return f"give num_attention_heads: {widths.new.num_key_value_heads * group} with it"


def _sizes(model: Model) -> tuple[Family, Sizes]:
    family = family_of(model.config, model.label)
    return family, sizes_of(family, model.config or {}, model.specs, model.label)


def _lent(like: Model) -> dict[str, int]:
    _, sizes = _sizes(like)
    return {kind: getattr(sizes, kind) for kind in (*KINDS, "head_dim")}


def _key(widths: Widths, kind: Kind) -> str:
    return widths.family.key(kind)


def _report(site: Site, kind: Kind, problem: str, hint: str) -> None:
    setting = site.stage.parameters.get(kind)
    where = str(site.stage.mark if setting is None else setting.mark)
    error: MergeKitError = PlanError(problem, where=where, hint=hint or "leave it as it is")
    site.findings.problem(error)
