"""What simple baselines learn from and give: the same examples, seen as counts of codes."""

from dataclasses import dataclass

import numpy as np

from behrt_jax.config import TaskKind
from behrt_jax.data.labels import Labels
from behrt_jax.data.tasks import OF_LABELS, Task
from behrt_jax.errors import InputError
from behrt_jax.evaluation.histories import Histories


@dataclass(frozen=True, eq=False)
class BaselineData:
    """Histories and targets; ``[n]`` or ``[n, K]`` as the labels of `PredictionFile` are."""

    kind: TaskKind
    classes: tuple[str, ...]
    """Multi-class and multi-label: those of the predictions."""
    edges_days: np.ndarray
    """Survival: those of the predictions."""
    class_ids: np.ndarray
    """Multi-label: row of each code in the vocabulary, int ``[K]``; -1 where it has none."""
    train: Histories
    train_targets: np.ndarray
    tuning: Histories
    """May have no example."""
    tuning_targets: np.ndarray
    evaluated: Histories
    """In the order of the predictions."""
    boosting_codes: int
    """Most codes that gradient boosting sees."""
    seed: int


@dataclass(frozen=True, eq=False)
class Baseline:
    """A baseline's predictions of the evaluated examples."""

    name: str
    predictions: np.ndarray | None
    """As those of `PredictionFile`; None where it could not be fitted."""
    note: str
    """How it was fitted, or why not."""


def targets_of(
    kind: TaskKind, classes: tuple[str, ...], labels: Labels, rows: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Targets of some labels, and which of the rows have one.

    Args:
        kind: of the task.
        classes: of the predictions.
        labels: a label table.
        rows: int ``[n]``.

    Returns:
        The targets ``[m]`` or ``[m, K]`` as `PredictionFile.labels`, and places among ``rows``, int ``[m]``;
        rows of classes that the model does not know are left out.

    Raises:
        InputError: labels of another kind.
    """
    positive = labels.positive()
    if kind == "binary" and positive is not None:
        return positive[rows], np.arange(len(rows))
    if kind == "binary" or OF_LABELS[labels.kind] != kind:
        raise InputError(
            f"The labels are of the kind {labels.kind}, but the predictions are {kind}: give the label table "
            "that was predicted."
        )
    if kind == "multilabel":
        return Task(kind, classes=classes).targets(labels, rows) > 0, np.arange(len(rows))
    values = labels.values[rows]
    if kind == "multiclass":
        places = {name: place for place, name in enumerate(classes)}
        found = np.array([places.get(str(value), -1) for value in values], np.int64)
        return found[found >= 0], np.flatnonzero(found >= 0)
    return values, np.arange(len(rows))
