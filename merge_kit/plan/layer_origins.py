"""Where the layers of a stage's result come from."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class LayerOrigin:
    """Where one output layer comes from: (model key, its layer) a source.

    Attributes:
        method: What merges the sources, "" where the layer is taken as it is.
        labels: What each source is called, where adapters are applied to one; else empty.
    """

    stack: str
    layer: int
    sources: tuple[tuple[str, int], ...]
    method: str = ""
    labels: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class StageLayers:
    """The layers of a stage whose result feeds others.

    Attributes:
        stage: Its name, which is a key of sources in the stages after it.
        method: Its method.
        models: Keys of what it is made of, each once.
        origins: Of its layers; empty where each comes from those of the same number.
        scales: For each origin, what the stage scales in that layer: kind of tensor, factor.
    """

    stage: str
    method: str
    models: tuple[str, ...]
    origins: tuple[LayerOrigin, ...]
    scales: tuple[tuple[tuple[str, float], ...], ...] = ()
