"""Whether adapters were made for one base model, as far as they say."""

from __future__ import annotations

import re
from collections.abc import Sequence

from merge_kit.errors import MismatchError
from merge_kit.plan.adapters.groups import Member
from merge_kit.plan.findings import Findings

_CACHED = re.compile(r".*models--(?:.+--)?(?P<name>.+?)/snapshots/[0-9a-f]+/*")
"""A path of the Hub's cache, which ends with a hash."""


def check_bases(adapters: Sequence[Member], findings: Findings) -> None:
    """Record a problem if two adapters name different bases, a note if one names none."""
    named = [member for member in adapters if member.adapter.base]
    if named and len(named) < len(adapters):
        silent = next(member for member in adapters if not member.adapter.base)
        findings.note(
            f"{silent.model.label} does not say which model it was made for; "
            f"{named[0].model.label} was made for {named[0].adapter.base}"
        )
    for other in named[1:]:
        first, one, two = named[0], named[0].adapter, other.adapter
        if _name(one.base) != _name(two.base):
            findings.problem(
                MismatchError(
                    f"{first.model.label} was made for {one.base}, {other.model.label} for "
                    f"{two.base}, and changes of different models do not add up",
                    where="base_model_name_or_path",
                    hint="where these are two names of one model, make adapter_config.json of both "
                    "agree",
                )
            )
        elif one.revision and two.revision and one.revision != two.revision:
            findings.note(
                f"{first.model.label} was made for revision {one.revision} of the base, "
                f"{other.model.label} for {two.revision}"
            )


def _name(base: str) -> str:
    """Return the last part of a name or path, which a copy of a model keeps."""
    path = base.replace("\\", "/").rstrip("/")
    cached = _CACHED.fullmatch(path)
    return (cached["name"] if cached else path.rpartition("/")[2]).casefold()
