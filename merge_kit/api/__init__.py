"""The library. What it offers is exported from `merge_kit` itself."""

from __future__ import annotations

from merge_kit.api.merging import Merge, merge, output_folder, plan, read_recipe

__all__ = ["Merge", "merge", "output_folder", "plan", "read_recipe"]
