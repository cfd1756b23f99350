"""Dense classes that have the layers of a mixture of experts: names of the MLP, and config.json."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from math import prod
from typing import Any

from merge_kit.architecture.config import Config, Edit, edit_config, read_config
from merge_kit.architecture.expert_groups import ExpertGroup, Piece
from merge_kit.errors import MismatchError, PlanError

PROJECTIONS = ("gate_proj", "up_proj", "down_proj")
"""The matrices of a dense MLP, as `mlp.gate_proj.weight`."""

_SPELLINGS = (PROJECTIONS, ("w1", "w3", "w2"))
_WHERE = "config.json"
_MOST_LAYERS = 10_000
_ROUTING = (
    "num_experts_per_tok",
    "num_experts",
    "num_local_experts",
    "norm_topk_prob",
    "output_router_logits",
    "router_aux_loss_coef",
    "router_jitter_noise",
    "decoder_sparse_step",
    "mlp_only_layers",
    "moe_intermediate_size",
    "shared_expert_intermediate_size",
    "qkv_bias",
    "auto_map",
)
"""Keys that a dense class does not have; those that a config lacks are no matter."""


@dataclass(frozen=True, slots=True)
class Twin:
    """A dense class for a sparse one.

    Attributes:
        sparse: Its model_type, and what its classes begin with.
        dense: The same of the dense class.
        defaults: What the sparse class takes where a config says nothing, and the dense one does
            not.
    """

    sparse: tuple[str, str]
    dense: tuple[str, str]
    defaults: Mapping[str, Any] = field(default_factory=dict)


_MIXTRAL, _QWEN2, _QWEN3 = (
    ("mixtral", "Mixtral"),
    ("qwen2_moe", "Qwen2Moe"),
    ("qwen3_moe", "Qwen3Moe"),
)
TWINS = (
    Twin(
        _MIXTRAL,
        ("mistral", "Mistral"),
        {"rms_norm_eps": 1e-05, "rope_theta": 1e6, "sliding_window": None},
    ),
    Twin(
        _MIXTRAL,
        ("llama", "Llama"),
        {
            "rms_norm_eps": 1e-05,
            "rope_theta": 1e6,
            "num_key_value_heads": 8,
            "max_position_embeddings": 131072,
        },
    ),
    Twin(_QWEN2, ("qwen2", "Qwen2"), {"num_key_value_heads": 16}),
    Twin(_QWEN3, ("qwen3", "Qwen3"), {"num_key_value_heads": 4}),
)
"""The default for each sparse class first."""


def twin_for(config: Config | None, architecture: str | None) -> Twin:
    """Return the dense class for a model.

    Args:
        config: The model's config, None if it has none.
        architecture: The dense model_type that is asked for, None for the default.

    Raises:
        PlanError: If there is none, or without a config none is named.
    """
    if config is None:
        if architecture is None:
            problem = "has no config.json, which would tell the dense class of its layers"
            hint = "name it: parameters: {architecture: mistral}"
            raise PlanError(problem, hint=hint)
        return next(twin for twin in TWINS if twin.dense[0] == architecture)
    kind = str(config.get("model_type", ""))
    fits = [twin for twin in TWINS if twin.sparse[0] == kind]
    if not fits:
        problem = f"no dense class is known for model_type {kind!r}; known: {_known()}"
        hint = "its experts can be put in order (match_experts) and merged, expert by expert"
        raise PlanError(problem, hint=hint)
    found = next((t for t in fits if architecture in (None, t.dense[0])), None)
    if found is None:
        wanted = " or ".join(twin.dense[0] for twin in fits)
        problem = f"architecture is {architecture}, and layers of {kind} are those of {wanted}"
        raise PlanError(problem, hint=f"write architecture: {fits[0].dense[0]}, or leave it out")
    return found


def _known() -> str:
    kinds = dict.fromkeys(twin.sparse[0] for twin in TWINS)
    return ", ".join(
        f"{kind} ({' or '.join(t.dense[0] for t in TWINS if t.sparse[0] == kind)})"
        for kind in kinds
    )


def dense_block(group: ExpertGroup) -> str:
    """Return the path of the dense MLP that stands in for a block of experts."""
    above, dot, _ = group.block.rpartition(".")
    return f"{above}{dot}mlp"


def projections(group: ExpertGroup) -> Mapping[str, tuple[Piece, ...]]:
    """Return the matrices of a dense MLP for each expert of a group, each (outputs, inputs).

    Raises:
        MismatchError: If the experts are no such MLPs.
    """
    made = _split(group) or _fused(group)
    if made is not None:
        gate, up, down = (made[name][0].shape for name in PROJECTIONS)
        if len(gate) == 2 and gate == up and down == gate[::-1]:
            return made
    held = ", ".join(f"{name} {list(pieces[0].shape)}" for name, pieces in group.parts.items())
    raise MismatchError(
        f"experts hold {held}; a dense MLP is made of gate_proj, up_proj and down_proj",
        where=group.path,
        hint="is this the layout that its class saves? load and save it with transformers",
    )


def _split(group: ExpertGroup) -> dict[str, tuple[Piece, ...]] | None:
    for names in _SPELLINGS:
        if set(group.parts) == {f"{name}.weight" for name in names}:
            made = [group.parts[f"{name}.weight"] for name in names]
            return dict(zip(PROJECTIONS, made, strict=True))
    return None


def _fused(group: ExpertGroup) -> dict[str, tuple[Piece, ...]] | None:
    """Return the matrices of a fused gate and up projection, the gate's rows first."""
    if set(group.parts) != {"gate_up_proj", "down_proj"}:
        return None
    both, down = group.parts["gate_up_proj"], group.parts["down_proj"]
    one = down[0].shape[::-1]
    if len(one) != 2 or both[0].shape != (2 * one[0], one[1]):
        return None
    gate = tuple(Piece(piece.tensor, piece.start, one) for piece in both)
    up = tuple(Piece(piece.tensor, piece.start + prod(one), one) for piece in both)
    return {"gate_proj": gate, "up_proj": up, "down_proj": down}


def dense_config(text: str, twin: Twin, width: int) -> str:
    """Return config.json of the dense class, everything else byte for byte.

    Args:
        text: The sparse model's.
        twin: The dense class.
        width: Hidden units of the MLPs.

    Raises:
        PlanError: If the dense class cannot do what the config says.
    """
    config = read_config(text, _WHERE)
    edits = [*_class_edits(config, twin), *_attention_edits(config, twin)]
    if config.get("intermediate_size") != width:
        edits.append(Edit(("intermediate_size",), width))
    edits += _default_edits(config, twin)
    edits += [Edit((key,), remove=True) for key in _ROUTING if key in config]
    return edit_config(text, edits)


def _class_edits(config: Config, twin: Twin) -> Iterator[Edit]:
    yield Edit(("model_type",), twin.dense[0])
    names = config.get("architectures")
    if isinstance(names, list):
        yield Edit(("architectures",), [_renamed(name, twin) for name in names])


def _renamed(name: object, twin: Twin) -> object:
    """Return the name of a class of the dense model, or what is no such name as it is."""
    sparse, dense = twin.sparse[1], twin.dense[1]
    if isinstance(name, str) and name.startswith(sparse):
        return dense + name.removeprefix(sparse)
    return name


def _default_edits(config: Config, twin: Twin) -> Iterator[Edit]:
    rope = config.get("rope_parameters")
    for key, value in twin.defaults.items():
        nested = key == "rope_theta" and isinstance(rope, dict) and key in rope
        if key not in config and not nested:
            yield Edit((key,), value)


def _attention_edits(config: Config, twin: Twin) -> Iterator[Edit]:
    """Yield what makes the dense class attend as the sparse one did."""
    kind = twin.dense[0]
    if kind == "llama" and "sliding_window" in config:
        if config["sliding_window"] is not None:
            problem = f"sliding_window is {config['sliding_window']}, and llama has none"
            raise PlanError(problem, where=_WHERE, hint="write architecture: mistral")
        yield Edit(("sliding_window",), remove=True)
    if kind == "qwen2":
        yield from _qwen2_edits(config)
    if kind == "qwen3":
        yield from _qwen3_edits(config)


def _qwen2_edits(config: Config) -> Iterator[Edit]:
    if config.get("qkv_bias") is False:
        problem = "qkv_bias is false, and qwen2 has biases of queries, keys and values"
        raise PlanError(problem, where=_WHERE, hint="no dense class of such layers is known")
    if not config.get("use_sliding_window") or config.get("layer_types"):
        return
    layers, window = config.get("num_hidden_layers"), config.get("max_window_layers", 28)
    if isinstance(layers, int) and isinstance(window, int) and layers <= _MOST_LAYERS:
        kinds = ("full_attention", "sliding_attention")
        sliding = [kinds[i % 2 == 0 and i < window] for i in range(layers)]
        yield Edit(("layer_types",), sliding)


def _qwen3_edits(config: Config) -> Iterator[Edit]:
    hidden, heads = config.get("hidden_size"), config.get("num_attention_heads")
    if not config.get("head_dim") and isinstance(hidden, int) and isinstance(heads, int) and heads:
        yield Edit(("head_dim",), hidden // heads)
    if config.get("use_sliding_window"):  # of all layers, whatever a list of them says
        yield Edit(("layer_types",), remove=True)
        yield Edit(("max_window_layers",), 0)
