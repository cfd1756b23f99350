"""The files beside the weights, and the vocabulary that they must share."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from merge_kit.architecture.vocab import is_tokenizer_file, same_vocabulary
from merge_kit.errors import CheckpointError, MismatchError
from merge_kit.io.small_files import read_bytes
from merge_kit.plan.findings import Findings
from merge_kit.plan.inputs import Inputs
from merge_kit.plan.models import Model, Part
from merge_kit.plan.values import SideFile
from merge_kit.recipe.values import ModelRef, Stage

_MAX_TOKENIZER_BYTES = 256 << 20


def side_files(
    stage: Stage, donor: Model, parts: Sequence[Part], inputs: Inputs, findings: Findings
) -> list[SideFile]:
    """Return what is written beside the weights: patched configs, and copies of the rest."""
    lender = _tokenizer_lender(stage, donor, inputs)
    _check_vocabularies(stage, lender, inputs.models, findings)
    configs = {_config_name(part): part.config_text for part in parts}
    files = [SideFile(name, None, text) for name, text in configs.items() if text is not None]
    taken = set(configs)
    for model, wanted in ((lender, True), (donor, False)):
        checkpoint = model.checkpoint
        if checkpoint is None or checkpoint.is_file:
            continue
        for name in checkpoint.side_files:
            tokenizer = is_tokenizer_file(name)
            if name not in taken and (tokenizer if wanted else not tokenizer or lender is donor):
                taken.add(name)
                files.append(_copied(checkpoint.root / name, name, findings))
    return sorted(files, key=lambda file: file.name)


def _copied(path: Path, name: str, findings: Findings) -> SideFile:
    if not os.access(path, os.R_OK):
        hint = "check its permissions, or move it away"
        findings.problem(CheckpointError("cannot be read", where=str(path), hint=hint))
    return SideFile(name, path, None)


def lends_files(donor: Model, inputs: Inputs) -> Model:
    """Return the checkpoint whose files a stage's result carries."""
    while donor.checkpoint is None:
        donor = inputs.donors[donor.key]
    return donor if donor.overlay is None else donor.overlay.under


def _config_name(part: Part) -> str:
    return f"{part.path}/config.json" if part.path else "config.json"


def _tokenizer_lender(stage: Stage, donor: Model, inputs: Inputs) -> Model:
    choice = stage.tokenizer
    if choice is None or not isinstance(choice.source, ModelRef):
        return donor
    found = lends_files(inputs.find(choice.source), inputs)
    if not _texts(found):
        raise CheckpointError(
            f"{found.label} has no tokenizer files",
            where=str(choice.mark),
            hint="name a model that has a tokenizer, or leave the key out",
        )
    return found


def _check_vocabularies(
    stage: Stage, lender: Model, models: Sequence[Model], findings: Findings
) -> None:
    own = _texts(lender)
    for model in models:
        other = _texts(model)
        same: bool | None = True
        if model is not lender and own and other:
            same = _same(own, other, f"{lender.label} or {model.label}")
        if same:
            continue
        differ = "differ" if same is False else "may differ"
        if stage.tokenizer is None:
            findings.note(
                f"the vocabularies of {lender.label} and {model.label} {differ}; where their rows "
                f"are merged it is by index, and the tokenizer of {lender.label} is taken"
            )
        else:
            findings.problem(
                MismatchError(
                    f"the vocabularies of {lender.label} and {model.label} {differ}, and rows "
                    "cannot be matched by token yet",
                    where=str(stage.tokenizer.mark),
                    hint="leave tokenizer_source out to merge rows by index, or bring the models "
                    "to one vocabulary first",
                )
            )


def _same(own: Mapping[str, bytes], other: Mapping[str, bytes], whose: str) -> bool | None:
    try:
        return same_vocabulary(own, other)
    except CheckpointError as error:
        where = f"{error.where} of {whose}"
        raise CheckpointError(error.problem, where=where, hint=error.hint) from error


def _texts(model: Model) -> Mapping[str, bytes]:
    checkpoint = model.checkpoint
    if checkpoint is None or checkpoint.is_file:
        return {}
    names = [n for n in checkpoint.side_files if "/" not in n and is_tokenizer_file(n)]
    return {name: read_bytes(checkpoint.root / name, _MAX_TOKENIZER_BYTES) for name in names}
