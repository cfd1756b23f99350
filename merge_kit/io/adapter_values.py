"""What lies in the files of a LoRA adapter: every tensor of it belongs to one of these values."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from merge_kit.core.tensors import StoredTensor
from merge_kit.io.values import Checkpoint

Kind = Literal["linear", "embedding", "convolution", "experts"]
Style = Literal["peft", "diffusers", "old_diffusers", "kohya"]


@dataclass(frozen=True, slots=True)
class Update:
    """The low-rank change of one weight: scale * b @ a.

    Attributes:
        module: Path of the changed module as the adapter's file writes it, without the style's own
            prefix ("model.layers.0.self_attn.q_proj"); kohya writes "lora_unet_down_blocks_0_...",
            prefix included. For experts, the path of the parameter ("....experts.gate_up_proj").
        kind: linear: a (rank, in), b (out, rank), the weight is (out, in). embedding: a (rank,
            tokens), b (width, rank), the weight is (tokens, width), the change (b @ a)^T.
            convolution: a (rank, in, *kernel), b (out, rank, 1, ...), the weight is (out, in,
            *kernel), the change b @ a of both flattened to matrices. experts: a (experts * rank,
            in), b (out, rank * experts), of expert e rows e * rank and on of a, columns e, e +
            experts, ... of b; the weight is (experts, out, in), or (experts, in, out) where
            `transposed` cannot tell: it is decided by the base's shape.
        rank: Rank (of one expert).
        alpha: lora_alpha of this module.
        scale: alpha / rank, or alpha / sqrt(rank) for rsLoRA.
        transposed: Whether the weight is stored (in, out), as `fan_in_fan_out` says. One flag of
            the config stands for all layers, and peft goes by the layer: (in, out) for Conv1D of
            transformers, (out, in) for the others. Where the base's shape tells, it is right.
        magnitude: DoRA's length of each output, or None.
        bias: Bias of b: the module's bias changes by scale * bias; or None.
        experts: How many there are, 0 for other kinds.
        alpha_tensor: The tensor that alpha was read from, as kohya's files have it; or None.
    """

    module: str
    kind: Kind
    a: StoredTensor
    b: StoredTensor
    rank: int
    alpha: float
    scale: float
    transposed: bool = False
    magnitude: StoredTensor | None = None
    bias: StoredTensor | None = None
    experts: int = 0
    alpha_tensor: StoredTensor | None = None

    @property
    def stored(self) -> tuple[StoredTensor, ...]:
        """Every tensor of it."""
        more = (self.magnitude, self.bias, self.alpha_tensor)
        return (self.a, self.b, *(one for one in more if one is not None))


@dataclass(frozen=True, slots=True)
class Saved:
    """A tensor that an adapter holds whole, in place of the base's.

    Attributes:
        tensor: Its name in the base ("model.norm.weight").
        why: "modules_to_save", "bias" (of `bias: all` or `lora_only`), or "base_layer": the weight
            below an update, which peft saves with embeddings.
    """

    tensor: str
    why: Literal["modules_to_save", "bias", "base_layer"]
    stored: StoredTensor


@dataclass(frozen=True, slots=True)
class TokenRows:
    """Rows of an embedding that an adapter holds in place of the base's.

    Attributes:
        module: Path of the embedding ("model.embed_tokens").
        tokens: Row of the embedding for each row of `stored`, (tokens, width).
    """

    module: str
    tokens: tuple[int, ...]
    stored: StoredTensor


@dataclass(frozen=True, slots=True)
class Adapter:
    """A LoRA adapter on disk.

    Attributes:
        checkpoint: Its files, with every tensor by its name in the file.
        style: How the file names tensors.
        config: adapter_config.json (or the metadata that stands for it), empty if there is none.
        config_text: Its text, None if there is none.
        base: Name or path of the base model as the config gives it, "" if it does not.
        revision: The base's revision, "" if the config names none.
        dropped: Name in the file -> why a tensor of it changes nothing (the base's own bias beside
            a module that is saved whole).
    """

    checkpoint: Checkpoint
    style: Style
    config: Mapping[str, Any]
    config_text: str | None
    base: str
    revision: str
    updates: tuple[Update, ...]
    saved: tuple[Saved, ...] = ()
    rows: tuple[TokenRows, ...] = ()
    dropped: Mapping[str, str] = field(default_factory=dict)
