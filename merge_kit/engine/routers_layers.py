"""Runs prompts through a model layer by layer, with the weights of one layer in memory.

The model's own code, of transformers, is built without weights. It is called once for each prompt
with layers that only note what they are called with: masks and places. Then one layer after the
other gets its weights, and is called with what was noted.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from merge_kit.architecture.config import read_config
from merge_kit.engine.operands import Operands
from merge_kit.engine.prepared import Prepared
from merge_kit.engine.routers_tokens import transformers_of
from merge_kit.engine.workspace import ALIGN, Workspace
from merge_kit.errors import CheckpointError, InterruptedRun, MismatchError
from merge_kit.plan.building.routers_tasks import HiddenRouters
from merge_kit.plan.sources import Source, elements

Use = Callable[[int, int, Tensor], None]
"""(layer, prompt, what enters the layer's MLP: (tokens, hidden), float32)."""

_BUFFERS = ("inv_freq",)
"""Ends of stored tensors that transformers computes itself."""


class _Enough(Exception):  # noqa: N818  (ends a call that has told what was to be known)
    """The last layer of interest was called."""


@dataclass
class _Calls:
    """What one prompt's layers are called with.

    Attributes:
        state: What enters the next layer, (1, tokens, hidden).
        others: The other arguments of each layer.
    """

    state: Tensor
    others: list[tuple[tuple[Any, ...], dict[str, Any]]] = field(default_factory=list)


class Layers:
    """The layers of a model, without weights.

    Args:
        task: Its config, and where the weights of its layers are.

    Raises:
        MergeKitError: If transformers knows no such model.
    """

    def __init__(self, task: HiddenRouters) -> None:
        self._task = task
        with transformers_of(task.question.label, "build the model") as transformers:
            self._model = _skeleton(transformers, task)
            self._layers = list(self._model.layers)[: len(task.weights)]
            self._forwards = [layer.forward for layer in self._layers]
        if len(self._layers) < len(task.weights):
            problem = f"config.json has {len(self._layers)} layers, the weights {len(task.weights)}"
            raise MismatchError(problem, where=task.question.label, hint="repair config.json")

    def run(
        self, states: Sequence[Tensor], operands: Operands, stop: threading.Event, use: Use
    ) -> None:
        """Run prompts through the layers, and hand on what enters each layer's MLP.

        Args:
            states: The embeddings of each prompt's tokens, (tokens, hidden), float32.
            use: Called for each layer and prompt.

        Raises:
            MergeKitError: If weights do not fit the model's code, or `stop` was set.
        """
        with self._running():
            calls = [self._noted(state) for state in states]
        shelf = _Shelf(self._task)
        for i in range(len(self._layers)):
            self._load(i, shelf, operands, stop)
            for prompt, call in enumerate(calls):
                _check_stop(stop)
                with self._running():
                    entering = self._pass(i, call)
                use(i, prompt, entering)
            self._layers[i].to("meta")

    @contextmanager
    def _running(self) -> Iterator[None]:
        with transformers_of(self._task.question.label, "run the model"), torch.no_grad():
            yield

    def _noted(self, state: Tensor) -> _Calls:
        """Return what the model calls its layers with."""
        calls, last = _Calls(state[None]), len(self._layers) - 1

        def note(index: int) -> Callable[..., Tensor]:
            def forward(hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor:
                if index == 0:
                    calls.state = hidden  # some models scale embeddings
                calls.others.append((args, kwargs))
                if index == last:
                    raise _Enough
                return hidden

            return forward

        for i, layer in enumerate(self._layers):
            layer.forward = note(i)
        try:
            self._model(inputs_embeds=state[None], use_cache=False)
        except _Enough:
            pass
        finally:
            for layer, forward in zip(self._layers, self._forwards, strict=True):
                layer.forward = forward
        return calls

    def _pass(self, index: int, calls: _Calls) -> Tensor:
        """Run one prompt through one layer; return what enters its MLP."""
        seen: list[Tensor] = []
        layer = self._layers[index]
        hook = layer.mlp.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
        try:
            args, kwargs = calls.others[index]
            found = layer(calls.state, *args, **kwargs)
        finally:
            hook.remove()
        calls.state = found[0] if isinstance(found, tuple) else found
        return seen[0][0]

    def _load(self, index: int, shelf: _Shelf, operands: Operands, stop: threading.Event) -> None:
        """Give a layer its weights, in float32."""
        layer, weights = self._layers[index], self._task.weights[index]
        wanted = {name: tuple(tensor.shape) for name, tensor in layer.state_dict().items()}
        _check_fit(wanted, weights, self._task.question.label, index)
        loaded, at = {}, 0
        for name in wanted:
            _check_stop(stop)
            loaded[name], at = shelf.read(weights[name], operands, at)
        layer.load_state_dict(loaded, strict=True, assign=True)
        if isinstance(operands, Prepared):
            operands.close()  # what was computed for this layer


class _Shelf:
    """Memory for the weights of one layer at a time.

    It is one piece that stays: what is freed and taken again tensor by tensor, an allocator may
    keep, and the process would grow with the layers.
    """

    def __init__(self, task: HiddenRouters) -> None:
        each = (sum(_room(source) for source in one.values()) for one in task.weights)
        self._flat = torch.empty(max(each, default=0), dtype=torch.float32)
        self._work = Workspace()

    def read(self, source: Source, operands: Operands, at: int) -> tuple[Tensor, int]:
        """Return a source, whole, and where the next one has its place."""
        self._work.enter(source)
        out = self._flat[at : at + elements(source)]
        operands.read(source, 0, elements(source), out, self._work)
        return out.view(source.shape), at + _room(source)


def _room(source: Source) -> int:
    return -(-elements(source) // ALIGN) * ALIGN


def _skeleton(transformers: Any, task: HiddenRouters) -> Any:
    """Return the model without weights; what it computes of its config alone is real."""
    config = read_config(task.config_text, f"{task.question.label}/config.json")
    kind = config.get("model_type")
    if kind not in transformers.CONFIG_MAPPING:
        problem = f"transformers {transformers.__version__} knows no model_type {kind!r}"
        hint = "update transformers, or take router: cheap_embed or random"
        raise CheckpointError(problem, where=task.question.label, hint=hint)
    known = transformers.CONFIG_MAPPING[kind].from_dict(config)
    with torch.device("meta"):
        model = transformers.AutoModel.from_config(
            known, trust_remote_code=False, dtype=torch.float32, attn_implementation="sdpa"
        )
    for name, child in list(model.named_children()):
        if not list(child.parameters()) and list(child.buffers()):
            setattr(model, name, type(child)(known))  # angles of places
    if not all(hasattr(layer, "mlp") for layer in getattr(model, "layers", [None])):
        problem = f"model_type {kind!r} has no layers with one MLP each that could be run alone"
        hint = "take router: cheap_embed or random"
        raise CheckpointError(problem, where=task.question.label, hint=hint)
    return model.eval().requires_grad_(requires_grad=False)


def _check_fit(
    wanted: Mapping[str, tuple[int, ...]], weights: Mapping[str, Source], label: str, layer: int
) -> None:
    """Hold the stored tensors of a layer to those that transformers has.

    Raises:
        MismatchError: If one is missing, too many, or of another shape.
    """
    names = {name for name in weights if not name.endswith(_BUFFERS)}
    odd = sorted(names ^ wanted.keys())
    if odd:
        which = "is not part of" if odd[0] in names else "is missing for"
        problem = f"{odd[0]} of layer {layer} {which} the model that config.json describes"
        raise MismatchError(problem, where=label, hint="take router: cheap_embed or random")
    for name, shape in wanted.items():
        if weights[name].shape != shape:
            problem = f"{name} of layer {layer} has shape {list(weights[name].shape)}, and "
            problem += f"config.json gives it {list(shape)}"
            raise MismatchError(problem, where=label, hint="repair config.json")


def _check_stop(stop: threading.Event) -> None:
    if stop.is_set():
        raise InterruptedRun(2, hint="run the same command again to go on from here")
