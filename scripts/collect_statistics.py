"""Collect from a text what the methods fisher and regmean weigh models by.

    python scripts/collect_statistics.py fisher MODEL TEXT -o fisher.safetensors
    python scripts/collect_statistics.py gram MODEL TEXT -o gram.safetensors

MODEL is a causal language model that transformers loads, TEXT a file of what the model is good at.
The text is packed into examples of --length tokens, without padding; with --lines every line is an
example of its own, from the tokenizer's first special token to its last.

fisher: the diagonal of the Fisher information: for each parameter the mean over examples of the
square of d(log-likelihood of the example's labels)/d(parameter), divided by the labels. The square
is taken for each example, never of the gradient of a batch. The labels are drawn from the model's
own predictions, as the definition has it (the sum over all classes that the paper takes would cost
a pass for each word of the vocabulary); --empirical takes the text's own next tokens.

gram: for the weight of each linear layer the matrix X^T X / tokens of the inputs X that it sees.
Layers that are given the same input (q, k and v) share one matrix. A layer whose weight is also an
embedding is left out, and so is what no input reaches.

The file has tensors named as in the model's files, float32. Its metadata are: `statistics`,
"fisher" or "gram"; `shared`, JSON {name: name under which its statistics stand}; `transposed`, a
JSON list of weights that are (inputs, outputs), as in GPT-2; `examples` and `tokens`.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import groupby, islice
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.functional import log_softmax
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.pytorch_utils import Conv1D


class CollectError(Exception):
    """Statistics that cannot be collected, and why."""


@dataclass(frozen=True)
class Collected:
    """Statistics by name, in float32, and what the file's metadata say of them.

    Attributes:
        left_out: Weights of linear layers without statistics.
        unknown: Names that the model's files do not have.
    """

    kind: str
    tensors: dict[str, Tensor]
    shared: dict[str, str] = field(default_factory=dict)
    transposed: tuple[str, ...] = ()
    left_out: tuple[str, ...] = ()
    unknown: tuple[str, ...] = ()

    def save(self, path: Path, examples: Sequence[Tensor]) -> None:
        """Write the file."""
        metadata = {
            "statistics": self.kind,
            "shared": json.dumps(self.shared, sort_keys=True),
            "transposed": json.dumps(self.transposed),
            "examples": str(len(examples)),
            "tokens": str(sum(map(len, examples))),
        }
        save_file(self.tensors, path, metadata)


def read_examples(
    text: str, tokenizer: Any, *, samples: int, length: int, lines: bool
) -> list[Tensor]:
    """Return the token ids of at most so many examples of at most so many tokens.

    Raises:
        CollectError: If the text holds none of two tokens or more.
    """
    if lines:
        parts = (line for line in text.splitlines() if line.strip())
        encoded = (tokenizer(line)["input_ids"][:length] for line in parts)
        ends = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
        whole = (ids if ids[-1:] == ends else [*ids, *ends][:length] for ids in encoded)
        found = list(islice((ids for ids in whole if len(ids) > 1), samples))
    else:
        ids = tokenizer(text, verbose=False)["input_ids"]
        starts = range(0, len(ids) - 1, length)
        found = [ids[start : start + length] for start in islice(starts, samples)]
        found = [ids for ids in found if len(ids) > 1]
    if not found:
        raise CollectError("the text has no example of at least two tokens")
    return [torch.tensor(ids) for ids in found]


def fisher(
    model: nn.Module, examples: Sequence[Tensor], *, empirical: bool = False, seed: int = 0
) -> Collected:
    """Return the diagonal of the Fisher information, the mean over examples."""
    named = dict(model.named_parameters())
    totals = {name: torch.zeros_like(p, dtype=torch.float32) for name, p in named.items()}
    generator = torch.Generator().manual_seed(seed)
    for ids in examples:
        logits = model(input_ids=ids[None]).logits[0, :-1].float()
        chances = logits.detach().softmax(-1)
        labels = ids[1:] if empirical else torch.multinomial(chances, 1, generator=generator)[:, 0]
        likelihood = log_softmax(logits, -1).gather(1, labels[:, None]).sum()
        gradients = torch.autograd.grad(likelihood, list(named.values()), allow_unused=True)
        for total, gradient in zip(totals.values(), gradients, strict=True):
            if gradient is not None:
                total.add_(gradient.float().square_().div_(len(labels) * len(examples)))
    every = {id(p): name for name, p in named.items()}
    shared = {
        name: every[id(p)]
        for name, p in model.named_parameters(remove_duplicate=False)
        if name not in named
    }
    return Collected("fisher", totals, shared)


@dataclass
class _Layer:
    """What a linear layer has been given so far: sum of X^T X in float64, or whose twin it is."""

    twin: str = ""
    total: Tensor | None = None
    tokens: int = 0
    passes: set[int] = field(default_factory=set)


class _Inputs:
    """Gathers the inputs of linear layers during forward passes."""

    def __init__(self) -> None:
        self.layers: dict[str, _Layer] = {}
        self.passes = 0
        self._given: dict[int, tuple[str, Tensor]] = {}  # held, so that no id is used again

    def begin(self) -> None:
        """Begin another forward pass."""
        self.passes += 1
        self._given.clear()

    def take(self, name: str, x: Tensor) -> None:
        """Take in what a layer is given.

        Raises:
            CollectError: If layers share their input in some passes only.
        """
        owner, _ = self._given.setdefault(id(x), (name, x))
        layer = self.layers.get(name)
        if layer is None:
            born = owner != name and self.layers[owner].passes == {self.passes}
            layer = self.layers[name] = _Layer(twin=owner if born else "")
        if layer.twin and layer.twin != owner:
            raise CollectError(f"{name} shares its input with {layer.twin} in some passes only")
        layer.passes.add(self.passes)
        if layer.twin:
            return
        rows = x.detach().flatten(0, -2).float()
        product = (rows.T @ rows).double()
        layer.total = product if layer.total is None else layer.total.add_(product)
        layer.tokens += len(rows)


def gram(model: nn.Module, examples: Sequence[Tensor], *, batch: int = 1) -> Collected:
    """Return the Gram matrix of each linear layer's inputs, the mean over tokens."""
    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    linear = {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear | Conv1D)}
    taken = {n: m for n, m in linear.items() if id(m.weight) not in embeddings}
    inputs = _Inputs()
    hooks = [
        module.register_forward_pre_hook(lambda _, x, name=name: inputs.take(name, x[0]))
        for name, module in taken.items()
    ]
    try:
        with torch.inference_mode():
            for ids in _batches(examples, batch):
                inputs.begin()
                model(input_ids=ids)
    finally:
        for hook in hooks:
            hook.remove()
    seen = {f"{name}.weight": layer for name, layer in inputs.layers.items()}
    return Collected(
        "gram",
        {n: (s.total / s.tokens).float() for n, s in seen.items() if s.total is not None},
        {name: f"{layer.twin}.weight" for name, layer in seen.items() if layer.twin},
        tuple(f"{n}.weight" for n, m in taken.items() if isinstance(m, Conv1D)),
        tuple(sorted(f"{n}.weight" for n in linear if f"{n}.weight" not in seen)),
    )


def _batches(examples: Sequence[Tensor], size: int) -> Iterator[Tensor]:
    """Yield (examples, tokens) of one length each, so that nothing is padded."""
    groups = groupby(sorted(examples, key=len), key=len)
    stacks = (list(members) for _, members in groups)
    parts = (stack[at : at + size] for stack in stacks for at in range(0, len(stack), size))
    yield from map(torch.stack, parts)


def named_as_stored(found: Collected, model: nn.Module, folder: Path) -> Collected:
    """Return statistics under the names of the model's files, which may lack a prefix."""
    stored: set[str] = set()
    for path in folder.glob("*.safetensors"):
        with safe_open(path, framework="pt") as file:
            stored.update(file.keys())
    prefix = f"{getattr(model, 'base_model_prefix', '')}."

    def name(parameter: str) -> str:
        short = parameter.removeprefix(prefix)
        return short if parameter not in stored and short in stored else parameter

    return replace(
        found,
        tensors={name(key): values for key, values in found.tensors.items()},
        shared={name(key): name(other) for key, other in found.shared.items()},
        transposed=tuple(map(name, found.transposed)),
        unknown=tuple(key for key in map(name, found.tensors) if stored and key not in stored),
    )


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("kind", choices=["fisher", "gram"], help="for the method fisher or regmean")
    parser.add_argument("model", type=Path, metavar="MODEL", help="folder of the model")
    parser.add_argument("text", type=Path, metavar="TEXT", help="text file, UTF-8")
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="FILE")
    parser.add_argument("--samples", type=int, default=256, help="most examples (%(default)s)")
    parser.add_argument("--length", type=int, default=512, help="tokens of one (%(default)s)")
    parser.add_argument("--batch", type=int, default=8, help="examples at once, gram (%(default)s)")
    parser.add_argument("--lines", action="store_true", help="each line is an example of its own")
    parser.add_argument("--empirical", action="store_true", help="fisher: labels of the text")
    parser.add_argument("--seed", type=int, default=0, help="fisher: of the labels (%(default)s)")
    found = parser.parse_args(argv)
    if min(found.samples, found.batch) < 1 or found.length < 2:
        parser.error("--samples and --batch are at least 1, --length at least 2")
    return found


def collect(arguments: argparse.Namespace) -> Collected:
    """Collect and write what the command line asks for.

    Raises:
        CollectError: If model or text cannot be read, or statistics are not finite.
    """
    try:
        text = arguments.text.read_text(encoding="utf-8")
        tokenizer = AutoTokenizer.from_pretrained(arguments.model)
        model = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=torch.float32)
    except (OSError, ValueError) as exc:
        raise CollectError(f"cannot read model or text: {exc}") from exc
    longest = getattr(model.config, "max_position_embeddings", None) or arguments.length
    length, samples = min(arguments.length, longest), arguments.samples
    examples = read_examples(text, tokenizer, samples=samples, length=length, lines=arguments.lines)
    if arguments.kind == "fisher":
        found = fisher(model, examples, empirical=arguments.empirical, seed=arguments.seed)
    else:
        found = gram(model, examples, batch=arguments.batch)
    bad = [name for name, values in found.tensors.items() if not values.isfinite().all()]
    if bad:
        raise CollectError(f"not finite: {', '.join(bad[:5])}; is the model?")
    found = named_as_stored(found, model, arguments.model)
    try:
        found.save(arguments.output, examples)
    except OSError as exc:
        raise CollectError(f"cannot write {arguments.output}: {exc}") from exc
    return found


def main(argv: Sequence[str] | None = None) -> int:
    """Collect, and say what was left out; return the exit code, 3 if it was not possible."""
    arguments = _arguments(argv)
    try:
        found = collect(arguments)
    except CollectError as exc:
        print(exc, file=sys.stderr)
        return 3
    print(f"{arguments.output}: {len(found.tensors)} tensors, {len(found.shared)} names share one")
    for what, names in (("left out", found.left_out), ("not in MODEL's files", found.unknown)):
        if names:
            print(f"{what}: {', '.join(names)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
