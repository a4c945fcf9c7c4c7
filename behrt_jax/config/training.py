"""Runs of training: what all share, then pretraining with its objective and fine-tuning with its task."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from behrt_jax.config.data import DataConfig
from behrt_jax.config.model import FreezingConfig, LoRAConfig, ModelConfig

ObjectiveName = Literal["mlm", "queries", "both"]


# Optimizer, first parameters, devices and trackers.


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
    lora_plus: float | None = None
    """Learning rate of each adapter's b over that of its a (LoRA+: Hayou et al. 2024, arXiv 2402.12354, who
    find about 16 good); 1 where not given."""
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
    vectors: Path | None = None
    """File of vectors that the code embedding starts from, by the name of the code; without `run`. It is
    word2vec's text or binary form, Parquet or CSV (code, and vector or columns of numbers), or npz (codes,
    vectors). Vectors of another length than model.embedding_size are projected to it by their principal
    components. With that size at their length the model's own layer to hidden_size, which trains with the
    embeddings, is the projection."""


@dataclass(frozen=True)
class MeshConfig:
    """Division of the work among devices: data * fsdp is their number."""

    data: int | None = None
    """Groups of devices that each hold all parameters; all that `fsdp` leaves where not given."""
    fsdp: int = 1
    """Devices over which large parameters and their optimizer moments are split, each gathered when it is
    used (FSDP: Zhao et al. 2023, arXiv 2304.11277). The batch is split over all devices in any case."""


@dataclass(frozen=True)
class DistributedConfig:
    """Several processes that train as one, on one machine or many, each started with the same command and the
    same folders; the mesh is over the devices of all. One process alone where nothing is given.
    """

    auto: bool = False
    """Find the processes by what started them: Slurm, Open MPI, Cloud TPU, or Kubernetes, there with the
    package kubernetes (--distributed auto for short)."""
    coordinator: str | None = None
    """HOST:PORT of the first process, in place of auto; with `processes` and `process`."""
    processes: int | None = None
    """Number of processes."""
    process: int | None = None
    """Which of them this one is, from 0."""
    timeout: float = 100.0
    """Seconds after which a process that is not heard of any more ends the others. The run then goes on from
    its last checkpoint with --resume."""


@dataclass(frozen=True)
class TrackingConfig:
    """Metrics also for tools that draw them while a run goes on (pip install 'behrt-jax[tracking]')."""

    tensorboard: bool = False
    """Write event files of TensorBoard, to tensorboard/ in the run folder."""
    wandb: bool = False
    """Record metrics and settings in Weights & Biases. With WANDB_MODE=offline in the environment all stays
    on this machine, in wandb/ in the run folder, until `wandb sync` sends it."""
    project: str = "behrt_jax"
    """Project in Weights & Biases."""


# Pretraining: the objective, its course, and all settings of a run.


@dataclass(frozen=True)
class MaskingConfig:
    """Masked-code prediction (Devlin et al. 2018, arXiv 1810.04805)."""

    probability: float = 0.15
    """Share of codes to predict."""
    mask_share: float = 0.8
    """Share of those shown as [MASK]."""
    random_share: float = 0.1
    """Share of those shown as a random code; the rest are shown unchanged."""
    unit: Literal["code", "visit"] = "code"
    """What is drawn. code: single codes. visit: whole visits, all codes of which are masked together, since
    codes of a visit give each other away."""


@dataclass(frozen=True)
class QueriesConfig:
    """Pretraining on questions (as EveryQuery, arXiv 2603.07900): at the end of a visit, does a code come
    within a horizon? Questions whose horizon ends after the known follow-up (the last event, or death) are
    not asked, whatever is known of the time before.
    """

    times: int = 4
    """Prediction times a subject and epoch, drawn anew from the ends of its visits."""
    questions: int = 64
    """Questions at each prediction time, of a code and a horizon each; the history is read once for all."""
    horizon_days: tuple[float, ...] = (30.0, 90.0, 180.0, 365.0, 730.0)
    """Horizons that are asked of, evenly of those that follow-up reaches. The model reads a horizon as a
    number, so that others in between can be asked for later."""
    codes: tuple[str, ...] = ()
    """Regular expressions; codes are asked of if one matches at their start. Default: all."""
    groups: tuple[str, ...] = ()
    """Regular expressions, each of which is a question of its own as well: any of the codes that it matches
    at their start."""
    group_share: float = 0.2
    """Share of the questions that is of groups, where there are any."""
    frequency_power: float = 0.5
    """Codes are asked of by this power of their frequency in the train split: 1 in proportion to it, 0 all
    alike."""
    positive_share: float = 0.5
    """Share of the questions whose code is drawn from those that do come within the horizon. Importance
    weights in the loss take this choice back: probabilities stay what they are without it."""
    mlm_weight: float = 1.0
    """With objective both: weight of the mean loss of masked codes beside the mean loss of questions."""


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
    """Pretraining of BEHRT, by masked codes or by questions about the future."""

    name: str = "custom"
    """Name of the configuration; the default run folder is called after it."""
    model: ModelConfig = field(default_factory=ModelConfig)
    lora: LoRAConfig | None = None
    freezing: FreezingConfig = field(default_factory=FreezingConfig)
    data: DataConfig = field(default_factory=DataConfig)
    masking: MaskingConfig = field(default_factory=MaskingConfig)
    objective: ObjectiveName = "mlm"
    """What is predicted. mlm: masked codes. queries: answers to questions about the time after a visit (see
    queries). both: masked codes of the same histories beside the questions, by queries.mlm_weight."""
    queries: QueriesConfig = field(default_factory=QueriesConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    init: InitConfig = field(default_factory=InitConfig)
    mesh: MeshConfig = field(default_factory=MeshConfig)
    distributed: DistributedConfig = field(default_factory=DistributedConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    output: Path | None = None
    """Run folder; runs/<name>-<time> where not given."""
    resume: bool = False
    """Go on with the run in `output` where it stopped."""
    compilation_cache: Literal["off"] | Path | None = None
    """Folder in which compiled programs are kept for the next start; behrt_jax/compiled in the user's cache
    folder where not given, off for none. JAX_COMPILATION_CACHE_DIR, where set, is used instead."""


# Fine-tuning: the task, its course, a population, and all settings of a run.


@dataclass(frozen=True)
class TaskConfig:
    """Use that is made of the labels."""

    pooling: Literal["auto", "mean", "max", "last", "attention", "cls"] = "auto"
    """From the vectors of a subject's events to one: their mean, their maximum, the last one, their mean
    weighted by a learned attention, or that of [CLS], which only models with model.cls_token have. auto: the
    one of the first four that does best on tuning in the search."""
    blend: Literal["off", "counts"] = "off"
    """counts: predictions are blended with those of logistic regression and gradient boosting on counts of
    codes, which are weighed by cross-validation on train and tuning, by the largest share of these whose loss
    on tuning is within a standard error of the least. Binary tasks alone; takes scikit-learn."""
    intervals: int = 10
    """Survival: number of time intervals, each with about as many events."""
    label_fraction: float = 1.0
    """Share of the train split's subjects whose labels are used: for studies with few labels."""
    max_length: int | None = None
    """Most recent events that are read of a history, in tokens; the model's positions where not given."""
    packed: bool = True
    """Several examples share a row. Off: one example a row, padded."""
    outside_life: Literal["leave_out", "keep"] | None = None
    """Labels at a time before birth, or on a day after the death: leave them out, counted, or keep them.
    Default: leave out those after death; one before birth is an error."""
    threshold: Literal["f1", "youden"] | float = "f1"
    """Binary: above which probability a prediction is positive. f1 and youden: the one at which F1, or
    sensitivity + specificity, is largest on the tuning split."""


@dataclass(frozen=True)
class TaskTrainConfig:
    """Length, batch, validation and stopping of a fine-tuning run."""

    epochs: int | None = None
    """Passes over the train examples, at most. Where not given, 20, and more of few labels: as many as make
    800 steps, with 40 steps or more between validations."""
    max_steps: int | None = None
    """Stop after this many steps in all, if that comes first."""
    batch_size: int | None = None
    """Examples a step, on average: packing turns them into rows. Where not given, 128, and less of fewer than
    2,000 labels: a sixteenth of them, 16 at least."""
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
class SearchConfig:
    """What is tried before a fine-tuning run: members on one frozen base, in one program, of which the one
    with the least loss on tuning says how the run is trained. They vary in task.pooling where that is auto,
    and about the given optimizer.learning_rate and lora.rank; with adapters, some train the embeddings too.
    Not with regimes that train the base; of a population, in the pooling alone.
    """

    size: int = 8
    """Number of members; 0 for no search, which leaves pooling auto the attention."""
    labels: int = 2000
    """Most train labels that they learn from, and most tuning labels they are judged by, drawn by seed."""


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
    search: SearchConfig = field(default_factory=SearchConfig)
    population: PopulationConfig = field(default_factory=PopulationConfig)
    max_unknown: float | None = None
    """Largest share of tokens that the pretrained model does not know, or whose bins of values are not those
    that it learned. Default: half of them; of 1,000 tokens and more three times the share of its training,
    but at least a tenth of all more than that."""
    extend_vocabulary: bool = False
    """Codes of the data that the pretrained model has no embedding for get a row of their own, trained with
    the adapter. Off: they are read as [UNK]."""
    mesh: MeshConfig = field(default_factory=MeshConfig)
    distributed: DistributedConfig = field(default_factory=DistributedConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    resume: bool = False
    """Go on with the run in `output` where it stopped."""
    compilation_cache: Literal["off"] | Path | None = None
    """Folder in which compiled programs are kept for the next start; behrt_jax/compiled in the user's cache
    folder where not given, off for none. JAX_COMPILATION_CACHE_DIR, where set, is used instead."""
