"""What is known of a LoRA adapter without reading a weight."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from merge_kit.core.names import natural_key
from merge_kit.core.tensors import TensorSpec
from merge_kit.io.adapter_values import Adapter, Update

Counts = Mapping[str, int]
Numbers = Mapping[float, int]
_PATTERNS = ("rank_pattern", "alpha_pattern")


@dataclass(frozen=True, slots=True)
class AdapterFacts:
    """What an adapter holds.

    Attributes:
        base: Name of the base model with its revision behind an "@", "" if the adapter names none.
        patterns: rank_pattern and alpha_pattern of the config, those that are not empty.
        rank_stabilised: Whether scales are alpha / sqrt(rank).
        targets: Last part of the modules' names -> how many modules.
        kinds: "linear", "embedding", ... -> how many modules.
        ranks: Rank -> how many modules; alphas and scales alike.
        magnitudes: Modules with magnitudes of DoRA.
        biases: Modules with a bias.
        saved: Tensors that it holds whole -> why.
        tokens: Embedding -> how many of its rows it holds.
        dropped: Tensors that change nothing -> why.
        tensors: By name in the file.
    """

    name: str
    is_file: bool
    style: str
    base: str
    patterns: Mapping[str, Mapping[str, Any]]
    rank_stabilised: bool
    targets: Counts
    kinds: Counts
    ranks: Numbers
    alphas: Numbers
    scales: Numbers
    magnitudes: int
    biases: int
    saved: Mapping[str, str]
    tokens: Counts
    dropped: Mapping[str, str]
    tensors: Mapping[str, TensorSpec]
    updates: tuple[Update, ...]
    files: tuple[str, ...]
    side_files: tuple[str, ...]
    left_out: Mapping[str, str]
    warnings: tuple[str, ...]

    @property
    def parameters(self) -> int:
        return sum(spec.numel for spec in self.tensors.values())

    @property
    def nbytes(self) -> int:
        return sum(spec.nbytes for spec in self.tensors.values())

    @property
    def dtypes(self) -> Counts:
        return dict(sorted(Counter(spec.dtype for spec in self.tensors.values()).items()))

    def as_json(self, *, tensors: bool) -> dict[str, Any]:
        """Return the facts as values that `json.dumps` takes."""
        facts: dict[str, Any] = {
            "adapter": True,
            "name": self.name,
            "is_file": self.is_file,
            "style": self.style,
            "base": self.base,
            "modules": len(self.updates),
            "targets": dict(self.targets),
            "kinds": dict(self.kinds),
            "ranks": _keyed(self.ranks),
            "alphas": _keyed(self.alphas),
            "scales": _keyed(self.scales),
            **{key: dict(self.patterns.get(key, {})) for key in _PATTERNS},
            "rslora": self.rank_stabilised,
            "dora": self.magnitudes,
            "biases": self.biases,
            "saved": dict(self.saved),
            "tokens": dict(self.tokens),
            "dropped": dict(self.dropped),
            "tensor_count": len(self.tensors),
            "parameters": self.parameters,
            "nbytes": self.nbytes,
            "dtypes": self.dtypes,
            "files": list(self.files),
            "side_files": list(self.side_files),
            "left_out": dict(self.left_out),
            "warnings": list(self.warnings),
        }
        if tensors:
            facts["updates"] = [_update_json(update) for update in self.updates]
            facts["tensors"] = [
                {"name": name, "dtype": spec.dtype, "shape": list(spec.shape)}
                for name, spec in self.tensors.items()
            ]
        return facts


def facts_of_adapter(adapter: Adapter) -> AdapterFacts:
    """Return what an adapter holds."""
    checkpoint, updates = adapter.checkpoint, adapter.updates
    components = checkpoint.components
    patterns = {key: adapter.config.get(key) or {} for key in _PATTERNS}
    return AdapterFacts(
        name=checkpoint.name,
        is_file=checkpoint.is_file,
        style=adapter.style,
        base=f"{adapter.base}@{adapter.revision}" if adapter.revision else adapter.base,
        patterns={key: found for key, found in patterns.items() if found},
        rank_stabilised=bool(adapter.config.get("use_rslora")),
        targets=_most_first(target(update.module) for update in updates),
        kinds=_most_first(update.kind for update in updates),
        ranks=_ascending(update.rank for update in updates),
        alphas=_ascending(update.alpha for update in updates),
        scales=_ascending(update.scale for update in updates),
        magnitudes=sum(update.magnitude is not None for update in updates),
        biases=sum(update.bias is not None for update in updates),
        saved={saved.tensor: saved.why for saved in adapter.saved},
        tokens={rows.module: len(rows.tokens) for rows in adapter.rows},
        dropped=adapter.dropped,
        tensors={name: t.spec for c in components for name, t in c.tensors.items()},
        updates=updates,
        files=tuple(file.name for component in components for file in component.files),
        side_files=checkpoint.side_files,
        left_out=checkpoint.left_out,
        warnings=checkpoint.warnings,
    )


def target(module: str) -> str:
    """Return the last part of a module's name: "q_proj", "to_out.0", "attn1_to_q"."""
    if "." not in module:  # kohya writes underscores between the parts
        return re.split(r"_\d+_", module)[-1]
    *_, before, last = module.split(".")
    return f"{before}.{last}" if last.isdigit() else last


def _most_first(values: Iterable[str]) -> Counts:
    counts = Counter(values)
    return dict(sorted(counts.items(), key=lambda row: (-row[1], natural_key(row[0]))))


def _ascending(values: Iterable[float]) -> Numbers:
    return dict(sorted(Counter(values).items()))


def _keyed(numbers: Numbers) -> dict[str, int]:
    """Return numbers as keys of JSON: 16.0 is "16"."""
    return {f"{n:.17g}" if n % 1 else f"{n:.0f}": count for n, count in numbers.items()}


def _update_json(update: Update) -> dict[str, Any]:
    return {
        "module": update.module,
        "kind": update.kind,
        "rank": update.rank,
        "alpha": update.alpha,
        "scale": update.scale,
        "experts": update.experts,
        "dtype": update.a.spec.dtype,
        "a": list(update.a.spec.shape),
        "b": list(update.b.spec.shape),
        "dora": update.magnitude is not None,
        "bias": update.bias is not None,
    }
