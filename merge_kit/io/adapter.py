"""Opening a LoRA adapter: every tensor of it gets its meaning, or is refused by name."""

from __future__ import annotations

from pathlib import Path

from merge_kit.core.tensors import StoredTensor
from merge_kit.errors import CheckpointError, MergeKitError, raise_all
from merge_kit.io.adapter_components import Sections, read_sections
from merge_kit.io.adapter_experts import parameter_update, parameters, unwrapped
from merge_kit.io.adapter_files import CONFIG, STEM, AdapterFiles, open_files
from merge_kit.io.adapter_keys import read_key
from merge_kit.io.adapter_parts import Parts, gather
from merge_kit.io.adapter_refused import is_other_family
from merge_kit.io.adapter_style import style_of
from merge_kit.io.adapter_tokens import token_rows
from merge_kit.io.adapter_updates import check_pairs, kind_of, linear_update
from merge_kit.io.adapter_values import Adapter, Update
from merge_kit.io.adapter_whole import whole_tensors
from merge_kit.io.families import STEMS, families
from merge_kit.io.header import read_header
from merge_kit.io.index import few
from merge_kit.io.strict_json import is_printable, shown

_MOST_ERRORS = 10
"""Reported of those that one wrong number in a config causes in every module."""


def open_adapter(path: Path, name: str | None = None) -> Adapter:
    """Return the adapter at a path, read from headers and its config.

    Accepted are a folder of peft's (adapter_config.json, adapter_model.safetensors or shards of
    it), and single files of peft, diffusers and kohya's trainers. In a folder that holds a model
    too, the adapter is taken.

    Args:
        name: What an output calls it; default: the folder's name, or the file's stem.

    Raises:
        CheckpointError: If nothing is there, it is broken, no LoRA, of a kind that is not
            supported, or config and weights contradict one another.
        Problems: If several modules are wrong.
    """
    files = open_files(path, name)
    where = str(files.checkpoint.root)
    tensors = files.checkpoint.components[0].tensors
    parts = gather(tensors, where=where)
    if not (parts.modules or parts.tokens or (parts.whole and files.config_text)):
        problem = f"none of its {len(tensors)} tensors is a low-rank factor: {few(tensors)}"
        hint = "name an adapter here; a whole model stands where a recipe wants a model"
        raise CheckpointError(problem, where=where, hint=hint)
    sections = read_sections(files)
    style = style_of(parts, files, sections)
    _settle_alphas(parts, sections)
    check_pairs(parts.modules, where=where)
    updates = _updates(parts, sections, where)
    settings = sections.whole
    whole = whole_tensors(parts.whole, frozenset(update.module for update in updates), settings)
    rows = token_rows(parts.tokens, settings, files.config_where)
    return Adapter(
        checkpoint=files.checkpoint,
        style=style,
        config=files.config,
        config_text=files.config_text,
        base=_text(files, "base_model_name_or_path"),
        revision=_text(files, "revision"),
        updates=updates,
        saved=whole.saved,
        rows=rows,
        dropped=whole.dropped,
    )


def _settle_alphas(parts: Parts, sections: Sections) -> None:
    """Take what only looks like an alpha for a tensor of its own: peft writes none."""
    if sections.whole is None:
        return
    for module, found in list(parts.modules.items()):
        if set(found) == {"alpha"}:
            parts.whole[f"{module}.alpha"] = found["alpha"]
            del parts.modules[module]


def _updates(parts: Parts, sections: Sections, where: str) -> tuple[Update, ...]:
    settings = sections.whole
    named = parameters(parts.modules, settings) if settings is not None else {}
    inner = unwrapped(parts.modules)
    if inner:
        problem = f"{shown(inner[0])} is a part of torch's MultiheadAttention, not supported"
        hint = "merge it into its base with peft, and name the merged model"
        raise CheckpointError(problem, where=where, hint=hint)
    updates, errors = [], []
    for module, found in parts.modules.items():
        try:
            if settings is not None and module in named:
                updates.append(parameter_update(named[module], found, settings))
            else:
                its_settings, place = sections.of(module)
                kind = kind_of(found, module in parts.embeddings)
                updates.append(linear_update(module, found, kind, its_settings, place))
        except CheckpointError as error:
            errors.append(error)
    raise_all(errors[:_MOST_ERRORS])
    return tuple(updates)


def _text(files: AdapterFiles, key: str) -> str:
    value = files.config.get(key)
    if value is None:
        return ""
    if not isinstance(value, str) or not is_printable(value):
        problem = f"{key} is {shown(value)}, expected a name"
        raise CheckpointError(problem, where=files.config_where, hint="correct it or remove it")
    return value


def is_adapter(path: Path) -> bool:
    """Return whether a path holds an adapter and no model, by names and headers.

    A folder that holds both is a model here, and what does not exist or is broken is no adapter:
    whoever opens it as a model reports what is wrong.
    """
    try:
        if path.is_dir():
            return _is_adapter_folder(path)
        return path.name.endswith(".safetensors") and (
            path.stem == STEM or _has_factors(read_header(path).tensors)
        )
    except (OSError, ValueError, MergeKitError):
        return False


def _is_adapter_folder(path: Path) -> bool:
    names = [one.name for one in path.iterdir() if not one.name.startswith(".")]
    found = families(names)
    if STEMS[0] in found or STEMS[1] in found:
        return False
    if CONFIG in names or STEM in found:
        return True
    files = [file for family in found.values() for file in family.files]
    return len(files) == 1 and _has_factors(read_header(path / files[0]).tensors)


def _has_factors(tensors: tuple[StoredTensor, ...]) -> bool:
    """Return whether most tensors are those of an adapter, of whichever kind."""
    names = [tensor.spec.name for tensor in tensors]
    parts = [read_key(name).part for name in names if not is_other_family(name)]
    others = len(names) - len(parts)
    marked = others + len(parts) - parts.count("whole")
    return others + parts.count("a") > 0 and len(names) <= 2 * marked
