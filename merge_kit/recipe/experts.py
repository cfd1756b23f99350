"""A document as mergekit-moe reads it -> the same in the words of `sparse_upcycle`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from merge_kit.recipe.findings import Findings
from merge_kit.recipe.keys import MOE_EXPERT_KEYS, MOE_KEYS, PROMPT_KEYS, RECIPE_KEYS
from merge_kit.recipe.nodes import Content, Node

GATE_MODES: Mapping[str, tuple[str, float | None]] = {
    "hidden": ("hidden", None),
    "hidden_avg": ("hidden_avg", None),
    "hidden_last": ("hidden", None),
    "cheap_embed": ("cheap_embed", None),
    "random": ("random", 1.0),
    "uniform_random": ("uniform_random", None),
}
"""The router that each gate mode is, and its scale."""

ARCHITECTURES = {"Mixtral": "mixtral", "Qwen MoE": "qwen2_moe", "Qwen3 MoE": "qwen3_moe"}
DEEPSEEK = "DeepSeek MoE"

SIGNS = ("experts", "gate_mode", "experts_per_token")
"""Keys of which a document without merge_method has one if mergekit-moe reads it."""

_SCALES = ("noise_scale", "residual_scale")
_KEPT = ("base_model", "dtype", "name", "seed", "shard_size", "output")
_INSTEAD = dict.fromkeys(
    RECIPE_KEYS,
    "a recipe of experts has no such key; write it with merge_method: sparse_upcycle and models",
)
_EXPERT_HINTS = {"model": "write source_model: NAME", "parameters": "write noise_scale: NUMBER"}


def is_of_experts(node: Node) -> bool:
    """Return whether a document is one that mergekit-moe reads."""
    keys = node.content if isinstance(node.content, Mapping) else {}
    return "merge_method" not in keys and any(key in keys for key in SIGNS)


def lowered(node: Node, findings: Findings) -> Node:
    """Return a document of mergekit-moe in this language, each value at its place; others as is.

    What is wrong with its own keys goes to the findings.
    """
    if not is_of_experts(node):
        return node
    fields = findings.fields(node, MOE_KEYS, ("base_model", "experts"), _INSTEAD)
    experts = _experts(findings, fields.get("experts"))
    shared = _experts(findings, fields.get("shared_experts"))
    made = {key: fields[key] for key in _KEPT if key in fields}
    made["merge_method"] = _put(node, "merge_method", "sparse_upcycle")
    if "experts" in fields:
        made["models"] = replace(fields["experts"], content=experts)
    if shared:
        made["shared_experts"] = replace(fields["shared_experts"], content=shared)
    parameters = {
        **_router(findings, fields.get("gate_mode"), node),
        **_counts(findings, fields),
        **_architecture(findings, fields),
    }
    made["parameters"] = _put(node, "parameters", parameters)
    return replace(node, content=made)


def _put(node: Node, key: str, content: Content) -> Node:
    """Return a value that no text holds, at the place of the document."""
    return Node(content, node.mark, (*node.path, key), node.mark)


def _experts(findings: Findings, node: Node | None) -> tuple[Node, ...]:
    """Return experts as entries with model, prompts and parameters."""
    if node is None:
        return ()
    items = findings.items(node)
    if not items and isinstance(node.content, tuple) and node.name == "experts":
        findings.wrong(node, "at least one expert", "write for example [{source_model: NAME}]")
    entries = [_expert(findings, item) for item in items]
    return tuple(entry for entry in entries if entry is not None)


def _expert(findings: Findings, node: Node) -> Node | None:
    fields = findings.fields(node, MOE_EXPERT_KEYS, ("source_model",), _EXPERT_HINTS)
    if "source_model" not in fields:
        return None
    made = {"model": fields["source_model"]}
    made |= {key: fields[key] for key in PROMPT_KEYS if key in fields}
    scales = {key: fields[key] for key in _SCALES if key in fields}
    if scales:
        made["parameters"] = _put(node, "parameters", scales)
    return replace(node, content=made)


def _router(findings: Findings, node: Node | None, document: Node) -> dict[str, Node]:
    place = node or _put(document, "gate_mode", "hidden")
    mode = findings.choice(place, tuple(GATE_MODES))
    if mode is None:
        return {}
    router, scale = GATE_MODES[mode]
    made = {"router": replace(place, content=router)}
    return made if scale is None else made | {"router_scale": replace(place, content=scale)}


def _counts(findings: Findings, fields: Mapping[str, Node]) -> dict[str, Node]:
    """Return how many experts there are, and how many a token passes."""
    content = fields["experts"].content if "experts" in fields else None
    experts = len(content) if isinstance(content, tuple) else 0
    if not experts:
        return {}
    place, top_k = fields["experts"], 2
    if "experts_per_token" in fields:
        place = fields["experts_per_token"]
        found = findings.whole(place)
        if found is None:
            return {}
        top_k = found
    if not 1 <= top_k <= experts:
        of = "experts_per_token is {}, expected from 1 to the number of experts, {}"
        hint = "list more experts, or write experts_per_token: 1"
        findings.error(place.mark, of.format(top_k, experts), hint)
        return {}
    return {
        "num_experts": replace(fields["experts"], content=experts),
        "experts_per_token": replace(place, content=top_k),
    }


def _architecture(findings: Findings, fields: Mapping[str, Node]) -> dict[str, Node]:
    """Return the layout that begins as `architecture` does, the first that fits."""
    node, shared = fields.get("architecture"), fields.get("shared_experts")
    has_shared = shared is not None and not shared.is_empty
    if node is None:
        made = {"architecture": replace(shared, content="qwen2_moe")} if shared else {}
        return made if has_shared else {}
    text = findings.text(node)
    if text is None:
        return {}
    begun = [name for name in (*ARCHITECTURES, DEEPSEEK) if name.lower().startswith(text.lower())]
    if begun == [DEEPSEEK]:
        _refuse_deepseek(findings, node)
        return {}
    if not begun:
        findings.choice(node, tuple(ARCHITECTURES))
        return {}
    fitting = [name for name in begun if (name == "Qwen MoE") == has_shared]
    if has_shared and not fitting:
        problem = f"{begun[0]} has no shared expert"
        findings.error(node.mark, problem, "write architecture: Qwen MoE, or no shared_experts")
        return {}
    return {"architecture": replace(node, content=ARCHITECTURES[(fitting or begun)[0]])}


def _refuse_deepseek(findings: Findings, node: Node) -> None:
    problem = f"{DEEPSEEK} is not written: its models load only with code that comes with a model"
    hint = "write architecture: Mixtral, or Qwen MoE where there is a shared expert"
    findings.error(node.mark, problem, hint)


def with_model_keys(nodes: Sequence[Node]) -> tuple[Node, ...]:
    """Return entries in which `source_model`, where it stands for `model`, is called that."""
    return tuple(_renamed(node) for node in nodes)


def _renamed(node: Node) -> Node:
    entries = node.content
    if not isinstance(entries, Mapping) or "source_model" not in entries or "model" in entries:
        return node
    named = {"model" if key == "source_model" else key: value for key, value in entries.items()}
    return replace(node, content=named)
