"""Pretraining: the objective, its course, and all settings of a run."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from behrt_jax.config.data import DataConfig
from behrt_jax.config.model import LoRAConfig, ModelConfig
from behrt_jax.config.training import FreezingConfig, InitConfig, MeshConfig, OptimizerConfig


@dataclass(frozen=True)
class MaskingConfig:
    """Masked-code prediction (Devlin et al. 2018, arXiv 1810.04805)."""

    probability: float = 0.15
    """Share of codes to predict."""
    mask_share: float = 0.8
    """Share of those shown as [MASK]."""
    random_share: float = 0.1
    """Share of those shown as a random code; the rest are shown unchanged."""


@dataclass(frozen=True)
class TrainConfig:
    """Length, batch, validation and stopping of a training run."""

    epochs: int = 20
    """Passes over the training subjects."""
    max_steps: int | None = None
    """Stop after this many steps in all, if that comes first."""
    batch_size: int = 128
    """Subjects a step, on average: packing turns them into rows. (A history that is cut into several
    windows counts as several.)"""
    batch_tokens: int | None = None
    """Tokens a step, in place of batch_size."""
    micro_batches: int | None = None
    """Parts a batch is cut into, one after the other inside the step: less memory, same result. Where not
    given, the fastest number: tried once on each machine for a run of 2,000 steps or more, and remembered;
    by a rule for a shorter one."""
    validate_every: int | None = None
    """Steps between validations; once an epoch where not given."""
    patience: int | None = None
    """Stop after this many validations without a better validation loss."""
    log_every: int = 20
    """Steps between lines in metrics.jsonl."""
    data_on_device: Literal["auto", "yes", "no"] = "auto"
    """The train split lies in the memory of the accelerator, whole on each, and batches are gathered
    there; many steps are then one call. auto: on an accelerator, where it fits. Otherwise the host reads
    batches ahead. Same batches."""
    steps_per_call: int | None = None
    """With data on the device: most steps in one call, after which a signal is answered; log_every where
    not given."""
    static_masks: bool = False
    """Draw the masks once and reuse them each epoch (a historic mistake, for study)."""
    seed: int = 0
    """Seed of initialisation, row order, masks and dropout."""


@dataclass(frozen=True)
class PretrainConfig:
    """Masked-code pretraining of BEHRT."""

    name: str = "custom"
    """Name of the configuration; the default run folder is called after it."""
    model: ModelConfig = field(default_factory=ModelConfig)
    lora: LoRAConfig | None = None
    freezing: FreezingConfig = field(default_factory=FreezingConfig)
    data: DataConfig = field(default_factory=DataConfig)
    masking: MaskingConfig = field(default_factory=MaskingConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    init: InitConfig = field(default_factory=InitConfig)
    mesh: MeshConfig = field(default_factory=MeshConfig)
    output: Path | None = None
    """Run folder; runs/<name>-<time> where not given."""
    resume: bool = False
    """Go on with the run in `output` where it stopped."""
    compilation_cache: Literal["off"] | Path | None = None
    """Folder in which compiled programs are kept for the next start; behrt_jax/compiled in the user's cache
    folder where not given, off for none. JAX_COMPILATION_CACHE_DIR, where set, is used instead."""
