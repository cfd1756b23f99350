"""Layouts of mixtures of experts that dense models can become, by the names in their files.

The names are those of one tensor an expert, which is how these models are published; versions 4
and 5 of transformers both read them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

GATE, UP, DOWN = "mlp.gate_proj.weight", "mlp.up_proj.weight", "mlp.down_proj.weight"
MLP = (GATE, UP, DOWN)
"""The tensors of a dense layer that become those of an expert."""

BUFFERS = ("self_attn.rotary_emb.inv_freq",)
"""What old files store and every program computes anew."""

_NORMS = ("input_layernorm.weight", "post_attention_layernorm.weight")
_ATTENTION = tuple(f"self_attn.{letter}_proj.weight" for letter in "qkvo")
_BIASES = tuple(f"self_attn.{letter}_proj.bias" for letter in "qkv")
_OUT_BIAS = "self_attn.o_proj.bias"
_QK_NORMS = ("self_attn.q_norm.weight", "self_attn.k_norm.weight")
_COUNTS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")


@dataclass(frozen=True, slots=True)
class Layout:
    """One kind of mixture of experts.

    Attributes:
        model_type: As config.json has it.
        class_prefix: Beginning of its classes' names.
        sources: Values of `model_type` of the dense models that fit it, and the beginnings of
            their classes' names.
        block: Module of a layer that holds router and experts.
        parts: Names of gate, up and down projection in an expert.
        shared: Module of the expert that every token passes, "" where there is none.
        holds: What a layer holds beside its MLP.
        may_hold: What it may hold.
        biases: What it must hold too, zeros where the dense model has none.
        count_key: Key of config.json for the number of experts.
        some_layers: Whether layers can stay dense.
    """

    model_type: str
    class_prefix: str
    sources: Mapping[str, str]
    block: str
    parts: tuple[str, str, str]
    shared: str
    holds: frozenset[str]
    may_hold: frozenset[str]
    biases: tuple[str, ...]
    count_key: str
    some_layers: bool

    @property
    def router(self) -> str:
        """Suffix of the router's weight in a layer, (experts, hidden)."""
        return f"{self.block}.gate.weight"

    @property
    def shared_gate(self) -> str:
        """Suffix of the weight that the shared expert is weighed by, (1, hidden)."""
        return f"{self.shared}_gate.weight"

    def expert(self, number: int, dense: str) -> str:
        """Return the suffix of a tensor of an expert, by its suffix in a dense layer."""
        return f"{self.block}.experts.{number}.{self.parts[MLP.index(dense)]}.weight"

    def of_shared(self, dense: str) -> str:
        """Return the suffix of a tensor of the shared expert, by its suffix in a dense layer."""
        return f"{self.shared}.{self.parts[MLP.index(dense)]}.weight"


_LLAMA = {"llama": "Llama", "mistral": "Mistral"}
_QWEN_PARTS = ("gate_proj", "up_proj", "down_proj")
_PLAIN = frozenset((*_NORMS, *_ATTENTION))

LAYOUTS: Mapping[str, Layout] = {
    layout.model_type: layout
    for layout in (
        Layout(
            "mixtral",
            "Mixtral",
            _LLAMA,
            "block_sparse_moe",
            ("w1", "w3", "w2"),
            "",
            _PLAIN,
            frozenset(),
            (),
            "num_local_experts",
            some_layers=False,
        ),
        Layout(
            "qwen2_moe",
            "Qwen2Moe",
            {"qwen2": "Qwen2", **_LLAMA},
            "mlp",
            _QWEN_PARTS,
            "mlp.shared_expert",
            _PLAIN,
            frozenset(_BIASES),
            _BIASES,
            "num_experts",
            some_layers=True,
        ),
        Layout(
            "qwen3_moe",
            "Qwen3Moe",
            {"qwen3": "Qwen3"},
            "mlp",
            _QWEN_PARTS,
            "",
            _PLAIN | {*_QK_NORMS},
            frozenset((*_BIASES, _OUT_BIAS)),
            (),
            "num_experts",
            some_layers=True,
        ),
    )
}
"""The first that takes a dense model is the one it becomes if nothing else is asked for."""


def layout_for(model_type: str) -> Layout | None:
    """Return the layout that a dense model becomes, None if it has no sparse twin."""
    own = (layout for layout in LAYOUTS.values() if model_type in layout.sources)
    return next(own, None)


def possible_layouts(model_types: Iterable[str] = ("llama", "mistral", "qwen2", "qwen3")) -> str:
    """Return a clause that says which dense models become what."""
    clauses = []
    for kind in model_types:
        names = [name for name, layout in LAYOUTS.items() if kind in layout.sources]
        clauses.append(f"{kind} becomes {' or '.join(names)}")
    return ", ".join(clauses)


def is_sparse(config: Mapping[str, Any] | None, names: Iterable[str]) -> bool:
    """Return whether a model has experts already, by its config or by the names in its files."""
    counts = ((config or {}).get(key) for key in _COUNTS)
    if any(isinstance(count, int) and count > 0 for count in counts):
        return True
    return any(".experts." in name for name in names)
