"""merge_kit: merge model checkpoints on a CPU, in memory that does not grow with the model."""

from __future__ import annotations
