"""What is said of an adapter that was extracted: its config, notes, what became of each tensor."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from math import hypot
from typing import Literal

from merge_kit.architecture.config import Edit, class_of, edit_config
from merge_kit.architecture.vocab import is_tokenizer_file
from merge_kit.core.names import HUB_ID
from merge_kit.plan.accounts import ingredients
from merge_kit.plan.adapters.config import Bias, adapter_config_text
from merge_kit.plan.adapters.ledger import RANK
from merge_kit.plan.adapters.made import OutModule
from merge_kit.plan.extracting.names import short_targets, task_type
from merge_kit.plan.extracting.pairs import Pair, Pairs
from merge_kit.plan.extracting.rest import Rest, shown
from merge_kit.plan.inputs import Inputs
from merge_kit.plan.models import Model
from merge_kit.plan.side_files import lends_files
from merge_kit.plan.values import Fate, SideFile
from merge_kit.plan.walk import stored
from merge_kit.recipe.values import Stage

What = Literal["merged", "copied", "dropped"]


def files(
    stage: Stage, inputs: Inputs, pairs: Pairs, modules: Sequence[OutModule], rest: Rest
) -> tuple[SideFile, ...]:
    """Return the config, and the tokenizer of the model if it is there."""
    kinds = {pair.module: pair for pair in pairs.pairs if pair.kind}
    bias: Bias = "all" if rest.outside else "lora_only" if rest.biases else "none"
    text = adapter_config_text(
        None,
        modules,
        base=_base_name(stage, inputs, pairs.base),
        targets=short_targets(
            [one.module for one in modules],
            {pair.module for pair in pairs.pairs if "/" not in pair.module},
        ),
        saved_modules=rest.modules,
        bias=bias,
        transposed=any(kinds[one.module].turned for one in modules),
    )
    task = Edit(("task_type",), task_type(pairs.base.config))
    text = edit_config(text, [task], "adapter_config.json")
    lender = lends_files(pairs.tuned, inputs).checkpoint
    assert lender is not None  # lends_files
    names = [] if lender.is_file else [n for n in lender.side_files if is_tokenizer_file(n)]
    copies = (SideFile(name, lender.root / name, None) for name in names)
    return (SideFile("adapter_config.json", None, text), *copies)


def _base_name(stage: Stage, inputs: Inputs, base: Model) -> str:
    """Return how the config names the base: as the recipe does, if that is no path."""
    assert stage.base_model is not None  # checked
    path, lender = stage.base_model.path, lends_files(base, inputs).checkpoint
    assert lender is not None  # lends_files
    is_stage = base.checkpoint is None
    return path if HUB_ID.fullmatch(path) and not is_stage else lender.name


def notes(stage: Stage, pairs: Pairs, rest: Rest, norms: Mapping[str, float]) -> tuple[str, ...]:
    """Return what the user should know of an adapter.

    Args:
        norms: Of changes that are dropped, as far as they are known.
    """
    return (*_notes(stage, pairs, rest), *_dropped(rest, norms))


def _notes(stage: Stage, pairs: Pairs, rest: Rest) -> Iterator[str]:
    base, dropped = pairs.base, {pair.name for pair in rest.dropped}
    assert stage.base_model is not None  # checked
    if base.checkpoint is None or base.overlay is not None:
        yield f"the adapter belongs on what {stage.base_model.text} makes, not on a model of disk"
    kind = class_of(base.config)
    if kind and not pairs.naming.renamed and task_type(base.config) is None:
        yield (
            f"modules are named as the files of {base.label} name them; a program that calls those "
            f"of {kind} otherwise will not find them"
        )
    for pair in pairs.pairs:
        if pair.base is None or pair.tuned is None or pair.name in dropped:
            continue
        one, other = pair.base.spec.shape, pair.tuned.spec.shape
        if one != other and one[1:] == other[1:]:
            yield (
                f"{pair.name} has {other[0]:,} rows, and {one[0]:,} in {base.label}: whoever loads "
                f"the adapter must call resize_token_embeddings({other[0]}) on the base first"
            )


def _dropped(rest: Rest, norms: Mapping[str, float]) -> Iterator[str]:
    names = [pair.name for pair in rest.dropped]
    if names:
        count = f"{len(names)} changed tensors are" if len(names) > 1 else "1 changed tensor is"
        known = hypot(*(norms.get(name, 0.0) for name in names))
        norm = f"; the norm of this change is {known:.4g}" if known else ""
        yield f"rest: drop: {count} left out: {shown(names)}{norm}"


def fates(
    models: Sequence[Model], pairs: Pairs, factored: Collection[str], rest: Rest
) -> tuple[Fate, ...]:
    """Return a fate for each tensor of each model, in file order."""
    ledger = _Ledger(models)
    held = {id(tensor) for tensor in rest.whole.values()}
    dropped = {pair.name for pair in rest.dropped}
    for pair in pairs.pairs:
        what, why = _fate(pair, factored, held, dropped)
        if pair.theirs:
            ledger.enter(pairs.tuned, pair.theirs, what, why or _NOT_NEEDED)
        if pair.ours:
            whole = "the adapter holds it whole"
            ledger.enter(
                pairs.base,
                pair.ours,
                "merged" if what == "merged" else "dropped",
                whole if what == "copied" else why or _NOT_NEEDED,
            )
    return ledger.fates()


_NOT_NEEDED = "not changed"


def _fate(
    pair: Pair, factored: Collection[str], held: Collection[int], dropped: Collection[str]
) -> tuple[What, str]:
    """Return what becomes of the model's tensor of a pair, and why it is dropped."""
    if pair.is_computed:
        return "dropped", "programs compute it"
    if pair.kind and pair.module in factored:
        return "merged", ""
    if id(pair.tuned) in held:
        return "copied", ""
    return "dropped", "changed, and left out (rest: drop)" if pair.name in dropped else ""


class _Ledger:
    """Fates as they are decided; of several for one tensor, the most that is done with it."""

    def __init__(self, models: Sequence[Model]) -> None:
        self._models = models
        self._found: dict[tuple[str, str], tuple[What, str]] = {}
        self._places = {
            (leaf.span.path, leaf.span.start): (model.key, name)
            for model in models
            for name, held in model.tensors.items()
            for leaf in stored(held.source)
        }

    def enter(self, model: Model, name: str, what: What, why: str) -> None:
        """Say what becomes of a tensor, or of what it is made of."""
        if model.overlay is not None:
            for used in ingredients(model.overlay, name):
                if used.what == "dropped":
                    self._enter((used.model.key, used.tensor), "dropped", used.why)
                else:
                    more = "merged" if what != "dropped" and used.what == "merged" else what
                    self.enter(used.model, used.tensor, more, why)
        elif model.checkpoint is not None:
            self._enter((model.key, name), what, why)
        else:
            more = "dropped" if what == "dropped" else "merged"
            for leaf in stored(model.tensors[name].source):
                self._enter(self._places[leaf.span.path, leaf.span.start], more, why)

    def _enter(self, key: tuple[str, str], what: What, why: str) -> None:
        old = self._found.get(key)
        if old is None or RANK[old[0]] < RANK[what]:
            self._found[key] = what, "" if what != "dropped" else why

    def fates(self) -> tuple[Fate, ...]:
        """Return them; of what nothing was said, that no part of the adapter is made of it."""
        unused: tuple[What, str] = "dropped", "nothing of the adapter is made of it"
        return tuple(
            Fate(model.key, name, *self._found.get((model.key, name), unused))
            for model in self._models
            for name in model.tensors
        )
