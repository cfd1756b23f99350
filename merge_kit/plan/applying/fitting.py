"""What an adapter touches in a model: names matched, shapes checked."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod

from merge_kit.architecture.ties import embedding_for, is_head
from merge_kit.architecture.turned import TURNED, is_turned
from merge_kit.core.dtypes import is_float
from merge_kit.core.tensors import TensorSpec
from merge_kit.errors import MismatchError
from merge_kit.io.adapter_values import Saved, TokenRows, Update
from merge_kit.io.strict_json import shown
from merge_kit.plan.applying.changes import Change, Lie
from merge_kit.plan.applying.names import Matches, match_kohya, match_names
from merge_kit.plan.applying.split_experts import Pieces, expert_lie, fused_experts
from merge_kit.plan.models import Model

SHOWN = 5
"""Names that an error lists."""

_WEIGHTS = (".weight", ".in_proj_weight", "")
"""What a module's path is continued by to the name of its weight."""


What = Change | Saved | TokenRows
"""What an adapter may do to a tensor: add to it, replace it, or replace some rows."""


@dataclass(frozen=True, slots=True)
class Touch:
    """One thing that an adapter does to one tensor of a model."""

    tensor: str
    what: What


class Fitter:
    """Finds what one adapter touches in one model.

    Args:
        heads: Heads that a tied model does not store, with the spec that they would have.
        saved: What of the adapter's whole tensors counts.
    """

    def __init__(
        self, adapter: Model, model: Model, heads: Mapping[str, TensorSpec], saved: Sequence[Saved]
    ) -> None:
        assert adapter.adapter is not None
        self.label, self.adapter, self.model = adapter.label, adapter.adapter, model
        self.saved = saved
        self._specs = {**model.specs, **heads}
        self._shapes = {name: spec.shape for name, spec in self._specs.items()}
        self._fused: Mapping[str, Pieces] = {}
        if any(update.kind == "experts" for update in self.adapter.updates):
            self._fused = fused_experts(self._shapes)
        self._names = [*self._shapes, *self._fused]
        self._misfits: list[str] = []
        self._flag_means, self._rows_wanted = True, 0

    def touches(self) -> tuple[Touch, ...]:
        """Return everything that the adapter touches.

        Raises:
            MismatchError: If modules of the adapter are absent from the model, could be several of
                its tensors, or do not fit them.
        """
        weights = self._weights()
        self._flag_means = not any(self._contradicts(u, weights) for u in self.adapter.updates)
        whole = list(self._whole_names())
        others = self._found(match_names(whole, self._names))
        self._report_absent([name for name in whole if name not in others], len(whole), "tensors")
        touched = [touch for u in self.adapter.updates for touch in self._update(u, weights)]
        for name in {touch.tensor: None for touch in touched}:
            if not is_float(self._specs[name].dtype):
                self._misfits.append(f"{name} holds {self._specs[name].dtype}, no floats")
        touched += [self._saved(saved, others[saved.tensor]) for saved in self.saved]
        touched += [self._rows(r, others[f"{r.module}.weight"]) for r in self.adapter.rows]
        if self._misfits:
            count, shown = len(self._misfits), "; ".join(self._misfits[:SHOWN])
            more = "; ..." if count > SHOWN else ""
            raise MismatchError(
                f"does not fit {self.model.label} in {count} tensors: {shown}{more}",
                where=self.label,
                hint=self._resize() if self._rows_wanted else self._made_for(),
            )
        return tuple(touched)

    def _resize(self) -> str:
        return (
            f"bring the model's embedding and head to {self._rows_wanted} rows first, as "
            f"resize_token_embeddings({self._rows_wanted}) of transformers does"
        )

    def _made_for(self) -> str:
        if self.adapter.base:
            return f"it was made for {shown(self.adapter.base)}; name that model"
        return "name the model that it was made for"

    def _whole_names(self) -> Iterator[str]:
        yield from (saved.tensor for saved in self.saved)
        yield from (f"{rows.module}.weight" for rows in self.adapter.rows)

    def _weights(self) -> Mapping[str, str]:
        """Return the tensor that each module's update changes."""
        updates = self.adapter.updates
        kohya = {u.module for u in updates if self.adapter.style == "kohya" and "." not in u.module}
        found = self._found(match_kohya(kohya, self._names))
        whole = {u.module for u in updates if u.kind == "experts"}
        left = [u.module for u in updates if u.module not in kohya]
        for ending in _WEIGHTS:
            names = {m if m in whole else m + ending: m for m in left}
            for name, real in self._found(match_names(names, self._names)).items():
                found[names[name]] = real
            left = [module for module in left if module not in found]
        self._report_absent([u.module for u in updates if u.module not in found], len(updates))
        return found

    def _report_absent(self, names: Sequence[str], total: int, what: str = "modules") -> None:
        if names:
            shown = ", ".join(names[:SHOWN]) + (", ..." if len(names) > SHOWN else "")
            raise MismatchError(
                f"{len(names)} of {total} {what} are not in {self.model.label}: {shown}",
                where=self.label,
                hint=self._made_for(),
            )

    def _found(self, matches: Matches) -> dict[str, str]:
        """Return the matches, all of which must be clear."""
        for name, could_be in matches.ambiguous.items():
            raise MismatchError(
                f"{name} could be {' or '.join(could_be[:SHOWN])} of {self.model.label}",
                where=self.label,
                hint="apply it to the component that it was made for",
            )
        return matches.found

    def _update(self, update: Update, weights: Mapping[str, str]) -> Iterator[Touch]:
        name = weights[update.module]
        if update.kind == "experts":
            yield from self._experts(update, name)
            return
        shape = self._shapes[name]
        lie = self._lie(update, shape)
        if lie is None:
            self._misfit(update, name, shape)
            return
        yield Touch(name, Change(update, shape, update.scale, lie))
        outputs = shape[1] if lie == "transposed" else shape[0]
        magnitude = update.magnitude
        if magnitude is not None and magnitude.spec.numel != outputs:
            self._misfits.append(
                f"{update.module} has lengths of shape {list(magnitude.spec.shape)}, "
                f"{name} is {list(shape)}"
            )
        if update.bias is not None:
            yield from self._bias(update, name, outputs)

    def _bias(self, update: Update, weight: str, outputs: int) -> Iterator[Touch]:
        """Yield the change of the bias that belongs to a weight."""
        assert update.bias is not None
        name = weight.removesuffix("weight") + "bias"
        shape, given = self._shapes.get(name), update.bias.spec.shape
        if shape is None:
            raise MismatchError(
                f"{update.module} changes a bias, and {self.model.label} has no {name}",
                where=self.label,
                hint="train it without lora_bias, or on a model that has biases",
            )
        if shape != given or shape != (outputs,):
            found = f"{update.module} changes a bias of shape {list(given)}"
            self._misfits.append(f"{found}, {name} is {list(shape)}")
            return
        yield Touch(name, Change(update, shape, update.scale, bias=True))

    def _lie(self, update: Update, shape: tuple[int, ...]) -> Lie | None:
        """Return how an update lies on a weight, None if it does not fit."""
        a, b = update.a.spec.shape, update.b.spec.shape
        if update.kind == "embedding":
            return "transposed" if shape == (a[1], b[0]) else None
        if len(shape) < 2 or a[0] != update.rank or prod(b[1:]) != update.rank:
            return None
        straight = shape[0] == b[0] and _trimmed(shape[1:]) == _trimmed(a[1:])
        turned = len(shape) == 2 and shape == (prod(a[1:]), b[0])
        turned &= update.transposed or self._is_conv1d(update)
        if straight and turned:
            return "transposed" if self._is_turned(update) else "straight"
        if not (straight or turned):
            return None
        return "transposed" if turned else "straight"

    def _is_conv1d(self, update: Update) -> bool:
        """Return whether the module is one that stores its weight (in, out), as GPT-2 has it."""
        return is_turned(self.model.config, update.module)

    def _is_turned(self, update: Update) -> bool:
        """Return whether a square weight is stored (in, out).

        The flag of the config is what training began or ended with, for all modules; weights that
        are not square tell whether it means anything.
        """
        if self._is_conv1d(update):
            return True
        known = str((self.model.config or {}).get("model_type")) in TURNED
        return update.transposed and self._flag_means and not known

    def _contradicts(self, update: Update, weights: Mapping[str, str]) -> bool:
        """Return whether a weight is stored (out, in) although the flag says otherwise."""
        shape = (update.b.spec.shape[0], *update.a.spec.shape[1:])
        square = len(set(shape)) == 1
        return update.transposed and not square and self._shapes[weights[update.module]] == shape

    def _experts(self, update: Update, name: str) -> Iterator[Touch]:
        inputs, outputs = update.a.spec.shape[1], update.b.spec.shape[0]
        if name in self._fused:
            yield from self._split(update, name, inputs, outputs)
            return
        shape = self._shapes[name]
        if update.experts == 1 and shape == (outputs, inputs):
            yield Touch(name, Change(update, shape, update.scale, expert=0))
            return
        straight = shape == (update.experts, outputs, inputs)
        turned = shape == (update.experts, inputs, outputs)
        if not (straight or turned):
            self._misfit(update, name, shape)
            return
        lie: Lie | None = "straight" if straight else "transposed"
        if straight and turned:
            lie = expert_lie(name, self._shapes)
        if lie is None:
            raise MismatchError(
                f"{name} is {list(shape)}, and nothing tells its inputs from its outputs",
                where=self.label,
                hint="merge it into its base with the program that trained it",
            )
        yield Touch(name, Change(update, shape, update.scale, lie))

    def _split(self, update: Update, name: str, inputs: int, outputs: int) -> Iterator[Touch]:
        """Yield the change of each expert's tensors where the model stores them apart."""
        pieces = self._fused[name]
        first = [self._shapes[piece] for piece in pieces[0]]
        whole = (len(pieces), sum(shape[0] for shape in first), *first[0][1:])
        alike = all([self._shapes[p] for p in names] == first for names in pieces)
        if not alike or whole != (update.experts, outputs, inputs):
            self._misfit(update, name, whole)
            return
        for expert, names in enumerate(pieces):
            start = 0
            for piece in names:
                shape = self._shapes[piece]
                rows = (start, start + shape[0])
                yield Touch(piece, Change(update, shape, update.scale, expert=expert, rows=rows))
                start += shape[0]

    def _saved(self, saved: Saved, name: str) -> Touch:
        spec, given = self._specs[name], saved.stored.spec
        if spec.shape != given.shape or is_float(spec.dtype) != is_float(given.dtype):
            if spec.shape[1:] == given.shape[1:] != () and self._is_vocabulary(name):
                self._rows_wanted = given.shape[0]
            alias = "" if saved.tensor == name else f" of {saved.tensor}"
            self._misfits.append(
                f"{name}: the adapter has {given.dtype} {list(given.shape)}{alias}, "
                f"the base has {spec.dtype} {list(spec.shape)}"
            )
        return Touch(name, saved)

    def _is_vocabulary(self, name: str) -> bool:
        """Return whether a tensor has a row for each token."""
        alone = {name: self._specs[name]}
        return is_head(name) or embedding_for("lm_head.weight", alone) is not None

    def _rows(self, rows: TokenRows, name: str) -> Touch:
        shape, given = self._shapes[name], rows.stored.spec.shape
        if len(shape) != 2 or given[1:] != shape[1:] or max(rows.tokens, default=0) >= shape[0]:
            last = max(rows.tokens, default=0)
            self._misfits.append(
                f"rows of {rows.module} up to {last} are {list(given)}, {name} is {list(shape)}"
            )
        return Touch(name, rows)

    def _misfit(self, update: Update, name: str, shape: tuple[int, ...]) -> None:
        a, b = update.a.spec.shape, update.b.spec.shape
        change = [b[0], *a[1:]]
        if update.kind == "embedding":
            change = [a[1], b[0]]
        if update.kind == "experts":
            change = [update.experts, b[0], a[1]]
        self._misfits.append(
            f"{update.module} changes a weight of {change}, {name} is {list(shape)}"
        )


def _trimmed(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Return a shape without the ones at its end: a kernel of one pixel is none."""
    while len(shape) > 1 and shape[-1] == 1:
        shape = shape[:-1]
    return shape
