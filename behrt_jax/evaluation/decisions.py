"""From outputs to predictions, with what is chosen on the tuning split: a temperature and a threshold."""

from typing import Literal

import numpy as np

from behrt_jax.config import TaskKind


def predictions(kind: TaskKind, outputs: np.ndarray, temperature: float = 1.0) -> np.ndarray:
    """What outputs say, float64 ``[examples, outputs]``.

    Binary and multi-label: probabilities; multi-class: of each class; regression: the standardised value;
    survival: probability of no event up to the end of each interval.

    Args:
        kind: of the task.
        outputs: float32 ``[examples, outputs]``.
        temperature: divides the outputs, but for regression.
    """
    from scipy.special import expit, log_expit, softmax

    if kind == "regression":
        return outputs.astype(np.float64)
    scaled = outputs.astype(np.float64) / temperature
    if kind == "multiclass":
        return softmax(scaled, axis=-1)
    if kind == "survival":
        return np.exp(np.cumsum(log_expit(-scaled), axis=-1))
    return expit(scaled)


def mean_predictions(kind: TaskKind, outputs: np.ndarray, temperature: float = 1.0) -> np.ndarray:
    """Mean over members of :func:`predictions`, float64 ``[examples, outputs]``.

    Args:
        kind: of the task.
        outputs: float32 ``[members, examples, outputs]``.
        temperature: of all members.
    """
    return np.mean([predictions(kind, one, temperature) for one in outputs], axis=0)


def fit_temperature(kind: TaskKind, outputs: np.ndarray, targets: np.ndarray) -> float:
    """Temperature at which the log loss of the mean prediction is least (Guo et al. 2017, arXiv 1706.04599).

    Args:
        kind: of the task; of regression and survival it is 1, and where no output is on the wrong side.
        outputs: float ``[members, examples, outputs]``.
        targets: ``[examples, targets]``, see `training.task_losses.TARGETS`.
    """
    from scipy.optimize import minimize_scalar

    def loss(log_temperature: float) -> float:
        found = mean_predictions(kind, outputs, float(np.exp(log_temperature)))
        if kind == "multiclass":
            of_truth = found[np.arange(len(found)), targets[:, 0].astype(int)]
        else:
            of_truth = np.where(targets > 0.5, found, 1 - found)
        return float(-np.log(np.maximum(of_truth, 1e-300)).mean())

    if kind in ("regression", "survival"):
        return 1.0
    if kind == "multiclass":
        wrong = outputs.argmax(axis=-1) != targets[:, 0]
    else:
        wrong = (outputs > 0) != (targets > 0.5)
    if not wrong.any():
        return 1.0  # sharper is always better there: nothing can be learnt
    found = minimize_scalar(loss, bounds=(np.log(0.05), np.log(20.0)), method="bounded")
    return float(np.exp(found.x))


def fit_threshold(
    probabilities: np.ndarray, labels: np.ndarray, how: Literal["f1", "youden"] | float
) -> float:
    """Probability from which on a prediction is positive.

    Args:
        probabilities: float64 ``[examples]``.
        labels: bool ``[examples]``.
        how: ``f1`` for the largest F1, ``youden`` for the largest sensitivity + specificity, or the
            threshold itself. 0.5 where there is one class alone.
    """
    if not isinstance(how, str):
        return float(how)
    positives = np.count_nonzero(labels)
    if positives in (0, len(labels)):
        return 0.5
    order = np.argsort(-probabilities, kind="stable")
    ranked, true = probabilities[order], np.cumsum(labels[order])  # [N]
    last = np.append(np.flatnonzero(np.diff(ranked)), len(ranked) - 1)  # of each run of equal ones
    true, false = true[last], last + 1 - true[last]
    if how == "f1":
        score = 2 * true / (true + false + positives)
    else:
        score = true / positives - false / (len(labels) - positives)
    return float(ranked[last[np.argmax(score)]])
