"""Fine-tuning: the task, its course, and all settings of a run."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from behrt_jax.config.model import LoRAConfig
from behrt_jax.config.training import FreezingConfig, MeshConfig, OptimizerConfig

TaskKind = Literal["binary", "multiclass", "multilabel", "regression", "survival"]


@dataclass(frozen=True)
class TaskConfig:
    """What is made of the labels."""

    pooling: Literal["mean", "max", "last", "cls"] = "mean"
    """From the vectors of a subject's events to one: their mean, their maximum, the last one, or that of
    [CLS], which only models with model.cls_token have."""
    intervals: int = 10
    """Survival: number of time intervals, each with about as many events."""
    label_fraction: float = 1.0
    """Share of the train split's subjects whose labels are used: for studies with few labels."""
    max_length: int | None = None
    """Most recent events that are read of a history, in tokens; the model's positions where not given."""
    packed: bool = True
    """Several examples share a row. Off: one example a row, padded."""
    threshold: Literal["f1", "youden"] | float = "f1"
    """Binary: above which probability a prediction is positive. f1 and youden: the one at which F1, or
    sensitivity + specificity, is largest on the tuning split."""


@dataclass(frozen=True)
class TaskTrainConfig:
    """Length, batch, validation and stopping of a fine-tuning run."""

    epochs: int = 20
    """Passes over the train examples."""
    max_steps: int | None = None
    """Stop after this many steps in all, if that comes first."""
    batch_size: int = 128
    """Examples a step, on average: packing turns them into rows."""
    micro_batches: int | None = None
    """Parts a batch is cut into, one after the other inside the step: less memory, same result; by a rule
    where not given."""
    validate_every: int | None = None
    """Steps between validations; once an epoch where not given."""
    patience: int | None = 5
    """Stop after this many validations without a better validation loss."""
    log_every: int = 20
    """Steps between lines in metrics.jsonl."""
    seed: int = 0
    """Seed of initialisation, order of rows and dropout."""


@dataclass(frozen=True)
class PopulationConfig:
    """Several members trained at once on one frozen base, in one program."""

    size: int = 1
    """Number of members; 1 trains a single model. With vary task, that of the label tables."""
    vary: Literal["seed", "learning_rate", "rank", "fold", "task"] = "seed"
    """In what members differ. seed: initialisation and dropout, an ensemble whose mean predicts.
    learning_rate, rank: a search, whose best member predicts. fold: a cross-validation over the train
    split, whose mean predicts. task: what is predicted, each member a binary task of its own."""
    values: tuple[float, ...] = ()
    """Learning rates or ranks, one a member; spread around the configured one where not given."""
    labels: tuple[Path, ...] = ()
    """With vary task, in place of labels: the label table of each member, with subjects and prediction times
    of its own. A member learns from its own labels alone."""


@dataclass(frozen=True)
class FinetuneConfig:
    """Fine-tune a pretrained BEHRT on labels at prediction times."""

    name: str = "custom"
    """Name of the configuration; the default run folder is called after it."""
    data: Path | None = None
    """Folder of the prepared data."""
    labels: Path | None = None
    """Label table by the MEDS schema: a Parquet file, or a folder of such files. Labels of all splits may
    be in it; those of held_out are not read."""
    init: Path | None = None
    """Folder of the pretraining run to start from; gives model and vocabulary."""
    from_scratch: bool = False
    """Start from random parameters, with the model and vocabulary of `init`: for comparison."""
    output: Path | None = None
    """Run folder; runs/<name>-<time> where not given."""
    task: TaskConfig = field(default_factory=TaskConfig)
    lora: LoRAConfig | None = None
    freezing: FreezingConfig = field(default_factory=FreezingConfig)
    dropout: float | None = None
    """Dropout rate of embeddings, residual branches and attention; the pretrained model's where not given."""
    compute_dtype: Literal["float32", "bfloat16"] | None = None
    """Precision of matrix products; the pretrained model's where not given."""
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    train: TaskTrainConfig = field(default_factory=TaskTrainConfig)
    population: PopulationConfig = field(default_factory=PopulationConfig)
    extend_vocabulary: bool = False
    """Codes of the data that the pretrained model has no embedding for get a row of their own, trained with
    the adapter. Off: they are read as [UNK]."""
    mesh: MeshConfig = field(default_factory=MeshConfig)
    resume: bool = False
    """Go on with the run in `output` where it stopped."""
    compilation_cache: Literal["off"] | Path | None = None
    """Folder in which compiled programs are kept for the next start; behrt_jax/compiled in the user's cache
    folder where not given, off for none. JAX_COMPILATION_CACHE_DIR, where set, is used instead."""
