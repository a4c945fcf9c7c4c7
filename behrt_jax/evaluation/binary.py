"""Figures of predicted probabilities of yes or no."""

from typing import Any

import numpy as np

from behrt_jax.evaluation.bootstrap import Scorer
from behrt_jax.evaluation.calibration import calibration_line, quantile_bins
from behrt_jax.evaluation.ranking import ranked, ranked_figures

THRESHOLDS = np.arange(1, 100) / 100
"""Threshold probabilities of the decision curve."""


def binary_scorer(
    labels: np.ndarray, probabilities: np.ndarray, decisions: np.ndarray | None = None, line: bool = True
) -> Scorer:
    """Scorer of ``auroc``, ``average_precision``, ``brier``, ``log_loss`` (nats), ``ece``, ``prevalence``,
    ``mean_prediction`` and, where asked for, more.

    The expected calibration error is over ten bins of equal numbers of examples, which stay as they are in
    all draws.

    Args:
        labels: bool ``[n]``.
        probabilities: float64 ``[n]``.
        decisions: bool ``[n]``, positive by a threshold: adds ``f1``, ``precision``, ``recall`` and
            ``specificity``.
        line: add ``calibration_slope`` and ``calibration_intercept``.
    """
    order, first, last = ranked(probabilities)
    sorted_labels = labels[order]
    least = np.finfo(np.float64).eps
    of_label = np.clip(np.where(labels, probabilities, 1 - probabilities), least, 1 - least)
    bins = quantile_bins(probabilities)
    one_hot = bins[:, None] == np.arange(bins.max() + 1)  # [n, bins]
    sums = np.stack([(probabilities - labels) ** 2, -np.log(of_label), labels, probabilities], axis=1)
    gaps = np.where(one_hot, (labels - probabilities)[:, None], 0.0)  # [n, bins]

    def score(weights: np.ndarray) -> dict[str, np.ndarray]:
        total = weights.sum(axis=1)
        in_order = weights[:, order]
        auroc, average_precision = ranked_figures(
            in_order * sorted_labels, in_order * ~sorted_labels, first, last
        )
        average_precision = np.where(np.isnan(auroc), np.nan, average_precision)
        brier, log_loss, prevalence, mean_prediction = (weights @ sums).T / total
        found = {
            "auroc": auroc,
            "average_precision": average_precision,
            "brier": brier,
            "log_loss": log_loss,
            "ece": np.abs(weights @ gaps).sum(axis=1) / total,
            "prevalence": prevalence,
            "mean_prediction": mean_prediction,
        }
        if line:
            slope, intercept = calibration_line(labels, probabilities, weights)
            found |= {"calibration_slope": slope, "calibration_intercept": intercept}
        return found if decisions is None else found | _decided(labels, decisions, weights)

    return score


def _decided(labels: np.ndarray, decisions: np.ndarray, weights: np.ndarray) -> dict[str, np.ndarray]:
    cells = np.stack(
        [labels & decisions, ~labels & decisions, labels & ~decisions, ~labels & ~decisions], axis=1
    ).astype(np.float64)
    hits, alarms, misses, rest = (weights @ cells).T
    with np.errstate(invalid="ignore"):
        return {
            "f1": 2 * hits / (2 * hits + alarms + misses),
            "precision": hits / (hits + alarms),
            "recall": hits / (hits + misses),
            "specificity": rest / (rest + alarms),
        }


def decision_curve(labels: np.ndarray, probabilities: np.ndarray) -> list[dict[str, float]]:
    """Net benefit at each threshold probability (Vickers and Elkin 2006, doi 10.1177/0272989X06295361).

    Those with a probability at or above the threshold are treated: net benefit is true positives less false
    positives times odds of the threshold, per example. Treating nobody has 0.

    Returns:
        For each threshold ``threshold``, ``model`` and ``treat_all``, ready for JSON.
    """
    treated = probabilities[:, None] >= THRESHOLDS  # [n, T]
    odds = THRESHOLDS / (1 - THRESHOLDS)
    hits, alarms = treated[labels].sum(axis=0) / len(labels), treated[~labels].sum(axis=0) / len(labels)
    model, everyone = hits - alarms * odds, labels.mean() - (1 - labels.mean()) * odds
    return [
        {"threshold": float(threshold), "model": float(ours), "treat_all": float(all_)}
        for threshold, ours, all_ in zip(THRESHOLDS, model, everyone, strict=True)
    ]


def curves(labels: np.ndarray, probabilities: np.ndarray, points: int = 200) -> dict[str, Any] | None:
    """ROC and precision-recall curves, thinned to some points; None where there is one class only."""
    if labels.all() or not labels.any():
        return None
    order, _, last = ranked(probabilities)
    ends = np.unique(last)
    hits = np.cumsum(labels[order])[ends]
    recall, alarms = hits / labels.sum(), (ends + 1 - hits) / np.count_nonzero(~labels)
    precision = hits / (ends + 1)
    chosen = np.unique(np.linspace(0, len(ends) - 1, points).round().astype(int))
    return {
        "false_positive_rate": [0.0, *alarms[chosen].tolist()],
        "recall": [0.0, *recall[chosen].tolist()],
        "precision": [float(precision[0]), *precision[chosen].tolist()],
    }
