"""How parameters are trained under any objective: which, from where, by what optimizer, on which devices."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal


@dataclass(frozen=True)
class FreezingConfig:
    """Which parameter groups (lora, embedding, head, base) are trained."""

    regime: Literal["full", "lora", "lora_pretrained", "lora_only", "all_but_adapted"] = "full"
    """full: all. lora: adapters, embeddings and head (right from scratch). lora_pretrained: adapters
    and head (embeddings already pretrained). lora_only and all_but_adapted are known mistakes, kept
    for study: they warn."""
    groups: tuple[Literal["lora", "embedding", "head", "base"], ...] = ()
    """An explicit set of groups to train, in place of a named regime."""


@dataclass(frozen=True)
class GroupValues:
    """One value per parameter group; None takes the common value."""

    lora: float | None = None
    embedding: float | None = None
    head: float | None = None
    base: float | None = None


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW (Loshchilov and Hutter 2017, arXiv 1711.05101) and its schedule."""

    learning_rate: float = 1e-3
    """Peak learning rate."""
    learning_rates: GroupValues = field(default_factory=GroupValues)
    """Peak learning rate of single groups."""
    weight_decay: float = 0.01
    """Decoupled weight decay of matrices (never of biases and LayerNorm)."""
    weight_decays: GroupValues = field(default_factory=GroupValues)
    """Weight decay of single groups."""
    schedule: Literal["constant", "cosine", "linear"] = "cosine"
    """Course of the learning rate after warm-up; cosine and linear end at zero."""
    warmup_fraction: float = 0.05
    """Share of all steps in which the learning rate rises from zero."""
    clip_norm: float | None = 1.0
    """Largest norm of the gradient of all trainable parameters together."""
    b1: float = 0.9
    """Decay of the first moment."""
    b2: float = 0.999
    """Decay of the second moment."""


@dataclass(frozen=True)
class InitConfig:
    """Parameters to start from, in place of random ones."""

    run: Path | None = None
    """Folder of a finished run with the same model and vocabulary; its best checkpoint is read."""
    groups: tuple[Literal["embedding", "head", "base"], ...] = ("embedding", "head", "base")
    """Which of its parameter groups are taken."""


@dataclass(frozen=True)
class MeshConfig:
    """How the devices share the work: data * fsdp is their number."""

    data: int | None = None
    """Groups of devices that each hold all parameters; all that `fsdp` leaves where not given."""
    fsdp: int = 1
    """Devices over which large parameters and their optimizer moments are split, each gathered when it is
    used (FSDP: Zhao et al. 2023, arXiv 2304.11277). The batch is split over all devices in any case."""
