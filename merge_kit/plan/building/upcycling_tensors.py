"""The tensors of a mixture of experts, in the order of the base's."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from merge_kit.architecture.experts import BUFFERS, DOWN, MLP
from merge_kit.architecture.stacks import layer_name, split_layer
from merge_kit.core.dtypes import promoted
from merge_kit.plan.assemble import Assembler, depth
from merge_kit.plan.building.built import Site
from merge_kit.plan.building.pieces import copied, made_of, part_of
from merge_kit.plan.building.routers import Routers
from merge_kit.plan.building.upcycling_cast import Cast, Dense, Expert
from merge_kit.plan.items import Group
from merge_kit.plan.sources import Generated, Source, Sum
from merge_kit.plan.steps import Made
from merge_kit.recipe.values import NO_PARAMETERS, Entry, Rule, Setting


class Weaver:
    """Makes the output's tensors.

    Args:
        maker: What makes items of models that are averaged.
    """

    def __init__(self, site: Site, cast: Cast, routers: Routers, maker: Assembler) -> None:
        self.site, self.cast, self.routers, self.maker = site, cast, routers, maker
        self._group = self._averaged() if cast.method.non_experts == "average" else None

    def tensors(self) -> list[Made]:
        """Return all of them; what models lack goes to the findings."""
        cast, made, woven = self.cast, list[Made](), set[int]()
        for name in self._names():
            layer, suffix = split_layer(name, cast.base.stack) or (-1, "")
            if suffix in BUFFERS:
                continue
            if layer in cast.layers and suffix in MLP:
                made += [] if layer in woven else self._layer(layer)
                woven.add(layer)
                continue
            made += self._rest(name, layer, suffix)
            bias = suffix.removesuffix("weight") + "bias"
            if bias in cast.layout.biases and bias not in cast.base.layers[layer]:
                made.append(self._zero_bias(layer, suffix, bias))
        self.maker.report_missing()
        return made

    def _names(self) -> Iterator[str]:
        """Yield the names of the base, and of averaged models those that it lacks."""
        names = dict.fromkeys(self.cast.base.model.tensors)
        for dense in self.cast.models if self._group is not None else ():
            names |= dict.fromkeys(_as_in(self.cast.base, dense, n) for n in dense.model.tensors)
        yield from names

    def _layer(self, layer: int) -> Iterator[Made]:
        """Yield router, experts and shared expert of a layer."""
        cast, layout = self.cast, self.cast.layout
        held = [e.dense.held(layer, s).spec.dtype for e in cast.experts for s in MLP]
        dtype = promoted(list(dict.fromkeys(held)))
        yield self._made(layer, layout.router, self.routers.rows[layer], dtype)
        for number, expert in enumerate(cast.experts):
            for suffix in MLP:
                name = layout.expert(number, suffix)
                yield self._projection(layer, name, expert, suffix, dtype)
        if cast.shared is not None:
            yield self._made(layer, layout.shared_gate, self.routers.shared[layer], dtype)
            for suffix in MLP:
                yield self._shared(layer, cast.shared, suffix, dtype)

    def _shared(self, layer: int, expert: Expert, suffix: str, dtype: str) -> Made:
        name = self.cast.layout.of_shared(suffix)
        own = not self.site.stage.shared_experts
        if own and suffix == DOWN and self.cast.method.shared_expert == "zero":
            zeros = Generated("zeros", expert.dense.held(layer, suffix).spec.shape)
            return self._made(layer, name, zeros, dtype)
        return self._projection(layer, name, expert, suffix, dtype)

    def _projection(self, layer: int, name: str, expert: Expert, suffix: str, dtype: str) -> Made:
        """Return a matrix of an expert: a copy where nothing is done to it."""
        dense = expert.dense
        held = dense.held(layer, suffix)
        part = part_of(dense.model, dense.layers[layer][suffix], dense.ref)
        source = self._changed(held.source, layer, expert, suffix)
        full = layer_name(self.cast.base.stack, layer, name)
        if source is held.source and held.spec.dtype == dtype:
            return copied(self.site, full, part)
        return made_of(self.site, full, source, dtype, (part,))

    def _changed(self, source: Source, layer: int, expert: Expert, suffix: str) -> Source:
        """Return a matrix with noise added, and an output projection scaled."""
        if expert.noise:
            key = f"{layer}/{expert.key}/{suffix}"
            seed = self.site.maker.seed
            noise = Generated("normal", source.shape, key, seed, expert.noise)
            source = Sum(((1.0, source), (1.0, noise)))
        if expert.residual != 1 and suffix == DOWN:
            source = Sum(((expert.residual, source),))
        return source

    def _made(self, layer: int, suffix: str, source: Source, dtype: str) -> Made:
        name = layer_name(self.cast.base.stack, layer, suffix)
        return made_of(self.site, name, source, dtype)

    def _zero_bias(self, layer: int, suffix: str, bias: str) -> Made:
        spec = self.cast.base.held(layer, suffix).spec
        return self._made(layer, bias, Generated("zeros", spec.shape[:1]), spec.dtype)

    def _rest(self, name: str, layer: int, suffix: str) -> Iterator[Made]:
        """Yield what is no expert: the base's tensor, or the mean of the models'."""
        base = self.cast.base
        if self._group is None:
            part = part_of(base.model, name, base.ref, is_base=True)
            yield copied(self.site, name, part, component=base.model.tensors[name].component)
            return
        names = [
            layer_name(dense.stack, layer, suffix) if suffix else name for dense in self.cast.models
        ]
        place = depth(name, base.model.stacks)
        for item in self.maker.make(self._group, name, names, place):
            if item.parts:
                yield self.site.maker.make(item)

    def _averaged(self) -> Group:
        """Return the models, of equal weight."""
        stage, mark = self.site.stage, self.site.stage.mark
        entries: Sequence[Entry] = [
            Entry(dense.ref, NO_PARAMETERS, dense.ref.mark) for dense in self.cast.models
        ]
        levels = ({"weight": Setting((Rule((1.0,)),), mark)},)
        base = stage.base_model
        return self.maker.group(entries, levels, base=base, add_base=False, method="linear")


def _as_in(base: Dense, dense: Dense, name: str) -> str:
    """Return a model's name of a tensor as the base would name it."""
    found = split_layer(name, dense.stack)
    return name if found is None else layer_name(base.stack, *found)
