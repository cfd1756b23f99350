"""YAML text -> Recipe; every error carries file:line:column."""

from __future__ import annotations

from merge_kit.recipe.parse import load_recipe, parse_recipe, recipe_from_mapping
from merge_kit.recipe.schema import recipe_schema

__all__ = ["load_recipe", "parse_recipe", "recipe_from_mapping", "recipe_schema"]
