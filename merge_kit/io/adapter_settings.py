"""What adapter_config.json says of an adapter's maths, checked."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, cast

from merge_kit.core.patterns import NamePatterns
from merge_kit.errors import CheckpointError
from merge_kit.io.adapter_refused import check_supported
from merge_kit.io.strict_json import shown

MAX_RANK = 1 << 20
Bias = Literal["none", "all", "lora_only"]


@dataclass(frozen=True, slots=True)
class Pattern:
    """Values for the modules that patterns name, the first that matches wins."""

    patterns: NamePatterns
    values: tuple[float, ...]

    def value(self, module: str, otherwise: float) -> float:
        """Return the value for a module."""
        found = self.patterns.first(module)
        return otherwise if found is None else self.values[found]


@dataclass(frozen=True, slots=True)
class Settings:
    """The keys of a config that say how tensors are to be used.

    Attributes:
        where: File (and key), for messages.
        modules_to_save: Ends of the paths of modules that the adapter holds whole.
        tokens: Rows of an embedding by the end of its path; "" stands for the input embedding.
        target_modules: Ends of paths; empty if they are given as one regular expression.
        all_linear: Whether every linear layer is a target.
        target_parameters: Ends of the paths of parameters.
    """

    where: str
    rank: int
    alpha: float
    ranks: Pattern
    alphas: Pattern
    rank_stabilised: bool
    fan_in_fan_out: bool
    dora: bool
    lora_bias: bool
    bias: Bias
    modules_to_save: tuple[str, ...]
    tokens: Mapping[str, tuple[int, ...]]
    target_modules: tuple[str, ...]
    target_pattern: NamePatterns | None
    all_linear: bool
    target_parameters: tuple[str, ...]

    def rank_of(self, module: str) -> int:
        """Return the rank that the config names for a module."""
        return int(self.ranks.value(module, self.rank))

    def alpha_of(self, module: str) -> float:
        """Return the alpha that the config names for a module."""
        return self.alphas.value(module, self.alpha)

    def scale(self, alpha: float, rank: int) -> float:
        """Return what b @ a is multiplied by."""
        return alpha / math.sqrt(rank) if self.rank_stabilised else alpha / rank

    def targets(self, module: str) -> bool:
        """Return whether `target_modules` names a module."""
        if self.target_pattern is not None:
            return self.target_pattern.first(module) is not None
        return any(ends_with(module, target) for target in self.target_modules)


def read_settings(config: Mapping[str, Any], *, where: str) -> Settings:
    """Return what a LoRA config says.

    Raises:
        CheckpointError: If a value is of the wrong type or out of range, or asks for something
            that is not supported.
    """
    check_supported(config, where=where)
    bias = config.get("bias", "none")
    if not isinstance(bias, str) or bias not in {"none", "all", "lora_only"}:
        raise _wrong("bias", bias, "none, all or lora_only", where)
    named, pattern = _targets(config, where)
    return Settings(
        where=where,
        rank=_rank("r", config.get("r", 8), where),
        alpha=_alpha("lora_alpha", config.get("lora_alpha", 8), where),
        ranks=_pattern(config, "rank_pattern", where),
        alphas=_pattern(config, "alpha_pattern", where),
        rank_stabilised=_flag(config, "use_rslora", where),
        fan_in_fan_out=_flag(config, "fan_in_fan_out", where),
        dora=_flag(config, "use_dora", where),
        lora_bias=_flag(config, "lora_bias", where),
        bias=cast("Bias", bias),
        modules_to_save=_names(config, "modules_to_save", where),
        tokens=_tokens(config, where),
        target_modules=named,
        target_pattern=pattern,
        all_linear=str(config.get("target_modules")).lower() == "all-linear",
        target_parameters=_names(config, "target_parameters", where),
    )


def _wrong(key: str, value: object, expected: str, where: str) -> CheckpointError:
    problem = f"{key} is {shown(value)}, expected {expected}"
    return CheckpointError(problem, where=where, hint="correct it, or fetch the adapter again")


def _rank(key: str, value: object, where: str) -> int:
    if type(value) is not int or not 1 <= value <= MAX_RANK:
        raise _wrong(key, value, f"an integer from 1 to {MAX_RANK}", where)
    return value


def _alpha(key: str, value: object, where: str) -> float:
    if isinstance(value, int | float) and not isinstance(value, bool):
        try:
            if math.isfinite(value):
                return float(value)
        except OverflowError:  # an integer of hundreds of digits
            pass
    raise _wrong(key, value, "a finite number", where)


def _flag(config: Mapping[str, Any], key: str, where: str) -> bool:
    value = config.get(key, False)
    if value is None:
        return False
    if not isinstance(value, bool):
        raise _wrong(key, value, "true or false", where)
    return value


def _names(config: Mapping[str, Any], key: str, where: str) -> tuple[str, ...]:
    value = config.get(key)
    if value is None:
        return ()
    if not isinstance(value, list) or not all(isinstance(one, str) for one in value):
        raise _wrong(key, value, "a list of names", where)
    return tuple(value)


def _targets(config: Mapping[str, Any], where: str) -> tuple[tuple[str, ...], NamePatterns | None]:
    """Return target_modules as a list, or as a pattern where parameters must be told from them."""
    value = config.get("target_modules")
    if not isinstance(value, str):
        return _names(config, "target_modules", where), None
    if value.lower() == "all-linear" or not config.get("target_parameters"):
        return (), None
    where = f"{where}, target_modules"
    NamePatterns([value], where=where)  # an expression of its own, not only within brackets
    # peft matches it with the whole name, so it begins where the name does.
    return (), NamePatterns([f"^(?:{value})"], where=where)


def _pattern(config: Mapping[str, Any], key: str, where: str) -> Pattern:
    value = config.get(key)
    value = {} if value is None else value
    if not isinstance(value, dict):
        raise _wrong(key, value, "an object of pattern: number", where)
    read = _rank if key == "rank_pattern" else _alpha
    values = tuple(read(f"{key}, {shown(name)}", number, where) for name, number in value.items())
    return Pattern(NamePatterns(tuple(value), where=f"{where}, {key}"), values)


def _tokens(config: Mapping[str, Any], where: str) -> Mapping[str, tuple[int, ...]]:
    key = "trainable_token_indices"
    value = config.get(key)
    if value is None:
        return {}
    if isinstance(value, dict):
        return {n: _indices(rows, f"{key}, {shown(n)}", where) for n, rows in value.items()}
    return {"": _indices(value, key, where)}


def _indices(value: object, key: str, where: str) -> tuple[int, ...]:
    if not isinstance(value, list) or not all(type(row) is int for row in value):
        raise _wrong(key, value, "a list of integers", where)
    return tuple(value)


def ends_with(path: str, end: str) -> bool:
    """Return whether the last parts of a path are these."""
    return path == end or path.endswith(f".{end}")
