"""Linear layers merged so that their outputs stay close: regression means."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from merge_kit.errors import ParameterError
from merge_kit.methods import evidence
from merge_kit.methods.base import Grain, Law, MergeMethod, PerModel, Scans, Slab, per_model
from merge_kit.methods.registry import register
from merge_kit.methods.solves import solve_from_right

if TYPE_CHECKING:
    from torch import Tensor


@register("regmean")
@dataclass(frozen=True, kw_only=True)
class RegMean(MergeMethod):
    """Merge linear layers so that each input gets about the output its own model gives (RegMean).

    out = (sum(w_i W_i G_i)) (sum(w_i G_i))^-1
    G_i = X_i^T X_i / tokens, off its diagonal times scale_off_diagonal

    For a weight W_i of (outputs, inputs), G_i is the Gram matrix of the inputs X_i that the layer
    sees in model i, from a file. So out X_i^T comes closest to W_i X_i^T, in squares over all
    models and tokens. It is computed as

    out = mean + (sum(w_i (W_i - mean) G_i)) (S + ridge diag(S))^-1
    S = sum(w_i G_i), mean = sum(w_i W_i), the w_i divided by their sum

    With ridge 0 that is the same. Weights that are equal stay as they are to the last bit, inputs
    that no model has seen get the plain mean, and a ridge pulls towards it what hardly any input
    tells. Where S has no inverse (ridge 0), its pseudo-inverse takes its place: directions that
    are lost in the rounding of float32 get the plain mean.

    The statistics file is a safetensors file (or a folder of them) with a matrix (inputs, inputs)
    under the name of the weight. scripts/collect_statistics.py makes it. Metadata `shared`, a
    JSON object {weight: stored weight}, lets layers with one input (q, k, v) share a matrix;
    metadata `transposed`, a JSON list, names weights of (inputs, outputs), as GPT-2 has them. A
    tensor without a Gram matrix in any file (norms, biases, embeddings) gets the plain weighted
    mean, by the method linear; one with a Gram matrix in some files only is an error. The file is
    looked up beside the recipe, then in the working directory.

    A base lends config and tokenizer and is not read. The paper sums G_i over tokens instead of
    averaging: give the numbers of tokens as weights for that. It scales by 0.9 (0.1 for T5), and
    by nothing in some later code (scale_off_diagonal: 1). At 0 each input's column is averaged by
    its mean square alone.

    Attributes:
        statistics: Path of each model's file of Gram matrices.
        weight: Weight of each model, from 0, not all 0; only their ratios count.
        scale_off_diagonal: Factor in [0, 1] on what is off the diagonal of G.
        ridge: Share of each diagonal element of S that is added to it, in [0, 1]; 0 for the
            paper's inverse.

    Cost: whole tensors, one at a time, in float64: 2 outputs inputs^2 models + inputs^3 / 3
        operations, and memory for about five times inputs * (inputs + outputs).
    Source: Jin et al. 2023, Dataless knowledge fusion by merging weights of language models,
        https://arxiv.org/abs/2212.09849
    """

    takes_base: ClassVar[bool] = True
    statistics_of: ClassVar = "inputs"
    grain: ClassVar[Grain] = "tensor"
    error_factor: ClassVar[float] = 4.0
    laws: ClassVar[Mapping[Law, float]] = {
        "single": 0.0,
        "copies": 2.0**-22,
        "permute_models": 2.0**-20,
        "permute_rows": 2.0**-20,
    }

    statistics: PerModel[str]
    weight: PerModel[float] = per_model(1.0)
    scale_off_diagonal: float = 0.9
    ridge: float = 1e-3

    def __post_init__(self) -> None:
        evidence.check_weights(self.weight)
        for name in ("scale_off_diagonal", "ridge"):
            value = getattr(self, name)
            if not 0 <= value <= 1:
                raise ParameterError(name, f"is {value:g}, expected a number in [0, 1]")

    def flops(self, name: str, shape: tuple[int, ...], models: int) -> float:
        """Return the operations of the products and of one factorisation."""
        del name
        if len(shape) != 2:
            return 0.0
        outputs, inputs = shape
        return 2.0 * outputs * inputs**2 * (models + 1) + inputs**3 / 3

    def scratch_bytes(self, models: int, elements: int) -> int:
        """Return the bytes of float64 copies: weight, mean and sums, S and its factor."""
        del models
        return 44 * elements

    def merge(self, slab: Slab, scans: Scans) -> Tensor:
        """Return the merged weight, or the weighted mean where there are no Gram matrices."""
        del scans
        weights = self.weight or PerModel([1.0] * len(slab.tensors))
        used = [i for i, weight in enumerate(weights) if weight > 0]
        if len(used) == 1:
            return slab.tensors[used[0]]
        parts = evidence.shares([weights[i] for i in used])
        shares = dict(zip(used, parts, strict=True))
        first = slab.tensors[used[0]].double()
        # From the first on: weights that are equal give differences of zero, and their mean.
        mean = first.clone()
        for i in used[1:]:
            mean.add_((slab.tensors[i].double() - first).mul_(shares[i]))
        del first
        if slab.aux and mean.numel():
            mean = self._corrected(mean, slab, shares)
        return mean.to(slab.tensors.dtype)

    def _corrected(self, mean: Tensor, slab: Slab, shares: Mapping[int, float]) -> Tensor:
        """Return the mean plus what the Gram matrices say, flat."""
        transposed = evidence.operand_name(0, of_columns=True) in slab.aux
        inputs = slab.shape[0] if transposed else slab.shape[-1]

        def rows(flat: Tensor) -> Tensor:
            return flat.view(slab.shape).T if transposed else flat.view(slab.shape)

        # The shares sum to 1, and the differences from the mean to 0: so one model's matrix can be
        # taken from all others', and no product is needed for that model.
        most = max(shares, key=shares.__getitem__)
        first = self._gram(slab, most, inputs, transposed=transposed)
        total, moved = first.clone(), mean.new_zeros(mean.numel() // inputs, inputs)
        for i, share in shares.items():
            if i != most:
                gram = self._gram(slab, i, inputs, transposed=transposed)
                gram.sub_(first).mul_(share)
                total.add_(gram)
                moved.add_(rows(slab.tensors[i].double().sub_(mean)) @ gram)
                del gram
        del first
        found = solve_from_right(total, moved, self.ridge, where=slab.name)
        rows(mean).add_(found)
        return mean

    def _gram(self, slab: Slab, model: int, inputs: int, *, transposed: bool) -> Tensor:
        """Return one model's Gram matrix, float64, scaled off its diagonal."""
        flat = slab.aux[evidence.operand_name(model, of_columns=transposed)]
        gram = evidence.check_range(flat, slab, model).double().view(inputs, inputs)
        evidence.check_range(gram.diagonal(), slab, model, least=0)
        evidence.check_symmetric(gram, slab, model)
        diagonal = gram.diagonal().clone()
        gram.mul_(self.scale_off_diagonal)
        gram.diagonal().copy_(diagonal)
        return gram
