"""Which figures each kind of task has, which of them models are compared by, and which way is better."""

import numpy as np

from behrt_jax.config import TaskKind
from behrt_jax.data.predictions import PredictionFile
from behrt_jax.evaluation.binary import binary_scorer
from behrt_jax.evaluation.bootstrap import Scorer
from behrt_jax.evaluation.multiclass import multiclass_scorer
from behrt_jax.evaluation.multilabel import multilabel_scorer
from behrt_jax.evaluation.regression import regression_scorer
from behrt_jax.evaluation.survival import survival_scorer

COMPARED: dict[TaskKind, tuple[str, ...]] = {
    "binary": ("auroc", "average_precision", "brier", "log_loss"),
    "multiclass": ("macro_auroc", "accuracy", "log_loss", "brier"),
    "multilabel": ("average_precision", "auroc", "incident_average_precision", "repeat_average_precision"),
    "regression": ("mae", "rmse", "r2", "spearman"),
    "survival": ("c_index", "integrated_brier"),
}
"""By these a model is compared with baselines; the first is the main one."""
LESS_IS_BETTER = frozenset({"brier", "log_loss", "mae", "rmse", "integrated_brier", "ece"})


def scorer_of(
    file: PredictionFile, predictions: np.ndarray | None = None, rows: np.ndarray | None = None
) -> Scorer:
    """The scorer of the kind of task.

    Args:
        file: labels, and the model's predictions.
        predictions: a baseline's, in place of the model's; what a decision threshold gives is left out.
        rows: bool or int, some examples; all where not given.
    """
    chosen = slice(None) if rows is None else rows
    labels = file.labels[chosen]
    ours = predictions is None
    predicted = (file.predictions if predictions is None else predictions)[chosen]
    if file.kind == "binary":
        decisions = file.decisions[chosen] if ours and file.decisions is not None else None
        return binary_scorer(labels, predicted, decisions)
    if file.kind == "multiclass":
        return multiclass_scorer(labels, predicted)
    if file.kind == "multilabel":
        assert file.seen_before is not None
        return multilabel_scorer(labels, predicted, file.seen_before[chosen])
    if file.kind == "regression":
        return regression_scorer(labels, predicted)
    return survival_scorer(labels, predicted, file.edges_days)


def why_undefined(kind: TaskKind, labels: np.ndarray, name: str) -> str:
    """Why a figure has no value; labels as in `PredictionFile`."""
    count = len(labels)
    if kind == "binary":
        if labels.all() or not labels.any():
            return f"one class only: all {count:,} labels are {'positive' if labels.any() else 'negative'}"
        if name == "precision":
            return "nothing is predicted positive"
        return "all predictions are the same, or they separate the classes without error"
    if kind == "multiclass":
        return f"one class only: all {count:,} labels are the same"
    if kind == "multilabel":
        return "no example has both a code to find and one to tell it from"
    if kind == "regression":
        return "all labels, or all predictions, are the same"
    return "no pair can be compared" if name == "c_index" else "nobody is followed up to the first edge"
