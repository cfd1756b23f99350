"""Which tensors of a model an adapter's modules are.

An adapter names modules as the program saw them that trained it; files name the same weights with
another prefix, in folders of components, or, as kohya does, with underscores for dots. What is
compared is therefore the path from the first layer number on, and of what stands outside layers
the end of the name. What comes before may have words more, or less, or in another order, but no
other words.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from merge_kit.architecture.components import kind_of, side_of
from merge_kit.architecture.stacks import outermost
from merge_kit.core.names import natural_key

_KOHYA_LEADS = {
    "lora_unet_": ("unet/", "transformer/", "model.diffusion_model.", ""),
    "lora_transformer_": ("transformer/", "model.diffusion_model.", ""),
    "lora_prior_unet_": ("prior/", ""),
    "lora_te_": (
        "text_encoder/",
        "cond_stage_model.transformer.",
        "text_encoders.clip_l.transformer.",
        "",
    ),
    "lora_te1_": (
        "text_encoder/",
        "conditioner.embedders.0.transformer.",
        "text_encoders.clip_l.transformer.",
        "",
    ),
    "lora_te2_": (
        "text_encoder_2/",
        "conditioner.embedders.1.model.",
        "text_encoders.clip_g.transformer.",
        "text_encoders.t5xxl.transformer.",
    ),
    "lora_te3_": ("text_encoder_3/", "text_encoders.t5xxl.transformer."),
}
"""What kohya's prefixes stand for: a folder of a pipeline, or a prefix in a single file."""

_ALIASES = ((".block_sparse_moe.", ".mlp."), ("embed_out.", "lm_head."))
"""Parts of paths that programs have renamed: as files have them, as adapters do."""


@dataclass
class Matches:
    """What was found.

    Attributes:
        found: Name in the adapter -> name in the model.
        absent: Names in the adapter that no tensor of the model is.
        ambiguous: Names in the adapter -> what of the model they could be.
    """

    found: dict[str, str] = field(default_factory=dict)
    absent: list[str] = field(default_factory=list)
    ambiguous: dict[str, tuple[str, ...]] = field(default_factory=dict)


def match_names(wanted: Iterable[str], names: Iterable[str]) -> Matches:
    """Return which of a model's tensors each name of an adapter is.

    Exact names come first. Those of a stack of layers that no exact name belongs to are taken for
    the stack of the model that has all of them, on the same side of an encoder and decoder and in
    the same part of a multimodal model. Names outside layers follow the stacks' change of prefix.

    Args:
        wanted: Names of tensors as the adapter writes them.
        names: Of the model's tensors, with their folder ("unet/conv_in.weight").
    """
    index = _dotted(names)
    matches = Matches()
    rest = []
    for name in dict.fromkeys(wanted):
        if name in index:
            matches.found[name] = index[name]
        else:
            rest.append(name)
    stacks: dict[str, list[str]] = defaultdict(list)
    loose = []
    for name in rest:
        place = outermost(name)
        if place is None:
            loose.append(name)
        else:
            stacks[place[0]].append(name)
    heads = _by_tail(index) if stacks else {}
    exact = {place[0] for name in matches.found if (place := outermost(name)) is not None}
    changes = []
    for head, members in stacks.items():
        if head in exact:
            matches.absent += members
        else:
            changes += _match_stack(head, members, heads, index, matches)
    for name in loose:
        _match_loose(name, changes, index, matches)
    return matches


def match_kohya(modules: Iterable[str], names: Iterable[str]) -> Matches:
    """Return which weight each module is that is written with underscores.

    Args:
        modules: "lora_unet_down_blocks_0_...", the prefix included.
        names: Of the model's tensors, with their folder.
    """
    names, matches = tuple(names), Matches()
    known: dict[str, Mapping[str, tuple[str, ...]]] = {}
    for module in dict.fromkeys(modules):
        prefix = next((p for p in _KOHYA_LEADS if module.startswith(p)), "")
        if prefix not in known:
            known[prefix] = _underscored(_KOHYA_LEADS.get(prefix, ("",)), names)
        found = known[prefix].get(module.removeprefix(prefix), ())
        if len(found) == 1:
            matches.found[module] = found[0]
        elif found:
            matches.ambiguous[module] = found
        else:
            matches.absent.append(module)
    return matches


def _dotted(names: Iterable[str]) -> dict[str, str]:
    """Return the names with a dot behind each folder, and under what parts of them became."""
    names = tuple(names)
    index = {name.replace("/", "."): name for name in names}
    for old, new in _ALIASES:
        for dotted in [dotted for dotted in index if old in dotted]:
            index.setdefault(dotted.replace(old, new), index[dotted])
    return index


def _underscored(leads: Sequence[str], names: Sequence[str]) -> Mapping[str, tuple[str, ...]]:
    """Return the weights below the first of the leads that the model has, by underscored path."""
    folders = any("/" in name for name in names)
    for lead in leads:
        own = [n for n in names if n.startswith(lead) and not (folders and not lead and "/" in n)]
        if not own:
            continue
        index: dict[str, tuple[str, ...]] = {}
        for name in own:
            path = name.removeprefix(lead)
            if path.endswith(".weight"):
                key = path.removesuffix(".weight").replace(".", "_")
                index[key] = (*index.get(key, ()), name)
        return index
    return {}


def _by_tail(index: Mapping[str, str]) -> Mapping[str, set[str]]:
    """Return the heads of layer stacks by what follows them ("3.self_attn.q_proj.weight")."""
    heads: dict[str, set[str]] = defaultdict(set)
    for name in index:
        place = outermost(name)
        if place is not None:
            heads[_tail(name, place[0])].add(place[0])
    return heads


def _tail(name: str, head: str) -> str:
    return name.removeprefix(head).removeprefix(".")


def _joined(head: str, tail: str) -> str:
    return f"{head}.{tail}" if head else tail


def _match_stack(
    head: str,
    members: Sequence[str],
    heads: Mapping[str, set[str]],
    index: Mapping[str, str],
    matches: Matches,
) -> list[tuple[str, str]]:
    """Match the names of one stack; return the change of prefix, if it is found."""
    tails = [_tail(name, head) for name in members]
    coverage = Counter(h for tail in tails for h in heads.get(tail, ()) if _may_be(head, h))
    most = max(coverage.values(), default=0)
    best = _closest(head, [h for h, count in coverage.items() if count == most])
    if most == len(tails) and len(best) > 1:
        for name, tail in zip(members, tails, strict=True):
            matches.ambiguous[name] = tuple(index[_joined(h, tail)] for h in best)
        return []
    for name, tail in zip(members, tails, strict=True):
        there = _joined(best[0], tail) if len(best) == 1 else ""
        if there in index:
            matches.found[name] = index[there]
        else:
            matches.absent.append(name)
    return [_change(head, best[0])] if len(best) == 1 else []


def _may_be(one: str, other: str) -> bool:
    """Return whether two paths may be the same: one has all words of the other.

    They are also on one side of an encoder and decoder, and in one part of a multimodal model.
    """
    words, others = Counter(one.split(".")), Counter(other.split("."))
    if not (words <= others or others <= words):
        return False
    return side_of(one) == side_of(other) and kind_of(one) == kind_of(other)


def _closest(head: str, heads: Sequence[str]) -> list[str]:
    """Return the heads that share most parts with one, of these the shortest."""
    own = Counter(head.split("."))

    def rank(other: str) -> tuple[int, int]:
        parts = Counter(other.split("."))
        return -(own & parts).total(), parts.total()

    first = min(map(rank, heads), default=None)
    return sorted((h for h in heads if rank(h) == first), key=natural_key)


def _change(head: str, other: str) -> tuple[str, str]:
    """Return the prefixes that differ: "transformer.h" and "h" give "transformer." and ""."""
    one, two = head.split("."), other.split(".")
    while one and two and one[-1] == two[-1]:
        one.pop()
        two.pop()
    return "".join(f"{part}." for part in one), "".join(f"{part}." for part in two)


def _match_loose(
    name: str, changes: Sequence[tuple[str, str]], index: Mapping[str, str], matches: Matches
) -> None:
    """Match a name outside layers: by a change of prefix, else by its end."""
    renamed = {new + name.removeprefix(old) for old, new in changes if name.startswith(old)}
    found = {index[other] for other in renamed if other in index}
    if not found:
        tail = "." + ".".join(name.split(".")[-2:])
        found = {
            real
            for other, real in index.items()
            if f".{other}".endswith(tail) and outermost(other) is None and _may_be(name, other)
        }
    if len(found) == 1:
        matches.found[name] = found.pop()
    elif found:
        matches.ambiguous[name] = tuple(sorted(found, key=natural_key))
    else:
        matches.absent.append(name)
