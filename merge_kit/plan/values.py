"""The plan: steps in write order, shards with their headers, side files, accounting, the bill."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from merge_kit.core.tensors import TensorSpec
from merge_kit.io.values import WeightFile
from merge_kit.methods.base import MergeMethod
from merge_kit.plan.layer_origins import LayerOrigin, StageLayers
from merge_kit.plan.sources import Source


@dataclass(frozen=True, slots=True)
class Target:
    """Where an output tensor is written.

    Attributes:
        key: Name with its component's path ("unet/conv.weight"), unique in the output.
        spec: Name in the file, dtype and shape.
        shard: Index into `Plan.shards`, -1 for the tensor of a stage that feeds others.
        offset: First byte in the shard's file.
    """

    key: str
    spec: TensorSpec
    shard: int
    offset: int


@dataclass(frozen=True, slots=True)
class Step:
    """The making of one output tensor (or of several that one step yields).

    Attributes:
        action: "merge" computes; "copy" moves the bytes of inputs[0] unchanged.
        method: The method with its evaluated parameters; None for a copy.
        base: The base operand, for methods that take one.
        inputs: One source a model, in the order of `models`.
        models: Labels of the models ("input-2:code"), the same on every machine.
        agree: For a copied integer or bool tensor: sources that must hold the same bytes.
        aux: Further operands by name.
        compute: "F32", or "F64" where an input or output is F64 or many models are summed.
        group: Tensors of one group share the statistics of scope "model".
        slab_elements: Largest run of elements in memory at once.
        peak_bytes: Memory of one worker while it runs this step.
        note: What the plan shows beside it, for example that a tied head is its embedding.
        deltas: For each input, whether it is a difference from the base already, which is then
            not subtracted; empty where none is.
        shape: Shape of the matrix whose factors the step yields, None where it yields tensors of
            the shape of its inputs. The outputs are then pairs, a (rank, in) and b (out, rank).
    """

    action: Literal["merge", "copy"]
    outputs: tuple[Target, ...]
    inputs: tuple[Source, ...]
    models: tuple[str, ...]
    method: MergeMethod | None = None
    base: Source | None = None
    weights: tuple[float, ...] = ()
    agree: tuple[Source, ...] = ()
    agree_models: tuple[str, ...] = ()
    aux: tuple[tuple[str, Source], ...] = ()
    compute: Literal["F32", "F64"] = "F32"
    group: int = 0
    seed: int = 0
    slab_elements: int = 0
    peak_bytes: int = 0
    note: str = ""
    deltas: tuple[bool, ...] = ()
    shape: tuple[int, ...] | None = None


@dataclass(frozen=True, slots=True)
class Shard:
    """One output file.

    Attributes:
        name: Relative to the output, with forward slashes.
        header: Length prefix and JSON header, written first.
        nbytes: Size of the whole file.
    """

    name: str
    header: bytes
    nbytes: int


@dataclass(frozen=True, slots=True)
class SideFile:
    """A file beside the weights: copied from `source`, or with this text. Exactly one is set."""

    name: str
    source: Path | None = None
    text: str | None = None


@dataclass(frozen=True, slots=True)
class Fate:
    """What became of one tensor of one input."""

    model: str
    tensor: str
    what: Literal["merged", "copied", "dropped"]
    why: str = ""


@dataclass(frozen=True, slots=True)
class PlanInput:
    """One input model.

    Attributes:
        key: "input-1", "input-2" in the order of the recipe: the only name an output shows of a
            local model, beside its folder's name.
        name: Folder's name or file's stem.
        text: The reference as written in the recipe.
        root: Where it lies.
        hub_id: The Hub id, for models that came from there, else None.
        revision: The resolved revision of a Hub model, else None.
        files: Its weight files as they were when the plan was made.
        is_base: Whether it is the output stage's base model.
    """

    key: str
    name: str
    text: str
    root: Path
    files: tuple[WeightFile, ...]
    hub_id: str | None = None
    revision: str | None = None
    is_base: bool = False


@dataclass(frozen=True, slots=True)
class ModuleRank:
    """The rank of one module of an adapter that is made.

    Attributes:
        key: Module's path, with the adapter's folder in front where there are several.
        rank: The rank, an upper bound while `fitted` is wanted and not yet known.
        fitted: Whether it depends on the weights.
        tensor: Key of the target that is its a: what a look at the weights, and what a run finds
            worth knowing, go by.
    """

    key: str
    rank: int
    fitted: bool = False
    tensor: str = ""


@dataclass(frozen=True, slots=True)
class Fitted:
    """What a look at the weights of a step found, for one of the adapters that it makes.

    Attributes:
        key: As `ModuleRank.tensor`.
        rank: The rank; 0 means that nothing is changed and the module is left out.
        norm: Frobenius norm of the change.
    """

    key: str
    rank: int
    norm: float


@dataclass(frozen=True, slots=True)
class Artefact:
    """Numbers that are found of weights or of prompts before the run, and kept beside it.

    Attributes:
        key: Unique in the plan; a file's name.
        task: What is done to find them; see `engine.artefacts`.
        peak_bytes: Memory that finding them takes, on top of the process.
        kept_bytes: Memory that they take during the run.
        read_bytes: Bytes that are read of the inputs.
        flops: Operations of products and decompositions.
        library_bytes: Memory of libraries that only finding them needs, and that stays; artefacts
            share it.
    """

    key: str
    task: Any
    peak_bytes: int
    kept_bytes: int
    read_bytes: int = 0
    flops: float = 0.0
    library_bytes: int = 0


@dataclass(frozen=True, slots=True)
class Bill:
    """What a run will take.

    Attributes:
        read_bytes: From input files, repeated passes included.
        written_bytes: Of weights.
        scratch_bytes: Of tensors spilled between stages.
        peak_bytes: Resident memory of the whole process.
        workers: Threads that merge.
        heavy_bytes: Memory that whole tensors which are merged at the same time may take together.
        flops: Operations of solves and decompositions; 0 where reading is what takes time.
        solves: Tensors that take such operations.
        solvers: Threads that do them at the same time, at least.
    """

    read_bytes: int
    written_bytes: int
    scratch_bytes: int
    peak_bytes: int
    workers: int
    heavy_bytes: int = 0
    flops: float = 0.0
    solves: int = 0
    solvers: int = 1


@dataclass(frozen=True, slots=True)
class Plan:
    """Everything a run does, before it does it.

    Attributes:
        method: The output stage's method, by name.
        steps: In write order.
        fates: Every tensor of every input.
        architecture: `model_type` of config.json, or "".
        layers: Layers of the described stack in the output, or None.
        parameters: Elements of the output's tensors, all of them.
        dtypes: Header dtype -> tensors in the output.
        notes: What the user should know, one sentence each.
        identity: Hash of everything that decides the output's bytes, for resuming.
        seed: Seed of the run.
        whole_model: Every step of the stages that need statistics over their whole result,
            those too that the output does without.
        agreeing: Copies of stages that feed others, whose inputs must be equal.
        statistics: Files that models are weighed by, "statistics-1" and so on.
        fits: Steps that must be looked at before the layout is known; the others are then laid
            out for the largest result that they can have. None once what they found is in.
        ranks: Rank of each module that the output's adapters change, in the order of the steps;
            upper bounds while there are fits.
        artefacts: What is found of weights or of prompts before the steps run.
        stage_layers: Where the layers of the stages that feed the output come from, in their order.
    """

    method: str
    steps: tuple[Step, ...]
    shards: tuple[Shard, ...]
    side_files: tuple[SideFile, ...]
    inputs: tuple[PlanInput, ...]
    fates: tuple[Fate, ...]
    layer_map: tuple[LayerOrigin, ...]
    architecture: str
    layers: int | None
    parameters: int
    dtypes: tuple[tuple[str, int], ...]
    bill: Bill
    notes: tuple[str, ...]
    identity: str
    seed: int
    whole_model: tuple[Step, ...] = ()
    agreeing: tuple[Step, ...] = ()
    statistics: tuple[PlanInput, ...] = ()
    fits: tuple[Step, ...] = ()
    ranks: tuple[ModuleRank, ...] = ()
    artefacts: tuple[Artefact, ...] = ()
    stage_layers: tuple[StageLayers, ...] = ()

    @property
    def read(self) -> tuple[PlanInput, ...]:
        """Return everything that is read: models, then statistics."""
        return (*self.inputs, *self.statistics)

    def counts(self) -> tuple[int, int, int]:
        """Return how many output tensors are merged and copied, and input tensors dropped."""
        merged = sum(len(s.outputs) for s in self.steps if s.action == "merge")
        copied = sum(len(s.outputs) for s in self.steps if s.action == "copy")
        return merged, copied, sum(f.what == "dropped" for f in self.fates)
