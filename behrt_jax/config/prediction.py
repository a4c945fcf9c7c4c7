"""Predictions of a fine-tuned model, and how they are judged."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal


@dataclass(frozen=True)
class PredictConfig:
    """Predict with a fine-tuned model, or write embeddings of subjects."""

    model: Path | None = None
    """Folder of a fine-tuning run or of an adapter; with embeddings also of a pretraining run."""
    base: Path | None = None
    """Folder of the pretraining run that an adapter belongs to; the run that the adapter names where not
    given."""
    data: Path | None = None
    """Folder of the prepared data."""
    labels: Path | None = None
    """Label table whose subjects and prediction times are predicted; its values, if it has any, are only
    copied."""
    split: Literal["train", "tuning", "held_out", "all"] = "held_out"
    """Subjects to predict."""
    output: Path | None = None
    """Parquet file to write."""
    embeddings: bool = False
    """Write a vector for each subject and prediction time (subject_id, time, vector), in place of
    predictions; without labels, one a subject at its last event."""
    pooling: Literal["mean", "max", "last", "cls"] | None = None
    """Of embeddings; the model's own, or mean, where not given."""
    rows: int = 64
    """Rows that are computed at once."""
    compilation_cache: Literal["off"] | Path | None = None
    """As in finetune."""


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
