"""Runs recipes with mergekit, in its own environment: MODELS RECIPES.json OUT -> OUT/errors.json.

Nothing of merge_kit is imported here.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import yaml
from click.testing import CliRunner
from mergekit.config import MergeConfiguration
from mergekit.merge import run_merge
from mergekit.options import MergeOptions
from mergekit.scripts.moe import main as moe
from mergekit.scripts.multimerge import main as multimerge

FLAGS = ["--allow-crimes", "--no-write-model-card", "--no-lazy", "--no-copy-tokenizer"]


def run(text: str, out: Path) -> None:
    """Run one recipe, of one document or of several, or of experts."""
    if "experts" in yaml.safe_load(text.partition("\n---\n")[0]):
        recipe = out.with_suffix(".yml")
        recipe.write_text(text)
        outcome = CliRunner().invoke(moe, [str(recipe), str(out), "--no-write-model-card"])
        if outcome.exit_code:
            raise RuntimeError(f"exit code {outcome.exit_code}") from outcome.exception
        return
    if "\n---\n" not in text:
        options = MergeOptions(
            allow_crimes=True, write_model_card=False, copy_tokenizer=False, quiet=True
        )
        config = MergeConfiguration.model_validate(yaml.safe_load(text))
        run_merge(config, str(out), options=options)
        return
    recipe, between = out.with_suffix(".yml"), out.with_suffix(".between")
    recipe.write_text(text)
    arguments = [str(recipe), "-I", str(between), "--out-path", str(out), *FLAGS]
    outcome = CliRunner().invoke(multimerge, arguments)  # no path may hold a space there
    if outcome.exception is not None:
        raise outcome.exception


def main(models: Path, recipes: Path, out: Path) -> None:
    """Run all recipes beside the models; what fails is told by its name."""
    errors = {}
    os.chdir(models)
    for name, text in json.loads(recipes.read_text()).items():
        try:
            run(text, out / name)
        except Exception as error:  # noqa: BLE001  (the test looks at whether there is one)
            errors[name] = f"{type(error).__name__}: {error}"
    (out / "errors.json").write_text(json.dumps(errors))


if __name__ == "__main__":
    main(*(Path(argument).resolve() for argument in sys.argv[1:]))
