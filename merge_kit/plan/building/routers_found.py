"""Routers that are found of prompts: what is asked of which base, and what that takes."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

from merge_kit.architecture.ties import embedding_for
from merge_kit.architecture.vocab import is_tokenizer_file
from merge_kit.errors import CheckpointError, PlanError
from merge_kit.methods.sparse_upcycle import SparseUpcycle
from merge_kit.plan.building.built import Site
from merge_kit.plan.building.routers_bill import embedded_bill, hidden_bill
from merge_kit.plan.building.routers_prompts import Sets
from merge_kit.plan.building.routers_sizes import size_errors
from merge_kit.plan.building.routers_tasks import (
    EXPERTS,
    SHARED,
    EmbeddedRouters,
    HiddenRouters,
    Question,
    found_name,
)
from merge_kit.plan.models import Model
from merge_kit.plan.side_files import lends_files
from merge_kit.plan.sources import Found, Source
from merge_kit.plan.values import Artefact

_INSTALL = 'pip install "transformers>=5" sentencepiece protobuf'
_OLD = ("0", "1", "2", "3", "4")
"""Versions of transformers whose models are called in another way."""

_NO_VOCABULARY = ("tokenizer_config", "special_tokens_map", "added_tokens", "chat_template")


@dataclass(frozen=True, slots=True)
class FoundRouters:
    """Routers of each layer, and gates of the shared expert where it has prompts."""

    rows: Mapping[int, Source]
    shared: Mapping[int, Source]
    artefact: Artefact


def found_routers(
    site: Site, method: SparseUpcycle, base: Model, sets: Sets, layers: Sequence[int], hidden: int
) -> FoundRouters:
    """Return routers that are found of prompts.

    Raises:
        MergeKitError: If the base does not do for it.
    """
    experts, shared = sets
    folder, embedding = _tokenizer(site, base), _embedding(base, hidden)
    for problem in size_errors(base, hidden):
        site.findings.problem(problem)
    question = Question(experts, shared, folder, base.label, embedding)
    key, same = f"routers-{site.number}", method.router == "cheap_embed"
    if same:
        artefact = embedded_bill(key, EmbeddedRouters(question))
    else:
        task = _hidden(site, method, base, question, layers)
        artefact = hidden_bill(key, task, base.config or {})

    def found(name: str, rows: int) -> dict[int, Source]:
        names = {layer: found_name(name, None if same else layer) for layer in layers}
        return {layer: Found(key, names[layer], (rows, hidden)) for layer in layers}

    return FoundRouters(
        found(EXPERTS, len(experts)), found(SHARED, 1) if shared is not None else {}, artefact
    )


def _check_extra(site: Site, files: Collection[str]) -> None:
    """Report a missing library, without importing it."""
    needed = {"transformers": "transformers"}
    pieces = [name for name in files if name.endswith(".model")]
    if pieces and "tokenizer.json" not in files:
        needed |= {"sentencepiece": "sentencepiece", "google.protobuf": "protobuf"}
    lacking = [name for module, name in needed.items() if not _is_installed(module)]
    if lacking:
        which = f" to read {pieces[0]}" if lacking[0] != "transformers" else ""
        site.findings.problem(
            PlanError(
                f"prompts for a router need {' and '.join(lacking)}{which}, not installed here",
                where=str(site.stage.mark),
                hint=_INSTALL,
            )
        )
    elif (found := version("transformers")).split(".")[0] in _OLD:
        problem = f"prompts for a router need transformers 5, and {found} is installed"
        site.findings.problem(PlanError(problem, where=str(site.stage.mark), hint=_INSTALL))


def _is_installed(module: str) -> bool:
    try:
        return find_spec(module) is not None
    except ModuleNotFoundError:  # the package around it is missing
        return False


def _tokenizer(site: Site, base: Model) -> Path:
    """Return the folder of the base's tokenizer; report it if there is none."""
    lender = lends_files(base, site.inputs)
    checkpoint = lender.checkpoint
    assert checkpoint is not None  # what lends files has some
    names = () if checkpoint.is_file else checkpoint.side_files
    files = [name for name in names if _has_vocabulary(name)]
    _check_extra(site, files)
    if not files:
        site.findings.problem(
            CheckpointError(
                "prompts for a router without a tokenizer: the base has no tokenizer files",
                where=lender.label,
                hint="put its tokenizer.json beside its weights, or take router: random",
            )
        )
    return checkpoint.root


def _has_vocabulary(name: str) -> bool:
    """Return whether a file of the root may hold a vocabulary."""
    plain = "/" not in name and not name.startswith(_NO_VOCABULARY)
    return plain and is_tokenizer_file(name)


def _embedding(base: Model, hidden: int) -> Source:
    name = embedding_for("", base.specs)
    if name is None or base.specs[name].shape[1:] != (hidden,):
        raise CheckpointError(
            "has no embedding of tokens that a router of prompts could start from",
            where=base.label,
            hint="take router: random",
        )
    return base.tensors[name].source


def _hidden(
    site: Site, method: SparseUpcycle, base: Model, question: Question, layers: Sequence[int]
) -> HiddenRouters:
    text, stack = base.main.config_text, base.described
    if text is None or stack is None:
        raise PlanError(
            f"router {method.router} runs the base on the prompts, and it has no config.json",
            where=str(site.stage.mark),
            hint="put its config.json beside its weights, or take router: cheap_embed",
        )
    by_layer = base.by_layer(stack)
    weights = tuple(
        {suffix: base.tensors[name].source for suffix, name in by_layer.get(layer, {}).items()}
        for layer in range(max(layers, default=-1) + 1)
    )
    averaged = method.router == "hidden_avg"
    return HiddenRouters(question, text, weights, tuple(sorted(set(layers))), averaged)
