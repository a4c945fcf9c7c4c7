"""Commands around training: predictions and what is made of them, models in and out, the doctor, reports."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from behrt_jax.config.data import TableColumns


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


# A run, examined and reported.


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
