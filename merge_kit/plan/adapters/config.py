"""adapter_config.json of an adapter that is made: the first adapter's text, patched."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from math import inf, isfinite, nextafter
from typing import Any, Literal

from merge_kit.architecture.config import Edit, edit_config, read_config
from merge_kit.errors import PlanError
from merge_kit.plan.adapters.made import OutModule

Bias = Literal["none", "all", "lora_only"]

NOTHING = "dummy-target-modules"
"""What peft takes for target_modules of an adapter that changes no module by factors."""

_RESET = ("exclude_modules", "layers_to_transform", "layers_pattern")
"""Keys that choose modules in other ways than by their names."""

_INITS = ("eva_config", "corda_config", "lora_ga_config")
"""Keys that say how training began; peft warns where init_lora_weights does not ask for them."""


_SAFE_DOTS = 2
"""A list chooses every module of the base that ends with one of its names. A path of so many dots
starts at the top of the model; "lm_head" may be inside another module, and so is an expression."""


def adapter_config_text(  # noqa: PLR0913  (every one has a name)
    template: str | None,
    modules: Sequence[OutModule],
    *,
    base: str = "",
    revision: str = "",
    targets: Sequence[str] | None = None,
    parameters: Sequence[str] | None = None,
    saved_modules: Sequence[str] = (),
    tokens: Mapping[str, Sequence[int]] | None = None,
    bias: Bias = "none",
    transposed: bool = False,
) -> str:
    """Return the config by which peft loads exactly these modules, with exactly their scales.

    `r` and `lora_alpha` are what most modules have (what experts have, if there are any);
    `rank_pattern` and `alpha_pattern` name the others, each by an expression that only its whole
    name matches.

    Args:
        template: A config whose other keys, order and format are kept; None for a new one.
        base: base_model_name_or_path; "" keeps the template's.
        revision: The base's revision; "" keeps the template's.
        targets: Ends of names that choose the modules, and no others of the base; where that is not
            known, or not all modules are among them, they are chosen by their full names.
        parameters: Such ends of the names of parameters (target_parameters): of experts, and of
            weights, whose modules are then not chosen as modules.
        saved_modules: modules_to_save.
        tokens: Rows of embeddings that are kept whole, by the embedding's path.
        bias: Which biases of the base the adapter holds whole.
        transposed: fan_in_fan_out.

    Raises:
        CheckpointError: If the template is no JSON object.
        PlanError: If an alpha is beyond the range of float64.
    """
    values = _values(modules, targets, parameters)
    values |= {
        "bias": bias,
        "fan_in_fan_out": transposed,
        "modules_to_save": list(saved_modules) or None,
        "trainable_token_indices": {k: list(v) for k, v in (tokens or {}).items()} or None,
    }
    if base or template is None:
        values["base_model_name_or_path"] = base or None
    if revision or template is None:
        values["revision"] = revision or None
    if template is None:
        new = {"peft_type": "LORA", "task_type": None, "inference_mode": True, "lora_dropout": 0.0}
        return json.dumps(dict(sorted((new | values).items())), indent=2) + "\n"
    return _patched(template, values)


def _values(
    modules: Sequence[OutModule], targets: Sequence[str] | None, parameters: Sequence[str] | None
) -> dict[str, Any]:
    """Return the keys that say what the modules are."""
    paths = [_path(one, set(parameters or ())) for one in modules]
    alphas = [_alpha(one) for one in modules]
    wrapped = [i for i, one in enumerate(modules) if _is_experts(one) or paths[i] != one.module]
    named, chosen = [paths[i] for i in wrapped], set(wrapped)
    others = [one.module for i, one in enumerate(modules) if i not in chosen]
    # peft warns of patterns for parameters, which it does not count as modules
    deciding = wrapped or range(len(modules))
    rank = _most_common([modules[i].rank for i in deciding], 1)
    alpha = _most_common([alphas[i] for i in deciding], rank)
    ranks = zip(paths, [one.rank for one in modules], strict=True)
    values: dict[str, Any] = {
        "r": rank,
        "lora_alpha": alpha,
        "rank_pattern": {_exact(path): r for path, r in ranks if r != rank},
        "alpha_pattern": {_exact(p): a for p, a in zip(paths, alphas, strict=True) if a != alpha},
        "use_rslora": False,
        "use_dora": any(one.magnitude for one in modules),
        "lora_bias": any(one.bias for one in modules),
        "init_lora_weights": True,
        "target_modules": _targets(others, targets) if modules else NOTHING,
        "target_parameters": (list(parameters or ()) if _choose(named, parameters) else named)
        or None,
        "loftq_config": {},
    }
    values |= dict.fromkeys((*_RESET, *_INITS))
    if named:
        values["lora_dropout"] = 0.0  # peft refuses any other for parameters
    return values


def _path(module: OutModule, parameters: set[str]) -> str:
    """Return what peft calls a module: by its weight, where that is chosen as a parameter."""
    weight = f"{module.module}.weight"
    is_parameter = not _is_experts(module) and _is_among(weight, parameters)
    return weight if is_parameter else module.module


def _is_experts(module: OutModule) -> bool:
    return module.kind == "experts"


def _most_common(values: Sequence[Any], default: Any) -> Any:
    return Counter(values).most_common(1)[0][0] if values else default


def _alpha(module: OutModule) -> float | int:
    """Return the number that gives the scale when it is divided by the rank.

    Raises:
        PlanError: If it is beyond the range of float64.
    """
    alpha = module.scale * module.rank
    if not isfinite(alpha):
        raise PlanError(
            f"the scale {module.scale:g} at rank {module.rank} is an alpha beyond float64, which "
            "adapter_config.json cannot say",
            where=module.module,
            hint="look at the alphas of the adapters (mergekit inspect --tensors)",
        )
    near = (round(alpha), alpha, nextafter(alpha, inf), nextafter(alpha, -inf))
    return next((one for one in near if one / module.rank == module.scale), alpha)


def _exact(name: str) -> str:
    """Return an expression that no other name matches, one that ends with this name either."""
    return f"^{re.escape(name)}"


def _targets(names: list[str], targets: Sequence[str] | None) -> list[str] | str:
    if not names:
        return []
    if _choose(names, targets):
        return list(targets or ())
    if min(name.count(".") for name in names) < _SAFE_DOTS:
        return "|".join(re.escape(name) for name in names)
    return names


def _choose(names: Sequence[str], ends: Sequence[str] | None) -> bool:
    """Return whether ends of names choose all of them."""
    known = set(ends or ())
    return bool(names and known) and all(_is_among(name, known) for name in names)


def _is_among(name: str, ends: set[str]) -> bool:
    parts = name.split(".")
    return any(".".join(parts[i:]) in ends for i in range(len(parts)))


def _patched(template: str, values: Mapping[str, Any]) -> str:
    """Return the template with what differs changed, and nothing else."""
    where = "adapter_config.json"
    config = read_config(template, where)
    edits = [Edit((key,), value) for key, value in values.items() if not _says(config, key, value)]
    return edit_config(template, edits, where)


def _says(config: Mapping[str, Any], key: str, value: Any) -> bool:
    """Return whether a config means a value already, perhaps by another way of writing it."""
    if key not in config:
        return value in (None, False, "none") or key in ("init_lora_weights", "loftq_config")
    found = config[key]
    if (found is None or value is None) and key != "target_modules":
        return not found and not value and not isinstance(found, int | str)
    if key in ("target_modules", "target_parameters", "modules_to_save"):
        lists = isinstance(found, list) and isinstance(value, list)
        return sorted(map(str, found)) == sorted(value) if lists else bool(found == value)
    if key == "trainable_token_indices" and isinstance(found, list):
        return [found] == list(value.values())
    return bool(found == value) and isinstance(found, bool) == isinstance(value, bool)
