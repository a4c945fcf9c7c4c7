"""Every setting of every command, as frozen dataclasses: the model first, then each command's own.

A field's docstring is its ``--help`` text on the command line. Checks that concern several fields
live in :mod:`behrt_jax.workflows.checks`; nothing here imports anything else of the package.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal, TypeVar

# The encoder.

Attention = Literal["auto", "dense", "chunked", "cudnn"]
ObjectiveName = Literal["mlm", "queries", "both"]


@dataclass(frozen=True)
class ModelConfig:
    """Shape and numerics of the BEHRT encoder and its MLM head."""

    embedding_size: int = 64
    """Width of the code, age, visit and position embeddings."""
    hidden_size: int = 128
    """Width of the encoder; the embeddings are projected to it where the two differ."""
    layers: int = 2
    """Number of transformer blocks."""
    heads: int = 4
    """Attention heads; hidden_size must be divisible by it."""
    ffn_size: int | None = None
    """Width of the feed-forward layer. Where not given: 4 * hidden_size, or as many parameters of a gated one
    (8/3 * hidden_size, up to a multiple of 8)."""
    ffn: Literal["gelu", "geglu", "swiglu"] = "gelu"
    """Feed-forward layer: two products with GELU between them, or gated by a third one through GELU or SiLU
    (Shazeer 2020, arXiv 2002.05202)."""
    norm: Literal["layer", "rms"] = "layer"
    """LayerNorm, or RMSNorm (Zhang and Sennrich 2019, arXiv 1910.07467), which subtracts no mean."""
    bias: bool = True
    """Dense layers, LayerNorm and the MLM head's first layer have a bias. Off: none but the decoder's."""
    tied_decoder: bool = False
    """The last layer of the MLM head is the code embedding, in place of a matrix of its own."""
    positions: int = 50
    """Longest sequence, in tokens, that the model reads."""
    position_embedding: Literal["learned", "sinusoidal", "rope", "rope_time"] = "learned"
    """A trained table, the fixed sinusoids of Vaswani et al. 2017, or rotary positions (Su et al. 2021, arXiv
    2104.09864), by which attention reads distances: rope in what position_of counts, rope_time in days."""
    position_of: Literal["event", "visit"] = "event"
    """What a position counts: tokens in the sequence, or (as in the BEHRT paper) visits."""
    rope_base: float = 10_000.0
    """Of rotary positions: the slowest pair of components turns once in 2 pi times so many steps, or days."""
    time: Literal["none", "gaps", "time2vec"] = "none"
    """What is embedded of time beside age, by Time2Vec (Kazemi et al. 2019, arXiv 1907.05321). gaps: days
    since the visit before. time2vec: also the date, which means nothing where each subject's are shifted."""
    age_bin_years: float = 5.0
    """Width of an age bin in years (0.08333333333333333 for months)."""
    age_rows: int = 22
    """Rows of the age table; older ages share the last row."""
    visit_embedding: Literal["ordinal", "alternating", "none"] = "ordinal"
    """A row per visit ordinal, or (as in the BEHRT paper) two rows, A and B, in turn."""
    visit_rows: int = 512
    """Rows of the ordinal visit table; later visits share the last row."""
    cls_token: bool = False
    """Each sequence starts with [CLS] (needed for `cls` pooling)."""
    sep_token: bool = False
    """Each visit ends with [SEP]."""
    fact_tokens: bool = False
    """Facts that do not change (sex, race, ethnicity: `static_codes` of the preparation) stand as tokens
    before the first event of each sequence, and of each window of a longer history. They are never masked."""
    dropout: float = 0.1
    """Dropout rate on embeddings and residual branches."""
    attention_dropout: float | None = None
    """Dropout rate on attention weights; the same as `dropout` where not given."""
    attention: Attention = "auto"
    """dense holds all weights of a batch at once; chunked works them out in tiles, with memory linear in the
    length, and skips tiles between separate subjects: equal results. cudnn is NVIDIA's library (bfloat16,
    no attention dropout): equal up to rounding. auto takes cudnn where it can, else dense for short rows and
    chunked for long ones."""
    compute_dtype: Literal["float32", "bfloat16"] = "float32"
    """Precision of matrix products; parameters, softmax, LayerNorm and loss stay float32."""
    rematerialise: bool = False
    """Recompute each block's activations in the backward pass: less memory, more time. On a CPU memory is
    saved with scan_layers alone."""
    scan_layers: bool = False
    """Compile one block and run it once a layer, its parameters stacked over layers. Deep models compile
    faster by it, shallow ones run slower."""
    head_chunk: int | None = None
    """Codes of the vocabulary whose logits are held at once, for all masked codes. Where not given: the
    whole vocabulary while its logits take little memory, else parts of it. Equal results."""

    def resolved(self) -> "ModelConfig":
        """The same model with the value of each setting written out that follows from another one."""
        dropout = self.dropout if self.attention_dropout is None else self.attention_dropout
        return replace(self, ffn_size=self.inner_size, attention_dropout=dropout)

    @property
    def inner_size(self) -> int:
        """Width of the feed-forward layer, where `ffn_size` is not given too."""
        gated = 8 * -(-self.hidden_size // 3)
        return self.ffn_size or (4 * self.hidden_size if self.ffn == "gelu" else gated)

    @property
    def reads_days(self) -> bool:
        """Whether the day of an event makes a difference, beside the order of events and the age."""
        return self.time != "none" or self.position_embedding == "rope_time"


# Adapters, and what of the model is trained.


@dataclass(frozen=True)
class LoRAConfig:
    """Low-rank adapters (Hu et al. 2021, arXiv 2106.09685)."""

    rank: int = 8
    """Inner width of every adapter, at most that of its layer."""
    alpha: float | None = None
    """The update is scaled by alpha / rank; alpha is 2 * rank where not given."""
    dropout: float = 0.0
    """Dropout rate on an adapter's input."""
    targets: tuple[str, ...] = ("query", "key", "value", "out")
    """Dense layers to adapt, by name (query key value out intermediate output, and gate where model.ffn has
    one) or, with a slash in it, by a glob pattern over the whole path (behrt/encoder/layer_0/*)."""
    exclude: tuple[str, ...] = ()
    """Layers to leave as they are although the targets match them, named likewise."""
    rank_pattern: tuple[str, ...] = ()
    """Other ranks of single layers: PATTERN=RANK, named likewise (out=4 behrt/encoder/layer_0/*=16). Of
    several that match a layer the first counts."""
    alpha_pattern: tuple[str, ...] = ()
    """Other alphas of single layers: PATTERN=ALPHA."""
    rank_stabilised: bool = False
    """Scale by alpha / sqrt(rank) instead (rsLoRA: Kalajdzievski 2023, arXiv 2312.03732)."""
    init: Literal["default", "orthogonal", "pissa"] = "default"
    """First values; the model's outputs are those of its base under each. default: a at random, b zero.
    orthogonal: both at random, in orthogonal parts of the rank. pissa: the largest singular values and
    vectors of the layer, which are taken out of it (Meng et al. 2024, arXiv 2404.02948)."""
    product: Literal["auto", "activations", "extended", "merged"] = "auto"
    """How x @ (W + scale * a @ b) is computed: on activations; in one product with x extended by x @ a and
    W by b (faster on an accelerator); or with the weights merged in the forward pass and a low-rank backward
    pass (faster in float32 on a CPU). Equal results. `auto` takes `merged` where it is allowed (float32, no
    adapter dropout, adapted kernels frozen), `extended` where only the precision forbids that."""


@dataclass(frozen=True)
class FreezingConfig:
    """Parameter groups (of lora, embedding, head and base) that are trained."""

    regime: Literal["full", "lora", "lora_pretrained", "lora_only", "all_but_adapted"] = "full"
    """full: all. lora: adapters, embeddings and head (right from scratch). lora_pretrained: adapters
    and head (embeddings already pretrained). lora_only and all_but_adapted are known mistakes, kept
    for study: they warn."""
    groups: tuple[Literal["lora", "embedding", "head", "base"], ...] = ()
    """An explicit set of groups to train, in place of a named regime."""


# The records that a model is pretrained on.


@dataclass(frozen=True)
class DataConfig:
    """Source of the events, and how they become sequences."""

    source: Literal["clinical", "uniform", "latent", "meds", "prepared"] = "clinical"
    """clinical: generated, with structure to learn. uniform: generated, codes at random, nothing to
    learn. latent: generated from a model whose best possible loss is known and reported. meds: a Medical
    Event Data Standard folder at `path`. prepared: what prepare.py wrote to `path` (--data DIR for
    short); codes, vocabulary and splits are fixed there."""
    path: Path | None = None
    """Folder of the MEDS data set (holds data/ and metadata/), or of prepared data."""
    subjects: int = 5000
    """Generated sources: how many subjects."""
    vocabulary_size: int | None = None
    """Rows of the vocabulary, special tokens included. Generated sources have exactly this many, 1000
    where not given; of other sources the most frequent codes are kept, all where not given."""
    min_count: int | None = None
    """Codes seen fewer times in the train split become [UNK]. Default: 1 for generated sources, 5
    for meds."""
    events_mean: float = 15.0
    """Generated sources: mean number of events in a subject's history."""
    events_spread: float = 0.9
    """Generated sources: standard deviation of the logarithm of that number (long-tailed)."""
    codes: tuple[str, ...] = ()
    """Regular expressions; a code is kept if one matches at its start. Default for meds:
    DIAGNOSIS// PROCEDURE// MEDICATION//; for generated sources: all."""
    exclude_codes: tuple[str, ...] = ()
    """Regular expressions; a code is dropped if one matches at its start."""
    duplicates: Literal["keep", "drop"] | None = None
    """What to do with a code that comes again in the same visit. Default: drop; for latent, whose known
    optimum counts on them, keep."""
    difficulty: float = 0.5
    """latent: from 0 (each condition has codes of its own) to 1 (conditions share codes, more noise)."""
    covariates: tuple[Literal["sex", "year", "gaps"], ...] = ()
    """latent: what codes depend on beside age. sex: a static fact; conditions and codes differ. year:
    treatments come and go with the calendar. gaps: visits are closer the more ill a subject is, stages change
    with the days between them, and so does routine care. What knowing each is worth is reported."""
    visit_column: str | None = None
    """Column of visit ids (hadm_id in MIMIC). Where it is absent or null, a visit is a calendar day."""
    window: Literal["all", "random", "recent", "first"] = "all"
    """What is read of a history longer than `max_length`. all: the whole of it, in consecutive windows,
    each a sequence of its own. random: one window, drawn anew each epoch (validation reads all).
    recent, first: the last or the first events."""
    max_length: int | None = None
    """Longest sequence in tokens; the model's positions where not given."""
    packed: bool = True
    """Several subjects share a row. Off: one subject a row, padded."""
    tuning_fraction: float = 0.1
    """Share of subjects in the tuning split where the source has no splits of its own."""
    held_out_fraction: float = 0.1
    """Share of subjects in the held_out split, likewise."""
    train_fraction: float = 1.0
    """Share of the train split's subjects to train on. A smaller one is a part of a larger one; vocabulary
    and validation stay as they are."""
    seed: int = 0
    """Seed of the generator, of the split, and of which subjects are that share."""
    verify: bool = False
    """Prepared data: read all files through and compare them with what prepare wrote, however large they
    are. Off: up to 2 GiB of them, beside the sizes of all."""


# A training run: optimizer, first parameters and devices.


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


# Pretraining: the objective, its course, and all settings of a run.


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
    number, so that others can be asked for later."""
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


# Preparation: records of any source to a data set on disk.

STATIC_CODES = ("GENDER//", "SEX//", "RACE//", "ETHNICITY//")
"""Patterns of codes that are facts about a subject where they have no time."""


@dataclass(frozen=True)
class TableColumns:
    """Columns of a plain table (source `table`)."""

    subject: str = "subject_id"
    """Integer or text; text that is no integer becomes one by hashing (SHA-256)."""
    time: str = "time"
    """Timestamp, date, or ISO text."""
    code: str = "code"
    """Text or integer."""
    value: str | None = None
    """Number."""
    visit: str | None = None
    """Visit id; a visit is a calendar day where it is null or not given."""
    birth: str | None = None
    """Date of birth, the same in each of a subject's rows, where births are not events of their own."""
    static: tuple[str, ...] = ()
    """Facts that do not change, such as sex race: of each value a subject gets a fact SEX//value, the name of
    the column in capitals, without a time. `static_codes` need not name them."""


@dataclass(frozen=True)
class SplitOptions:
    """Splits of the subjects."""

    names: tuple[str, ...] = ()
    """NAME=SPLIT, for a MEDS data set whose splits have other names, as folders or in its split file:
    test=held_out validation=tuning."""
    exact: bool = False
    """Where the source has no splits: shares exact to the subject, and no split empty where there are three.
    Without it each subject is dealt out by itself, so that it stays where it is when others join."""


@dataclass(frozen=True)
class SkippedTables:
    """Tables of a source that are not read."""

    skip: tuple[str, ...] = ()
    """Names of tables to pass over, not wanted or broken, such as observation."""


@dataclass(frozen=True)
class PrepareConfig:
    """Turn records of any source into a prepared data set, once."""

    source: Literal["meds", "omop", "synthea", "table"] = "meds"
    """meds: a Medical Event Data Standard folder. omop: OMOP CDM 5.3 or 5.4 as CSV, CSV.gz or Parquet.
    synthea: a Synthea CSV export. table: one CSV or Parquet file."""
    input: Path | None = None
    """Folder (or, for a table, file) to read."""
    output: Path | None = None
    """Folder to write; made anew, never overwritten with other options."""
    like: Path | None = None
    """Folder of prepared data, a run or an adapter: prepare other subjects as it was, with its vocabulary,
    bins of values and rules. No split is needed, any may be empty, and one subject is enough."""
    codes: tuple[str, ...] = ()
    """Regular expressions; a code is kept if one matches at its start. Default: diagnoses, medications
    and procedures, as the source names them."""
    exclude_codes: tuple[str, ...] = ()
    """Regular expressions; a code is dropped if one matches at its start."""
    min_count: int = 5
    """Codes seen fewer times in the train split become [UNK]."""
    vocabulary_size: int | None = None
    """Most rows of the vocabulary, special tokens included; the most frequent codes are kept."""
    duplicates: Literal["keep", "drop", "count"] = "drop"
    """A code that comes again in the same visit: keep each, drop the repeats, or count them (one event
    whose code ends in //x2, //x3-5 or //x6+)."""
    value_codes: tuple[str, ...] = ()
    """Regular expressions of codes whose numeric value becomes part of the code, as a quantile bin
    fitted on the train split (LAB//51006//Q3). They are selected in addition to `codes`."""
    value_bins: int = 5
    """How many quantile bins."""
    static_codes: tuple[str, ...] = STATIC_CODES
    """Regular expressions of codes that are kept as facts about the subject (static.parquet) where they have
    no time, or that of birth: for evaluation by group, and for models with model.fact_tokens, in whose
    vocabulary those of min_count train subjects or more have a row. They are no events."""
    births: Path | None = None
    """Table (.csv, .csv.gz or .parquet) of births, with the columns subject_id and birth: of its subjects
    they count in place of those of the records."""
    birth_codes: tuple[str, ...] = ()
    """Regular expressions of codes that are births, beside MEDS_BIRTH: at their time, or, where they have
    none, in the year that is their value or stands at the end of the code (BIRTH_YEAR//1950)."""
    without_birth: Literal["drop", "first_event", "unknown"] = "drop"
    """Events of subjects without a birth: drop them, count the age from their first event, or keep them at an
    unknown age, which has the last row of the age table to itself (but for the oldest)."""
    implausible_ages: Literal["refuse", "drop", "keep"] = "refuse"
    """Events at an age above 150 years: refuse the data, drop them, or keep them. Ages of 300 to 330 years,
    by which MIMIC-III hides those over 89, are always kept."""
    shifted_dates: bool = False
    """The records' dates were shifted by subject, as is done to hide who they are. Recorded alone: the doctor
    warns of models that read the calendar. It sees by itself dates in the future and years that spread over
    more than a century."""
    delays: tuple[str, ...] = ()
    """REGEX=DAYS, how long after its time an event of such a code is known; REGEX=visit where it is known at
    the end of its visit, as diagnoses that are coded at discharge. Recorded alone: events stay as they are,
    and fine-tuning, prediction and the doctor keep them from predictions until they are known."""
    visit_column: str | None = None
    """meds: column of visit ids, such as hadm_id, integers or text; without one a visit is a calendar day."""
    table: TableColumns = field(default_factory=TableColumns)
    ancestors: bool = False
    """omop: replace each concept by its most general ancestor in concept_ancestor that is in the same
    domain, at most two levels up."""
    omop: SkippedTables = field(default_factory=SkippedTables)
    synthea: SkippedTables = field(default_factory=SkippedTables)
    splits: SplitOptions = field(default_factory=SplitOptions)
    tuning_fraction: float | None = None
    """Share of subjects in the tuning split where the source has no splits. Default: 0.1; with --like, where
    neither share is given, all subjects are held_out."""
    held_out_fraction: float | None = None
    """Share of subjects in the held_out split, likewise."""
    seed: int = 0
    """Seed of that split."""
    workers: int = 1
    """Processes that read units of the source side by side."""
    shard: str | None = None
    """i/n: do only the i-th of n parts of the reading (from 0), into a folder beside `output`; on a
    cluster, one job each. Afterwards run once with --merge."""
    merge: bool = False
    """Finish what jobs with --shard have read."""
    to_meds: Path | None = None
    """Also write all events, selected or not, as a MEDS 0.4 data set into this new folder."""
    dry_run: bool = False
    """Read and report, but write no data set."""

    @property
    def shares(self) -> tuple[float, float]:
        """Shares of the tuning and the held_out split, where the source has no splits."""
        given = self.tuning_fraction, self.held_out_fraction
        if self.like is not None and given == (None, None):
            return 0.0, 1.0
        tuning, held_out = (0.1 if share is None else share for share in given)
        return tuning, held_out


# Labels, predictions, and their evaluation.


@dataclass(frozen=True)
class MakeLabelsConfig:
    """Make a label table of prepared data, for all of its splits.

    next_visit: the codes of the next visit (multi-label). first_occurrence: does a code of a set occur
    within a horizon, of subjects who have had none so far. readmission: does another visit begin within
    some days after the end of this one. death: does the subject die within a horizon. Labels are at ends of
    visits; what is not known up to the end of the horizon gets no label, and is counted.
    """

    task: Literal["next_visit", "first_occurrence", "readmission", "death"] | None = None
    """Which labels to make."""
    data: Path | None = None
    """Folder of prepared data."""
    output: Path | None = None
    """Parquet file to write, a MEDS label table sorted by subject and time."""
    codes: tuple[str, ...] = ()
    """Regular expressions; one matches at the start of a code. first_occurrence: the set, must be given.
    next_visit: the codes to predict, the whole vocabulary where not given. readmission: only visits with such
    a code count."""
    horizon_days: float | None = None
    """Length of the horizon, which begins after the gap. Default: 365, for readmission 30, with --survival
    all of the follow-up. Not of next_visit."""
    gap_days: float = 0.0
    """Days after the prediction time that do not count: who has it then gets no label. Not of next_visit."""
    survival: bool = False
    """Days until it happens or is not known any more (boolean_value tells which), in place of yes and no. Not
    of next_visit."""
    times: Literal["all", "last", "random"] = "all"
    """all: after each visit. last: one of each subject, the last that leaves room for the horizon before
    follow-up ends (for next_visit, for another visit). random: one of each subject, by seed."""
    index: Literal["positives"] | Path | None = None
    """first_occurrence and death: Parquet file of index dates (subject_id, prediction_time), which are
    labelled in place of ends of visits. positives: one label of each subject, drawn by seed: of those who
    have it, one of their positive ends of visits; of all others, the last up to a time drawn from these."""
    min_events: int = 1
    """Fewest events that a subject has at the prediction time."""
    follow_up: str | None = None
    """Until when it is known what happens to a subject. subject: the own last event, or death. data: the last
    event of the data set, or an earlier death (wrong where dates are shifted by subject, as in MIMIC). Or a
    date in place of that event, such as 2020-12-31. Default: subject, for readmission data. Not of
    next_visit."""
    seed: int = 0
    """Seed of --times random and --index positives."""


@dataclass(frozen=True)
class PredictConfig:
    """Predict with a fine-tuned model, or write embeddings of subjects."""

    model: Path | None = None
    """Folder of a fine-tuning run or of an adapter; with embeddings also of a pretraining run."""
    base: Path | None = None
    """Folder of the pretraining run that an adapter belongs to; the run that the adapter names where not
    given."""
    data: Path | None = None
    """Folder of the prepared data; without it and `input`, the one that the model was fine-tuned on, with its
    labels where none are given."""
    source: Literal["meds", "omop", "synthea", "table"] | None = None
    """Of `input`; the same as that of the model's own data where not given."""
    input: Path | None = None
    """Records to predict, in place of prepared data: they are prepared as the model's own data were, in a
    folder beside `output` that is removed in the end."""
    visit_column: str | None = None
    """Of `input`, as in prepare."""
    births: Path | None = None
    """Of the subjects of `input`, as in prepare."""
    table: TableColumns = field(default_factory=TableColumns)
    labels: Path | None = None
    """Label table whose subjects and prediction times are predicted; its values, if it has any, are only
    copied. With `data` or `input` and without labels, each subject is predicted at its last event."""
    split: Literal["train", "tuning", "held_out", "all"] | None = None
    """Subjects to predict. Default: held_out, of `input` all."""
    max_unknown: float | None = None
    """Largest share of tokens that the model does not know, or whose bins of values are not those that it
    learned. Default: half of them; of 1,000 tokens and more three times the share of its training, but
    at least a tenth of all more than that."""
    output: Path | None = None
    """Parquet file to write."""
    embeddings: bool = False
    """Write a vector for each subject and prediction time, in place of predictions; without labels, one a
    subject at its last event."""
    embedding_columns: Literal["features", "vector"] = "features"
    """Of embeddings. features: subject_id, prediction_time, features, and the label as its table has it
    where known: what linear probes read. vector: subject_id, time, vector, as earlier versions wrote them."""
    pooling: Literal["mean", "max", "last", "cls"] | None = None
    """Of embeddings; the model's own, or mean, where not given."""
    outside_life: Literal["leave_out", "keep"] | None = None
    """As task.outside_life of finetune."""
    rows: int = 64
    """Rows that are computed at once."""
    compilation_cache: Literal["off"] | Path | None = None
    """As in finetune."""


@dataclass(frozen=True)
class AskConfig:
    """Ask a model that was pretrained on questions whether any code of a set comes within a horizon: the
    probability for each subject and prediction time, without labels to learn from. evaluate reads the file.
    """

    model: Path | None = None
    """Folder of a finished pretraining run with --objective queries or both, or of its export."""
    data: Path | None = None
    """Folder of the prepared data; the one that the model was trained on where not given."""
    codes: tuple[str, ...] = ()
    """Regular expressions; a code is in the set if one matches at its start. A set that the model was trained
    on as a group (queries.groups, the same expression) is asked as one; the codes of any other are asked one
    by one, and taken for independent given the history."""
    horizon_days: float | None = None
    """Days after the prediction time."""
    labels: Path | None = None
    """Label table whose subjects and prediction times are asked about; its values, if it has any, are only
    copied. Without it, each subject is asked about at its last event."""
    split: Literal["train", "tuning", "held_out", "all"] = "held_out"
    """Subjects to ask about."""
    calibrate: bool = True
    """Fit slope and intercept of the log odds (Platt 1999) on the same question at ends of visits of the
    tuning split, where at least 20 answers of either kind are known."""
    max_unknown: float | None = None
    """As in predict."""
    output: Path | None = None
    """Parquet file to write."""
    outside_life: Literal["leave_out", "keep"] | None = None
    """As task.outside_life of finetune."""
    rows: int = 64
    """Rows that are computed at once."""
    compilation_cache: Literal["off"] | Path | None = None
    """As in finetune."""


@dataclass(frozen=True)
class CombineConfig:
    """Make one adapter of several that were trained on the same base. Heads and embeddings that were trained
    beside them are averaged; calibration and blends are left out, since they were fitted to each alone.
    """

    adapters: tuple[Path, ...] = ()
    """Folders of adapters, or of the runs that they are in; of one task, or of pretraining."""
    weights: tuple[float, ...] = ()
    """Of the adapters; shares of 1, all equal, where not given."""
    method: Literal["svd", "linear"] = "svd"
    """svd: the nearest adapter of `rank` to the weighted sum of all updates. linear: the sums of all a and of
    all b, times the roots of weight and scale, for adapters of one rank. As PEFT's add_weighted_adapter."""
    rank: int | None = None
    """svd: rank of the result; in each layer the largest of the adapters where not given."""
    output: Path | None = None
    """Folder to write the adapter to, new."""


@dataclass(frozen=True)
class EvaluateConfig:
    """Judge predictions: figures with intervals, calibration, groups, and simple baselines beside them."""

    predictions: Path | None = None
    """Parquet file that predict wrote."""
    output: Path | None = None
    """Folder to write; made anew, never written into another's files."""
    data: Path | None = None
    """Folder of the prepared data, for baselines and groups; the one that the predictions name where not
    given."""
    labels: Path | None = None
    """Label table, for baselines; the one that the predictions name where not given."""
    baselines: bool = True
    """Fit prevalence, logistic regression and gradient boosting on counts of codes in the same histories."""
    max_train_examples: int = 20_000
    """Most examples of the train split (and of tuning) that baselines are fitted on, drawn at random."""
    boosting_codes: int = 200
    """Most frequent codes that gradient boosting sees."""
    draws: int = 1000
    """Bootstrap draws of subjects for the intervals."""
    seed: int = 0
    """Seed of draws and baselines."""


# A model that leaves its run.


@dataclass(frozen=True)
class ExportConfig:
    """Write a trained model into a folder that can be passed on: weights, settings, vocabulary, model card.

    load, init, predict and finetune take such a folder like the run. It holds no events, subjects or paths.
    """

    run: Path | None = None
    """Folder of a finished run of pretraining or fine-tuning, of an adapter (a member of a population is
    one), or of an export."""
    base: Path | None = None
    """Of an adapter, the run that it was trained on; the one that it names where not given."""
    output: Path | None = None
    """Folder to write, new or empty."""
    adapters: Literal["merged", "beside"] = "merged"
    """merged: into the weights, which are then those of a plain model. beside: in a folder of their own, on
    the weights that they were trained on."""
    format: Literal["own", "torch"] = "own"
    """torch: also write model_torch.safetensors, the same weights as a state_dict of BEHRT in PyTorch."""
    stablehlo: bool = False
    """Also write the model as a program, predict.stablehlo, that runs where only jax and flatbuffers are
    installed: predictions of a fine-tuned model, vectors of a pretrained one."""
    vectors: bool = False
    """Also write the code embedding by the name of the code: vectors.parquet, and vectors.txt in word2vec's
    text form."""
    min_subjects: int = 10
    """Counts of codes that fewer train subjects have are left out of vocabulary.parquet and the model card,
    and so are smaller numbers of subjects and labels; 1 for all."""
    evaluation: Path | None = None
    """Folder that evaluate wrote about predictions of this model: its figures go into the model card."""
    licence: str = "unknown"
    """Of the model, as the Hugging Face Hub names licences, such as apache-2.0."""


@dataclass(frozen=True)
class ImportWeightsConfig:
    """Make a folder as export writes it of a checkpoint of BEHRT in PyTorch (a state_dict of an encoder of
    torch.nn, with its MLM head).

    load, init and finetune take the folder. Adapters of the checkpoint are merged into its weights.
    """

    weights: Path | None = None
    """File of the checkpoint: safetensors (.safetensors), or what torch.save wrote, of tensors alone."""
    vocabulary: Path | None = None
    """Codes and their ids there: JSON (code -> id, or a list), Parquet or CSV (columns code and id)."""
    heads: int | None = None
    """Attention heads of the model, which its weights do not tell."""
    output: Path | None = None
    """Folder to write, new or empty."""
    alpha: float | None = None
    """Of adapters in the checkpoint: their product is scaled by alpha / rank."""
    age_bin_years: float = 5.0
    """Width of an age bin in years."""
    special: tuple[str, ...] = ()
    """Which code there is a special token here, where its name does not tell: [MASK]=CODE."""
    cls_token: bool = False
    """Each sequence of the model starts with [CLS]."""
    sep_token: bool = False
    """Each visit ends with [SEP]."""


# The doctor.


@dataclass(frozen=True)
class DoctorConfig:
    """Examine a run, or prepared data and its labels, for mistakes. The exit status is 1 where a finding
    is an error.
    """

    run: Path | None = None
    """Folder of a training run, finished or not."""
    data: Path | None = None
    """Folder of prepared data, audited for leakage."""
    labels: Path | None = None
    """With `data`: a Parquet file or folder of MEDS labels to audit with it."""
    output: Path | None = None
    """JSON file to write the findings to."""
    horizon_days: float | None = None
    """With `labels`: days after the prediction time that the label speaks of. A negative label needs
    events up to their end; without it, some event after the prediction time."""
    outcome_codes: tuple[str, ...] = ()
    """With `labels`: regular expressions of the codes that define the label; one matches at the start of
    a code."""
    delays: tuple[str, ...] = ()
    """With `labels`: REGEX=DAYS, how long after its time an event of such a code is known; REGEX=visit
    where it is known at the end of its visit, as diagnoses that are coded at discharge. Those that the data
    were prepared with where not given."""
    death_codes: tuple[str, ...] = (r"MEDS_DEATH", r"DOD$", r"DEATH\b", r".*//(DIED|EXPIRED)\b")
    """With `data`: regular expressions of codes that say that the subject died."""


@dataclass(frozen=True)
class ReportConfig:
    """Make the report of a run again, without the model, or compare several runs on one page."""

    runs: tuple[Path, ...] = ()
    """Run folders of pretrain or finetune; also given without --runs before them."""
    output: Path | None = None
    """HTML file to write. Where not given, report.html in the run's folder or, of several runs,
    comparison.html here."""


# Settings, and other records, read back from what a run or an adapter was stored with.

C = TypeVar("C")


def from_stored(kind: type[C], values: Mapping[str, object]) -> C:
    """A record of this kind (a dataclass) from its JSON, which another version of behrt_jax may have written.

    What is not there has its default, and what this version does not know is passed over.
    """
    known = {field.name for field in fields(kind)}  # pyright: ignore[reportArgumentType]
    read: dict[str, Any] = {
        name: tuple(value) if isinstance(value, list) else value
        for name, value in values.items()
        if name in known
    }
    return kind(**read)
