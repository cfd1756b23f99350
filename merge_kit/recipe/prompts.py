"""`positive_prompts` and `negative_prompts` of models that become experts -> values."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from merge_kit.recipe.findings import Findings
from merge_kit.recipe.keys import PROMPT_KEYS
from merge_kit.recipe.nodes import Node
from merge_kit.recipe.values import Entry, Parameters, Prompts, Stage

MAX_PROMPTS = 1000
"""Most texts of one list; each takes a pass through the base model."""

MAX_BYTES = 8192
"""Most bytes of one text, as UTF-8."""

ROUTERS_OF_PROMPTS = ("cheap_embed", "hidden", "hidden_avg")
"""Routers whose rows are made of prompts."""


def read_prompts(findings: Findings, fields: Mapping[str, Node]) -> Prompts | None:
    """Return the prompts of an entry, None where it has none."""
    positive, negative = (_texts(findings, fields.get(key)) for key in PROMPT_KEYS)
    given = fields.get("positive_prompts")
    is_given = given is not None and not given.is_empty
    return Prompts(positive, negative) if is_given or negative else None


def _texts(findings: Findings, node: Node | None) -> tuple[str, ...]:
    if node is None:
        return ()
    items = findings.items(node)
    if len(items) > MAX_PROMPTS:
        findings.wrong(node, f"at most {MAX_PROMPTS:,} texts")
        return ()
    found = (_text(findings, item) for item in items)
    return tuple(text for text in found if text is not None)


def _text(findings: Findings, node: Node) -> str | None:
    if node.content == "":
        return ""  # published recipes say so where every token is an expert's
    text = findings.text(node)
    if text is None:
        return None
    if any("\ud800" <= letter <= "\udfff" for letter in text):
        findings.error(node.mark, f"{node.name} holds half a character", "write it as UTF-8")
        return None
    size = len(text.encode())
    if size > MAX_BYTES:
        problem = f"{node.name} has {size:,} bytes, expected at most {MAX_BYTES:,}"
        findings.error(node.mark, problem, "a few sentences say as much to a router")
        return None
    return text


def check_experts(findings: Findings, stage: Stage, parameters: Node | None) -> None:
    """Refuse experts without the prompts that a router is made of; note a mixture of one model.

    A shared expert needs none, since no router chooses it: its gate is then zero.

    Args:
        findings: Where problems and notes go.
        stage: A sparse upcycling.
        parameters: Its parameters as they are written.
    """
    router, key = _router(stage.parameters, parameters)
    experts = stage.models
    if router in ROUTERS_OF_PROMPTS:
        shared = [entry for entry in stage.shared_experts if entry.prompts is not None]
        _require(findings, (*experts, *shared), f"{key}: {router}", f"write {key}: random")
        prompts = {expert.prompts for expert in experts}
        if len(prompts) == 1 < len(experts) and prompts.isdisjoint((None, Prompts(()))):
            problem = "all experts have the same prompts, so that no router can tell them apart"
            findings.error(experts[1].mark, problem, "list for each what is to go to it")
    plain = {(expert.model, tuple(expert.parameters)) for expert in experts}
    if len(experts) > 1 and plain == {(experts[0].model, ())}:
        sentence = "all experts are one model: which one a token passes means nothing until trained"
        findings.note(stage.mark, sentence)


def _require(findings: Findings, entries: Sequence[Entry], router: str, instead: str) -> None:
    for entry in entries:
        prompts = entry.prompts
        if prompts is None or (prompts.negative and not prompts.positive):
            problem = f"{entry.model.text!r} has no positive_prompts, which {router} needs"
            hint = f"list texts that are to go to this expert, or {instead}"
            findings.error(entry.mark, problem, hint)


def _router(parameters: Parameters, written: Node | None) -> tuple[str, str]:
    """Return the router of a recipe, "" where it is not one word, and the key that names it."""
    setting = parameters.get("router")
    if setting is None:
        return "random", "router"
    value = setting.rules[0].values[0]
    entries = written.content if written is not None else None
    key = entries["router"].name if isinstance(entries, Mapping) else "router"
    return (value if isinstance(value, str) else ""), key
