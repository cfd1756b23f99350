"""Whether dense models fit together as experts, and their config as that of a mixture."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from merge_kit.architecture.experts import BUFFERS, DOWN, GATE, MLP, UP, is_sparse
from merge_kit.architecture.experts_config import config_problem
from merge_kit.architecture.quantised import quantisation_problem
from merge_kit.architecture.sections import is_int
from merge_kit.core.dtypes import is_float
from merge_kit.errors import MergeKitError, MismatchError, PlanError
from merge_kit.plan.building.built import Site
from merge_kit.plan.building.upcycling_cast import Cast, Dense

Shape = tuple[int, int]
"""Of an MLP: width of the model, and elements between the projections."""


def check(site: Site, cast: Cast) -> None:
    """Put everything that does not fit into the findings."""
    experts = distinct(cast)
    quantised = list(_quantised(cast, experts))
    for one in quantised:
        site.findings.problem(one)
    if quantised:
        return  # names and shapes are those of packed numbers
    for error in (*_base(cast), *(e for one in experts for e in _expert(cast, one))):
        site.findings.problem(error)
    if cast.base.model.config is not None:
        problem = config_problem(cast.base.model.config, cast.layout, cast.base.stack.count)
        if problem:
            site.findings.problem(_config_error(cast, problem))
    for error in _shapes(cast, experts):
        site.findings.problem(error)


def distinct(cast: Cast) -> list[Dense]:
    """Return the models of all experts, the shared one included, each once."""
    every = [expert.dense for expert in cast.experts]
    if cast.shared is not None:
        every.append(cast.shared.dense)
    return list({id(dense.model): dense for dense in every}.values())


def _quantised(cast: Cast, experts: Sequence[Dense]) -> Iterator[MergeKitError]:
    """Yield models whose numbers mean nothing without scales, or whose MLPs are no floats."""
    found = set()
    for model in dict.fromkeys((cast.base.model, *(dense.model for dense in experts))):
        problem = quantisation_problem(model.config or {}, {s.dtype for s in model.specs.values()})
        if problem is not None:
            found.add(model)
            hint = "make experts of the model it was made from, and quantise the result"
            yield MismatchError(problem, where=model.label, hint=hint)
    for dense in (one for one in experts if one.model not in found):
        held = (dense.layers.get(layer, {}).get(suffix) for layer in cast.layers for suffix in MLP)
        odd = next((n for n in held if n and not _is_plain(dense, n)), None)
        if odd is not None:
            yield MismatchError(
                f"{odd} is {dense.model.specs[odd].dtype}, and experts are matrices of floats",
                where=dense.model.label,
                hint="make experts of a model in bfloat16, and quantise the result",
            )


def _is_plain(dense: Dense, name: str) -> bool:
    return is_float(dense.model.specs[name].dtype)


def mlp_shape(dense: Dense, layer: int) -> Shape | None:
    """Return the shape of a layer's MLP, None where its projections do not fit one another."""
    names = dense.layers.get(layer, {})
    if not all(suffix in names for suffix in MLP):
        return None
    gate, up, down = (dense.held(layer, suffix).spec.shape for suffix in (GATE, UP, DOWN))
    if len(gate) != 2 or up != gate or down != gate[::-1]:
        return None
    return gate[1], gate[0]


def _config_error(cast: Cast, problem: str) -> PlanError:
    hint = "take another architecture, or a model without it"
    if "sliding window" in problem:
        hint = "write use_sliding_window: false into its config.json if texts are shorter than it"
    return PlanError(problem, where=f"{cast.base.model.label}/config.json", hint=hint)


def _base(cast: Cast) -> Iterator[MergeKitError]:
    """Yield what the base's layers hold that the layout does not, and what they lack."""
    base, layout = cast.base, cast.layout
    known = layout.holds | layout.may_hold | {*MLP, *BUFFERS}
    odd = [n for held in base.layers.values() for s, n in held.items() if s not in known]
    if odd:
        yield MismatchError(
            f"holds {_some(odd)}, for which a {layout.model_type} has no place",
            where=base.model.label,
            hint="an expert has three matrices and no bias; take a model without these",
        )
    told = (base.model.config or {}).get("num_hidden_layers")
    if is_int(told) and told != base.stack.count:
        yield MismatchError(
            f"the config counts {told} layers, {base.stack.prefix} holds {base.stack.count}",
            where=f"{base.model.label}/config.json",
            hint="are files missing? repair the config if none are",
        )
    wanted = sorted(layout.holds)
    for layer in range(base.stack.count):
        lacking = [s for s in wanted if s not in base.layers.get(layer, {})]
        if lacking:
            problem = f"layer {layer} lacks {_some(lacking)}"
            hint = f"a {layout.model_type} needs them in every layer"
            yield MismatchError(problem, where=base.model.label, hint=hint)
            return


def _expert(cast: Cast, dense: Dense) -> Iterator[MergeKitError]:
    """Yield what keeps the MLPs of a model from being experts."""
    base, label = cast.base, dense.model.label
    if dense.model is base.model:
        yield from _projections(cast, dense)
        return
    if is_sparse(dense.model.config, dense.model.tensors):
        hint = "moe_to_dense makes a dense model of it"
        yield MismatchError("is a mixture of experts already", where=label, hint=hint)
        return
    for key in ("model_type", "hidden_act"):
        theirs, ours = ((m.config or {}).get(key) for m in (dense.model, base.model))
        if theirs != ours and theirs is not None and ours is not None:
            problem = f"its {key} is {theirs}, and {ours} in {base.model.label}"
            yield MismatchError(problem, where=label, hint="experts are models of one architecture")
            return
    if dense.stack.count != base.stack.count:
        problem = f"has {dense.stack.count} layers, and {base.model.label} {base.stack.count}"
        hint = "bring them to one depth first, with slices in a document with a name"
        yield MismatchError(problem, where=label, hint=hint)
        return
    yield from _projections(cast, dense)


def _projections(cast: Cast, dense: Dense) -> Iterator[MergeKitError]:
    """Yield the first layer that has no MLP of three matrices that fit, and what else it holds."""
    for layer in cast.layers:
        held = dense.layers.get(layer, {})
        lacking = [suffix for suffix in MLP if suffix not in held]
        if lacking:
            problem = f"layer {layer} lacks {_some(lacking)}"
        elif mlp_shape(dense, layer) is None:
            shapes = ", ".join(f"{s} {list(dense.held(layer, s).spec.shape)}" for s in MLP)
            problem = f"the projections of layer {layer} do not fit one another: {shapes}"
        else:
            continue
        hint = "an expert has a gate, an up and a down projection"
        yield MismatchError(problem, where=dense.model.label, hint=hint)
        break
    odd = [
        name
        for layer in cast.layers
        for suffix, name in dense.layers.get(layer, {}).items()
        if suffix.startswith("mlp.") and suffix not in MLP
    ]
    if odd and dense.model is not cast.base.model:
        problem = f"holds {_some(odd)}, for which an expert has no place"
        hint = "an expert has three matrices and no bias; take a model without these"
        yield MismatchError(problem, where=dense.model.label, hint=hint)


def _shapes(cast: Cast, experts: Sequence[Dense]) -> Iterator[MergeKitError]:
    """Yield MLPs of another shape than the first: of other layers, of other experts."""
    first = cast.experts[0].dense
    shared = cast.shared.dense if cast.shared is not None else None
    one = mlp_shape(first, cast.layers[0])
    own = {id(expert.dense.model) for expert in cast.experts}
    for dense in experts:
        wanted = one if id(dense.model) in own else None  # a shared expert has its own width
        for layer in cast.layers:
            found = mlp_shape(dense, layer)
            if one is None or found is None:
                break  # reported already
            wanted = wanted or (one[0], found[1])
            if found != wanted:
                at = f"{dense.model.label} has MLPs of {_shown(found)} in layer {layer}"
                yield MismatchError(
                    f"experts of different shapes: {at}, expected {_shown(wanted)}",
                    where=str(dense.ref.mark),
                    hint=_shape_hint(dense, shared, first),
                )
                break
    hidden = _hidden(cast)
    if one is not None and hidden is not None and one[0] != hidden:
        yield MismatchError(
            f"{first.model.label} has a width of {one[0]}, and {cast.base.model.label} of {hidden}",
            where=str(first.ref.mark),
            hint="experts and base are models of one size",
        )


def _shape_hint(dense: Dense, shared: Dense | None, first: Dense) -> str:
    if dense is shared:
        return f"the shared expert needs the width of {first.model.label} in all layers"
    return f"all experts have the shape of the first, {first.model.label}, in every layer"


def _hidden(cast: Cast) -> int | None:
    """Return the width of the base, by the norm of its first sparse layer."""
    name = cast.base.layers.get(cast.layers[0], {}).get("input_layernorm.weight")
    return None if name is None else cast.base.model.tensors[name].spec.shape[0]


def _shown(shape: Shape) -> str:
    return f"{shape[0]} x {shape[1]}"


def _some(names: Sequence[str]) -> str:
    shown = list(names[:3])
    return ", ".join(shown) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
