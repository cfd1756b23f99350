"""In which style an adapter's file names its tensors."""

from __future__ import annotations

from merge_kit.errors import CheckpointError
from merge_kit.io.adapter_components import Sections
from merge_kit.io.adapter_files import CONFIG, AdapterFiles
from merge_kit.io.adapter_parts import Parts
from merge_kit.io.adapter_values import Style
from merge_kit.io.strict_json import shown

_COMPONENTS = (
    *("unet.", "transformer.", "transformer_2.", "prior.", "controlnet.", "vae."),
    *("text_encoder.", "text_encoder_2.", "text_encoder_3.", "diffusion_model."),
    *("model.diffusion_model.", "lora_unet", "lora_te", "lora_transformer"),
)
"""What names begin with in files that need no config: alpha is the rank, unless it is stored."""


def style_of(parts: Parts, files: AdapterFiles, sections: Sections) -> Style:
    """Return the style of a file.

    Raises:
        CheckpointError: If names of several styles are mixed, or a config is needed and absent.
    """
    where = str(files.checkpoint.root)
    styles = set(parts.styles)
    if files.config_text is not None and not files.by_component:
        styles.add("peft")
    if len(styles) > 1:
        named = " and ".join(sorted(styles))
        problem = f"names tensors in the styles of {named}, expected one"
        if files.config_text is not None:
            problem += f" ({CONFIG} or its like means peft's)"
        hint = "put them into separate files, each with what belongs to it"
        raise CheckpointError(problem, where=where, hint=hint)
    style: Style = styles.pop() if styles else "diffusers"
    if style == "peft" and sections.whole is None:
        problem = f"there is no {CONFIG} beside it, which says by what to scale the change"
        raise CheckpointError(problem, where=where, hint="fetch the config too, name the folder")
    if style == "diffusers":
        _check_scaled(parts, sections, where)
    return style


def _check_scaled(parts: Parts, sections: Sections, where: str) -> None:
    """Refuse to guess a scale: only files of pipelines go by the rank where no alpha is."""
    for module, found in parts.modules.items():
        known = sections.of(module)[0] is not None or "alpha" in found
        if not known and not module.startswith(_COMPONENTS):
            problem = f"nothing says by what to scale the change of {shown(module)}"
            hint = f"fetch {CONFIG} too, and name the folder of both"
            raise CheckpointError(problem, where=where, hint=hint)
