"""Adapters of one model that name its modules with other words in front.

An adapter that was trained on the model without its head calls `layers.0` what others call
`model.layers.0`, and programs have renamed parts of models: `language_model.model.layers` became
`model.language_model.layers`. Taken by their names, two adapters would change different modules,
and the one that peft does not find would be lost.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import permutations

from merge_kit.architecture.components import kind_of
from merge_kit.architecture.stacks import outermost
from merge_kit.architecture.ties import is_head
from merge_kit.errors import MismatchError
from merge_kit.plan.adapters.groups import Member
from merge_kit.plan.adapters.heads import (
    closest,
    component_of,
    is_same_module,
    layout_of,
    may_follow,
    of_towers,
    stack_beside,
    table_beside,
    verdict,
)
from merge_kit.plan.findings import Findings

_KOHYA = (
    ("lora_te1_", "lora_te_"),
    ("lora_te_", "lora_te1_"),
    ("lora_transformer_", "lora_unet_"),
    ("lora_unet_", "lora_transformer_"),
)
"""Prefixes of kohya for one component: as one program writes it, and as another does."""

_HINT = (
    "if they are one part of the model, rename the modules in one of the files; if they are two, "
    "merge both adapters into the base (base+one+two), whose names tell them apart"
)


@dataclass(frozen=True, slots=True)
class _Place:
    """One module of an adapter, by its own name, that stands for others with the same path."""

    label: str
    module: str


@dataclass
class _Paths:
    """Paths before the layer numbers, and paths of modules outside layers; by the first's names.

    Attributes:
        modules: Of the style of kohya, whose names have no parts.
    """

    heads: dict[str, _Place] = field(default_factory=dict)
    loose: dict[str, _Place] = field(default_factory=dict)
    modules: dict[str, _Place] = field(default_factory=dict)

    def add(self, other: _Paths, renamed: Callable[[str], str]) -> None:
        """Add what an adapter has."""
        for mine, its in (
            (self.heads, other.heads),
            (self.loose, other.loose),
            (self.modules, other.modules),
        ):
            for path, place in its.items():
                mine.setdefault(renamed(path), place)


def with_one_prefix(adapters: Sequence[Member], findings: Findings) -> list[Member]:
    """Return the adapters with the names of the first that has the same modules; note each.

    Where names alone don't tell whether two adapters change the same modules, that is a problem.
    Paths that one adapter has both are never the same.
    """
    every = [_paths(member) for member in adapters]
    apart = {pair for paths in every for pair in permutations(paths.heads, 2)}
    known, found = _Paths(), list[Member]()
    for member, own in zip(adapters, every, strict=True):
        heads = _heads(own, known, apart, findings)
        changes = [_change(old, new) for old, new in heads.items() if old != new]
        renames = heads | _loose(own, known, changes, findings) | _kohya(own, known, findings)
        _check_layouts(own, known, findings)
        _note(member, renames, changes, findings)
        changed = any(old != new for old, new in renames.items())
        found.append(replace(member, renames=renames) if changed else member)
        known.add(own, found[-1].renamed)
    return found


def _paths(member: Member) -> _Paths:
    found, label = _Paths(), member.model.label
    for module in _modules(member):
        place = outermost(module)
        if member.adapter.style == "kohya":
            found.modules[module] = _Place(label, module)
        elif place is None:
            found.loose[module] = _Place(label, module)
        else:
            found.heads.setdefault(place[0], _Place(label, module))
    return found


def _modules(member: Member) -> Iterator[str]:
    """Yield every module that an adapter changes, by factors or as a whole."""
    adapter = member.adapter
    yield from (update.module for update in adapter.updates)
    yield from (saved.tensor.rpartition(".")[0] for saved in adapter.saved)
    yield from (rows.module for rows in adapter.rows)


def _heads(
    own: _Paths, known: _Paths, apart: set[tuple[str, str]], findings: Findings
) -> dict[str, str]:
    """Return what the paths before the layer numbers are to be called."""
    found = {head: head for head in own.heads}
    chosen: dict[str, list[str]] = {}
    unsure: dict[str, list[str]] = {}
    unmatched: list[str] = []
    for head in own.heads:
        if head in known.heads:
            continue
        told = {o: verdict(head, o) for o in known.heads if (head, o) not in apart}
        chosen[head] = closest(head, [o for o, what in told.items() if what == "same"])
        unsure[head] = [o for o, what in told.items() if what == "unsure"]
    claims = Counter(best[0] for best in chosen.values() if len(best) == 1)
    for head, best in chosen.items():
        doubtful = best or [other for other in unsure[head] if other not in claims]
        if len(best) == 1 and claims[best[0]] == 1:
            found[head] = best[0]
        elif doubtful:
            findings.problem(_unsure(own.heads[head], known.heads[doubtful[0]]))
        else:
            unmatched.append(head)
    beside = {
        head: name for head in unmatched if (name := stack_beside(head, known.heads, known.loose))
    }
    return _with_siblings(found | beside, [h for h in unmatched if h not in beside], known)


def _with_siblings(
    heads: Mapping[str, str], unmatched: Sequence[str], known: _Paths
) -> dict[str, str]:
    """Return the names of stacks, with those that only one adapter has named as its others are."""
    found = dict(heads)
    changes = [_change(old, new) for old, new in heads.items() if old != new]
    for head in unmatched:
        names = [name for old, new, name in _led(head, changes) if may_follow(head, old, new)]
        if names and names[0] not in known.heads and names[0] not in heads:
            found[head] = names[0]
    return found


def _loose(
    own: _Paths,
    known: _Paths,
    changes: Sequence[tuple[str, str, str]],
    findings: Findings,
) -> dict[str, str]:
    """Return what modules outside layers are to be called: as the stacks, else by their ends."""
    found: dict[str, str] = {}
    for module in own.loose:
        leads = [name for _, _, name in _led(module, changes)]
        others = [o for o in known.loose if o not in own.loose and is_same_module(module, o)]
        there = [lead for lead in leads if lead in known.loose][:1] or closest(module, others)
        if module in known.loose:
            found[module] = module
        elif len(there) > 1:
            findings.problem(_unsure(own.loose[module], known.loose[there[0]]))
        elif there:
            found[module] = there[0]
        else:
            stays = not leads or is_head(f"{module}.weight")
            found[module] = _beside(module, own, known) or (module if stays else leads[0])
    return found


def _beside(module: str, own: _Paths, known: _Paths) -> str | None:
    """Return what an embedding is to be called, of an adapter without layers of its own."""
    return None if own.heads else table_beside(module, known.heads)


def _led(path: str, changes: Sequence[tuple[str, str, str]]) -> Iterator[tuple[str, str, str]]:
    """Yield changes of prefix that a path may have, the longest first, and what it is then."""
    told = [*sorted(changes, key=lambda change: -len(change[0])), *of_towers(changes)]
    for old, new, kind in told:
        again = not old and path.startswith(new)
        if path.startswith(old) and not again and _follows(path, kind, {old, new}):
            yield old, new, new + path.removeprefix(old)


def _follows(module: str, kind: str, leads: set[str]) -> bool:
    """Return whether a module outside layers has the change of prefix of a stack of this kind."""
    own = kind_of(module)
    if own == "multi_modal_projector":  # it may lie beside the towers, or in that for vision
        return kind in (own, "vision") or leads == {"", "model."}
    return own == kind


def _change(old: str, new: str) -> tuple[str, str, str]:
    """Return what stands in front of a stack in both namings, and the kind of the stack."""
    one, two = old.split("."), new.split(".")
    while one and two and one[-1] == two[-1]:
        one.pop()
        two.pop()
    return "".join(f"{w}." for w in one), "".join(f"{w}." for w in two), kind_of(old)


def _kohya(own: _Paths, known: _Paths, findings: Findings) -> dict[str, str]:
    """Return what modules with kohya's prefixes are to be called."""

    def first(paths: _Paths, lead: str) -> str | None:
        return next((name for name in paths.modules if name.startswith(lead)), None)

    found: dict[str, str] = {}
    for old, new in _KOHYA:
        if not first(own, old) or first(own, new) or first(known, old) or not first(known, new):
            continue
        found |= {
            name: new + name.removeprefix(old) for name in own.modules if name.startswith(old)
        }
        label = next(iter(own.modules.values())).label
        findings.note(_taken(label, f"with {old!r} in front", f"with {new!r} in front"))
    for old, new in (("lora_te_", "lora_te2_"), ("lora_te2_", "lora_te_")):
        one, two = first(own, old), first(known, new)
        told = any(first(paths, "lora_te1_") for paths in (own, known))
        told |= first(own, new) is not None or first(known, old) is not None
        if one and two and not told:
            findings.problem(_unsure(own.modules[one], known.modules[two]))
    return found


def _check_layouts(own: _Paths, known: _Paths, findings: Findings) -> None:
    """Record a problem if blocks of a diffusion model have the names of different programs."""
    mine, others = _layouts(own), _layouts(known)
    for (component, layout), place in mine.items():
        other = next((p for (c, o), p in others.items() if c == component and o != layout), None)
        if other is not None and (component, layout) not in others:
            findings.problem(_unsure(place, other))


def _layouts(paths: _Paths) -> dict[tuple[str, str], _Place]:
    found: dict[tuple[str, str], _Place] = {}
    for path, place in (*paths.heads.items(), *paths.modules.items()):
        layout = layout_of(f"{path}.")
        if layout:
            found.setdefault((component_of(path), layout), place)
    return found


def _unsure(one: _Place, other: _Place) -> MismatchError:
    return MismatchError(
        f"{one.label} changes {one.module}, {other.label} changes {other.module}, and their names "
        "do not tell whether these are parts of one stack of layers",
        where=one.module,
        hint=_HINT,
    )


def _note(
    member: Member,
    renames: Mapping[str, str],
    changes: Sequence[tuple[str, str, str]],
    findings: Findings,
) -> None:
    label = member.model.label
    for old, new, _ in changes:
        findings.note(_taken(label, _shown(old), _shown(new)))
    if not changes and member.adapter.style != "kohya":
        for old, new in renames.items():
            if old != new:
                findings.note(_taken(label, repr(old), repr(new)))


def _taken(label: str, old: str, new: str) -> str:
    return f"{label} names its modules {old} and the others {new}: they are taken for the same"


def _shown(prefix: str) -> str:
    return f"with {prefix.removesuffix('.')!r} in front" if prefix else "without that"
