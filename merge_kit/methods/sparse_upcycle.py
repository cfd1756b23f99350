"""A mixture of experts out of dense models: their MLPs as experts, all else once."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

from merge_kit.errors import ParameterError
from merge_kit.methods.base import PerModel, per_model
from merge_kit.methods.registry import register
from merge_kit.methods.structures import Listed, StructureMethod

SPARSE_WORDS = ("all", "even", "odd")
"""What `sparse_layers` may be in place of a list."""

MOST_EXPERTS = 4096
"""More than any model has; each is three tensors in every layer."""


@register("sparse_upcycle")
@dataclass(frozen=True, kw_only=True)
class SparseUpcycle(StructureMethod):
    """Turn dense models into a mixture of experts: the MLPs become experts, all else is taken once.

    gate_e, up_e = W + noise_scale * N(0, 1), W a matrix of the MLP of model e
    down_e = residual_scale * (W + noise_scale * N(0, 1))
    y = sum of g_e * expert_e(x) over the experts_per_token largest of R x, g = softmax(these)
    R = rows of router, one an expert; all other tensors are the base's, or the models' mean

    Models: base_model alone or one model gives num_experts copies (8 by default); several models
    give one expert each. A num_experts that is a multiple of the number of models repeats them in
    turn: 0, 1, 2, 0, 1, 2. Models, adapters on models, and named stages do alike; of each the MLPs
    are taken, and of all else nothing unless non_experts is average. Without a base_model the first
    model is the base. The weights of a token's experts sum to 1, so that copies without noise and
    with residual_scale 1 compute just what the dense model does. Routers of prompts read
    positive_prompts and negative_prompts, lists that stand beside each model, and need transformers
    5. A shared expert of a qwen2_moe stands in the list shared_experts, beside models.

    Files: a tensor for each matrix of each expert, which versions 4 and 5 of transformers both
    read: block_sparse_moe.experts.E.w1, w3, w2 (gate, up, down) and block_sparse_moe.gate in a
    mixtral; mlp.experts.E.gate_proj, up_proj, down_proj and mlp.gate in the others, with
    mlp.shared_expert and mlp.shared_expert_gate (1, hidden) in a qwen2_moe. config.json is the
    base's, key by key: class, model_type, counts and widths of experts, norm_topk_prob true. What
    the base leaves to its class is written where the sparse class has another default. A sliding
    window stays in every layer that has one: a mixtral of a Llama has none, one of a Mistral the
    Mistral's. Tied heads stay tied. A Llama or Mistral that becomes a qwen2_moe gets biases of
    zero. Biases that the layout has no place for, windows in some layers of a Qwen3, and
    architectures without a sparse twin are refused.

    What the shared expert of a qwen2_moe adds is weighed by a sigmoid of its own, beside the
    softmax: only with an output projection of zero (the default) does the result compute what the
    base does. A router of zeros sends every token to the same experts until it is
    trained, since the largest of equal logits are the first.

    Differences: mergekit-moe writes fused experts for a mixtral and a qwen3_moe, which version 4 of
    transformers does not read, switches sliding windows off, takes all else from the base alone
    (Branch-Train-MiX averages it), and draws random routers of standard deviation 1, whose softmax
    is nearly one-hot; router_scale: 1 does the same here.

    Attributes:
        num_experts: How many experts a sparse layer has, 1 to 4,096; by default one a model, and 8
            copies of a single one.
        experts_per_token: How many of them each token passes, at most num_experts.
        architecture: Layout of the result; by default that of the base's model_type: llama and
            mistral become mixtral (qwen2_moe where there are shared_experts), qwen2 becomes
            qwen2_moe, qwen3 becomes qwen3_moe.
        router: "random", normal numbers of standard deviation router_scale; "uniform_random", even
            ones within plus and minus router_scale; "zero"; or of prompts, each row of length 1:
            "cheap_embed", the sum of the embeddings of their tokens; "hidden", what the layer's
            router sees at the last token of each; "hidden_avg", at every token of each.
        router_scale: Size of random router weights, at least 0: 0.02 for random, and
            1 / sqrt(hidden_size) for uniform_random.
        sparse_layers: Numbers of the layers that get experts, from 0, or "all" (the default),
            "even" or "odd"; the others stay dense. Only qwen2_moe and qwen3_moe have such a switch.
        non_experts: Whose attention, norms, embeddings and head: "base", or the "average" of the
            models. For any other merge of them, that merge is the base_model, as a named stage.
        shared_expert: Output projection of the expert that every token of a qwen2_moe passes, where
            no `shared_experts` are given: "zero", so that it adds nothing, or "copy", that of the
            base.
        noise_scale: Standard deviation of what is added to each matrix of an expert, at least 0.
        residual_scale: Factor on the down projection of an expert, any finite number.

    Cost: one pass; without noise and scales the experts are copied byte for byte.
    Source: Komatsuzaki et al. 2023, Sparse Upcycling, https://arxiv.org/abs/2212.05055; experts of
        several models: Sukhbaatar et al. 2024, Branch-Train-MiX, https://arxiv.org/abs/2403.07816
    """

    takes_base: ClassVar[bool] = True
    min_inputs: ClassVar[int] = 0

    num_experts: int | None = None
    experts_per_token: int = 2
    architecture: Literal["mixtral", "qwen2_moe", "qwen3_moe"] | None = None
    router: Literal["zero", "random", "uniform_random", "cheap_embed", "hidden", "hidden_avg"] = (
        "random"
    )
    router_scale: float | None = None
    sparse_layers: Listed | None = None
    non_experts: Literal["base", "average"] = "base"
    shared_expert: Literal["zero", "copy"] = "zero"
    noise_scale: PerModel[float] = per_model(0.0)
    residual_scale: PerModel[float] = per_model(1.0)

    def __post_init__(self) -> None:
        if self.num_experts is not None and not 1 <= self.num_experts <= MOST_EXPERTS:
            problem = f"is {self.num_experts:,}, expected 1 to {MOST_EXPERTS:,}"
            hint = "leave it out for one expert a model, or 8 copies of one"
            raise ParameterError("num_experts", problem, hint=hint)
        self._check_top_k()
        if self.router_scale is not None and not 0 <= self.router_scale < math.inf:
            problem = f"is {self.router_scale:g}, expected a finite number of at least 0"
            raise ParameterError("router_scale", problem, hint="write a number such as 0.02")
        self._check_layers()
        for value in self.noise_scale:
            if not 0 <= value < math.inf:
                problem = f"is {value:g}, expected a finite number of at least 0"
                raise ParameterError("noise_scale", problem, hint="write a number such as 0.01")
        for value in self.residual_scale:
            if not math.isfinite(value):
                problem = f"is {value:g}, expected a finite number"
                raise ParameterError("residual_scale", problem, hint="write a number such as 0.5")

    def _check_top_k(self) -> None:
        top_k, experts = self.experts_per_token, self.num_experts
        if top_k < 1:
            problem = f"is {top_k}, expected at least 1"
            raise ParameterError("experts_per_token", problem, hint="leave it out for 2")
        if experts is not None and top_k > experts:
            there = "is 1 expert" if experts == 1 else f"are {experts} experts"
            problem = f"is {top_k}, and there {there}"
            hint = "a token passes each expert at most once: lower it, or raise num_experts"
            raise ParameterError("experts_per_token", problem, hint=hint)

    def _check_layers(self) -> None:
        layers = self.sparse_layers
        if layers is None:
            return
        if layers.word and layers.word not in SPARSE_WORDS:
            problem = f"is {layers.word!r}, expected a list of layers, or all, even or odd"
            hint = "write for example [1, 3, 5], or odd"
            raise ParameterError("sparse_layers", problem, hint=hint)
        if not layers.word and not layers.numbers:
            hint = "leave it out to make every layer sparse"
            raise ParameterError("sparse_layers", "names no layer", hint=hint)
        numbers = layers.numbers
        twice = next((n for i, n in enumerate(numbers) if n in numbers[:i]), None)
        if twice is not None:
            hint = "a layer is sparse or dense: list it once"
            raise ParameterError("sparse_layers", f"names {twice} twice", hint=hint)
