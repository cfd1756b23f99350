"""What a model has changed that has no low rank: stored whole, refused, or dropped."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from merge_kit.architecture.config import class_of
from merge_kit.architecture.ties import WITH_HEAD, embedding_for, head_name, is_tied
from merge_kit.errors import MergeKitError, MismatchError
from merge_kit.plan.extracting.pairs import SHOWN, Pair
from merge_kit.plan.models import Held, Model

_PREFIX = "base_model.model."
_HEADS = {"gpt_neox_japanese": "embed_out", "whisper": "proj_out"}
"""What programs call the head, by model_type; "lm_head" for all others."""


@dataclass
class Rest:
    """What an adapter holds whole.

    Attributes:
        whole: Name in the adapter -> what is stored.
        modules: modules_to_save.
        biases: Whether biases are among it whose modules are not stored whole.
        outside: Whether one of them is of a module that is not factored.
        dropped: What is changed and left out.
        errors: What is changed and must not be, or cannot be held.
    """

    whole: dict[str, Held] = field(default_factory=dict)
    modules: list[str] = field(default_factory=list)
    biases: bool = False
    outside: bool = False
    dropped: list[Pair] = field(default_factory=list)
    errors: list[MergeKitError] = field(default_factory=list)


def rest_of(
    pairs: Sequence[Pair],
    changed: Sequence[Pair],
    choices: Mapping[str, str],
    factored: Collection[str],
    models: tuple[Model, Model],
) -> Rest:
    """Return what becomes of what is changed and has no low rank.

    Args:
        pairs: All tensors.
        changed: Those that it is about.
        choices: "save", "refuse" or "drop", by name.
        factored: Modules whose weight is factored.
        models: Base and model.
    """
    rest, tuned = Rest(), models[1].label
    rest.dropped = [pair for pair in changed if choices[pair.name] == "drop"]
    _refuse(rest, [pair.name for pair in changed if choices[pair.name] == "refuse"], tuned)
    saved = [pair for pair in changed if choices[pair.name] == "save"]
    modules = _Modules(pairs, factored)
    wanted = {pair.module for pair in saved if pair.leaf != "bias"}
    chosen = modules.around(wanted)
    clashes = [m for m in chosen if m not in wanted and not modules.holds(m)]
    outcasts = {pair.name: why for pair in saved if (why := modules.why_not(pair))}
    outcasts |= dict.fromkeys(clashes, _BESIDE)
    _cannot(rest, outcasts, tuned)
    for module in chosen:
        if modules.holds(module):
            rest.modules.append(module)
            for pair in modules.members(module):
                assert pair.tuned is not None  # members have it
                rest.whole[f"{_PREFIX}{module}.{pair.leaf}"] = pair.tuned
    for module, held in _tied(models[0], pairs, saved):
        rest.modules.append(module)
        rest.whole[f"{_PREFIX}{module}.weight"] = held
    for pair in saved:
        if pair.leaf == "bias" and pair.module not in rest.modules and pair.tuned is not None:
            inside = ".base_layer" if pair.module in factored else ""
            rest.whole[f"{_PREFIX}{pair.module}{inside}.bias"] = pair.tuned
            rest.biases, rest.outside = True, rest.outside or not inside
    return rest


_BESIDE = "peft stores modules whole, and it is beside modules or beside factors"
_ELSEWHERE = "an adapter is of one program, and it is of another folder"
_LACKING = "the module has none in the base, and peft adds none"
"""Why no adapter can hold a tensor."""


class _Modules:
    """The modules of a model, and which of them peft can put whole ones in place of."""

    def __init__(self, pairs: Sequence[Pair], factored: Collection[str]) -> None:
        self._factored = factored
        self._members: dict[str, list[Pair]] = {}
        for pair in pairs:
            if pair.tuned is not None and not pair.tuned.component:
                self._members.setdefault(pair.module, []).append(pair)
        self._above = {above for module in self._members for above in _above(module)}
        self._in_base = {pair.module for pair in pairs if pair.base is not None}

    def why_not(self, pair: Pair) -> str:
        """Return why an adapter cannot hold a tensor of the model, "" if it can."""
        if pair.tuned is not None and pair.tuned.component:
            return _ELSEWHERE
        if pair.base is None and pair.module in self._in_base:
            return _LACKING
        return "" if pair.leaf == "bias" or self.holds(pair.module) else _BESIDE

    def members(self, module: str) -> Sequence[Pair]:
        """Return the tensors of a module."""
        return self._members[module]

    def holds(self, module: str) -> bool:
        """Return whether an adapter can hold a module whole: it has no modules inside."""
        return module != "" and module not in self._above and module not in self._factored

    def around(self, chosen: Collection[str]) -> list[str]:
        """Return modules with all that peft takes for them: it compares the ends of names."""
        ends = tuple(module for module in chosen if module)
        return [m for m in self._members if ends and m.endswith(ends)]


def _above(module: str) -> Iterator[str]:
    """Yield the modules that a module is inside of."""
    while module:
        module = module.rpartition(".")[0]
        yield module


def _tied(base: Model, pairs: Sequence[Pair], saved: Sequence[Pair]) -> Iterator[tuple[str, Held]]:
    """Yield modules that have an embedding's weight too, and no tensor of their own in files.

    peft replaces modules, not weights: a new embedding reaches those that are tied to it only where
    each of them is stored whole as well.
    """
    names = {pair.name for pair in pairs}
    embedding = _of_head(base, names)
    for pair in saved:
        if pair.tuned is None:
            continue
        lead = pair.module.removesuffix("shared")
        if pair.name.endswith(_SHARED) and lead != pair.module:
            for side in (f"{lead}encoder.", f"{lead}decoder."):
                is_there = any(other.module.startswith(side) for other in pairs)
                module = f"{side}embed_tokens"
                if is_there and all(other.module != module for other in pairs):
                    yield module, pair.tuned
        if pair.name == embedding:
            kind = str((base.config or {}).get("model_type"))
            yield _HEADS.get(kind, "lm_head"), pair.tuned


_SHARED = "shared.weight"
"""End of the name of an embedding that an encoder and a decoder have both."""


def _of_head(base: Model, names: Collection[str]) -> str | None:
    """Return the embedding that is the head of a base too, None if the head has its own tensor."""
    if is_tied(base.config) is not True or head_name(names) is not None:
        return None
    if not class_of(base.config).endswith(WITH_HEAD):
        return None
    return embedding_for("lm_head.weight", base.specs)


def _refuse(rest: Rest, names: Sequence[str], where: str) -> None:
    if names:
        rest.errors.append(
            MismatchError(
                f"{_listed(names)} changed and {_have(names)} no low rank",
                where=where,
                hint="rest: save (--rest save) stores them whole, rest: drop leaves them out",
            )
        )


def _cannot(rest: Rest, outcasts: Mapping[str, str], where: str) -> None:
    """Refuse tensors that no adapter can hold.

    Args:
        outcasts: Name -> why.
    """
    for why in dict.fromkeys(outcasts.values()):
        names = [name for name, its in outcasts.items() if its == why]
        rest.errors.append(
            MismatchError(
                f"{_listed(names)} changed, and no adapter of peft can hold {_it(names)}: {why}",
                where=where,
                hint="rest: drop (--rest drop) leaves them out",
            )
        )


def _listed(names: Sequence[str]) -> str:
    if len(names) == 1:
        return f"{names[0]} is"
    return f"{len(names)} tensors ({shown(names)}) are"


def shown(names: Sequence[str]) -> str:
    """Return the first of some names."""
    return ", ".join(names[:SHOWN]) + (", ..." if len(names) > SHOWN else "")


def _have(names: Sequence[str]) -> str:
    return "has" if len(names) == 1 else "have"


def _it(names: Sequence[str]) -> str:
    return "it" if len(names) == 1 else "them"
