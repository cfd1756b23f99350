"""The settings of an adapter: one config for all, one for each component, or none."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from merge_kit.errors import CheckpointError
from merge_kit.io.adapter_files import AdapterFiles
from merge_kit.io.adapter_settings import Settings, read_settings
from merge_kit.io.strict_json import shown

_RANK = "r"


@dataclass(frozen=True, slots=True)
class Sections:
    """Settings by where they hold.

    Attributes:
        whole: For all modules, None if the file has none or one for each component.
        components: For modules of a component of a pipeline ("transformer").
    """

    whole: Settings | None = None
    components: Mapping[str, Settings] = field(default_factory=dict)

    def of(self, module: str) -> tuple[Settings | None, str]:
        """Return the settings of a module, and its path as they see it."""
        for component, settings in self.components.items():
            if module.startswith(f"{component}."):
                return settings, module.removeprefix(f"{component}.")
        return self.whole, module


def read_sections(files: AdapterFiles) -> Sections:
    """Return the settings of an adapter's files.

    Raises:
        CheckpointError: If a config is wrong or asks for what is not supported.
    """
    if files.config_text is None:
        return Sections()
    if not files.by_component:
        return Sections(read_settings(files.config, where=files.config_where))
    if _RANK in files.config:  # a file of one model, without a component's name
        return Sections(read_settings(files.config, where=files.config_where))
    split: dict[str, dict[str, Any]] = {}
    for key, value in files.config.items():
        component, dot, rest = key.partition(".")
        if not dot:
            problem = f"{shown(key)} names no component, expected keys like transformer.r"
            raise CheckpointError(problem, where=files.config_where, hint="save it again")
        split.setdefault(component, {})[rest] = value
    return Sections(
        components={
            component: read_settings(config, where=f"{files.config_where}, {component}")
            for component, config in split.items()
        }
    )
