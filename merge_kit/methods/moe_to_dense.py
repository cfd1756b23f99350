"""A dense model out of a mixture of experts: one expert, or the mean of several."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from merge_kit.errors import ParameterError
from merge_kit.methods.registry import register
from merge_kit.methods.structures import Listed, StructureMethod

EXPERT_WORDS = ("all", "shared")
"""What `experts` may be in place of numbers."""


@register("moe_to_dense")
@dataclass(frozen=True, kw_only=True)
class MoeToDense(StructureMethod):
    """Turn a mixture of experts into a dense model: the way back from sparse_upcycle.

    MLP of layer l = expert e of layer l, or the mean of several of its experts, all counted alike
    all other tensors = those of the model, without router and other experts

    Layers that are dense already keep their MLP; its width must be that of the experts. The mean is
    computed in float64 and rounded once, so that the mean of copies is the copy (in float64 files
    but for the rounding of sums). It weighs no expert by how often the router chose it: that
    depends on data. It suits experts that began as copies of one model; those that began apart
    have no common order of hidden units, and a single one says more.

    Attributes:
        experts: Which expert (`3`, counted from 0), or the experts whose mean is taken (`[0, 2]`),
            or "all", the default; or "shared", for the expert that every token of a qwen2_moe
            passes.
        architecture: The dense class. By default mixtral becomes mistral (or llama, whose layers
            are the same where no sliding window is set), qwen2_moe becomes qwen2, and qwen3_moe
            qwen3. For a model without config.json it must be named.

    Cost: one pass; single experts are copied.
    Source: the inverse of Komatsuzaki et al. 2023, Sparse Upcycling,
        https://arxiv.org/abs/2212.05055; means of experts: Wortsman et al. 2022, Model soups,
        https://arxiv.org/abs/2203.05482
    """

    max_inputs: ClassVar[int | None] = 1

    experts: Listed | None = None
    architecture: Literal["llama", "mistral", "qwen2", "qwen3"] | None = None

    def __post_init__(self) -> None:
        if self.experts is None:
            return
        word, numbers = self.experts.word, self.experts.numbers
        if word and word not in EXPERT_WORDS:
            problem = f"is {word!r}, expected a number, a list of numbers, all or shared"
            raise ParameterError("experts", problem, hint="write for example 0, [0, 2] or shared")
        if not word and not numbers:
            raise ParameterError("experts", "names no expert", hint="leave it out for all of them")
        twice = next((n for i, n in enumerate(numbers) if n in numbers[:i]), None)
        if twice is not None:
            hint = "each expert counts once: to weigh them, merge dense models by linear"
            raise ParameterError("experts", f"names {twice} twice", hint=hint)

    @property
    def is_shared(self) -> bool:
        """Whether the shared expert is taken."""
        return self.experts is not None and self.experts.word == "shared"

    def chosen(self, count: int) -> tuple[int, ...]:
        """Return the experts that are taken of so many."""
        numbers = () if self.experts is None else self.experts.numbers
        return numbers or tuple(range(count))
