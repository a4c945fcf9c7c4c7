"""Figures of predicted probabilities of yes or no."""

from typing import Any

import numpy as np

from behrt_jax.evaluation.bootstrap import Scorer, weighted_means
from behrt_jax.evaluation.calibration import calibration_line, quantile_bins
from behrt_jax.evaluation.ranking import figures_of_rows, pooled_figures, ranked, ranked_figures

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


# Figures of predicted probabilities of several classes, of which one is right.


def multiclass_scorer(labels: np.ndarray, probabilities: np.ndarray) -> Scorer:
    """Scorer of ``accuracy``, ``macro_auroc`` and ``weighted_auroc`` (one class against the rest; mean over
    classes, plain and by their frequency), ``log_loss`` (nats) and ``brier`` (summed over the classes).

    Classes that are absent, in the examples or in a draw, are left out of the means of AUROC.

    Args:
        labels: int64 ``[n]``, places of the classes.
        probabilities: float64 ``[n, K]``.
    """
    one_hot = labels[:, None] == np.arange(probabilities.shape[1])  # [n, K]
    least = np.finfo(np.float64).eps
    columns = {
        "accuracy": probabilities.argmax(axis=1) == labels,
        "log_loss": -np.log(np.clip(probabilities[one_hot], least, 1 - least)),
        "brier": ((probabilities - one_hot) ** 2).sum(axis=1),
    }
    rankings = [ranked(probabilities[:, k]) for k in range(probabilities.shape[1])]

    def score(weights: np.ndarray) -> dict[str, np.ndarray]:
        aurocs = []
        for k, (order, first, last) in enumerate(rankings):
            in_order, positive = weights[:, order], one_hot[order, k]
            aurocs.append(ranked_figures(in_order * positive, in_order * ~positive, first, last)[0])
        auroc = np.stack(aurocs, axis=1)  # [sets, K]
        defined = ~np.isnan(auroc)
        shares = np.where(defined, weights @ one_hot, 0.0)
        known = np.where(defined, auroc, 0.0)
        found = weighted_means(weights, columns)
        with np.errstate(invalid="ignore"):
            found["macro_auroc"] = known.sum(axis=1) / defined.sum(axis=1)
            found["weighted_auroc"] = (known * shares).sum(axis=1) / shares.sum(axis=1)
        return found

    return score


# Figures of predicted sets of codes, as those of the next visit.

SETS = ("", "incident_", "repeat_")


def multilabel_scorer(labels: np.ndarray, probabilities: np.ndarray, seen_before: np.ndarray) -> Scorer:
    """Scorer of ``average_precision`` and ``auroc``, also with ``incident_`` and ``repeat_`` before them, and
    of ``brier`` and ``log_loss`` (nats), means over examples and codes.

    Args:
        labels: bool ``[n, K]``.
        probabilities: float ``[n, K]``.
        seen_before: bool ``[n, K]``, the code occurs in the history.
    """
    columns = {}
    for name, counted in zip(SETS, _counted(seen_before), strict=True):
        auroc, average_precision = figures_of_rows(labels, probabilities, counted)
        columns |= {f"{name}average_precision": average_precision, f"{name}auroc": auroc}
    least = np.finfo(np.float32).eps
    of_label = np.clip(np.where(labels, probabilities, 1 - probabilities), least, 1 - least)
    columns["brier"] = ((probabilities - labels) ** 2).mean(axis=1, dtype=np.float64)
    columns["log_loss"] = -np.log(of_label).mean(axis=1, dtype=np.float64)
    return lambda weights: weighted_means(weights, columns)


def over_codes(labels: np.ndarray, probabilities: np.ndarray, seen_before: np.ndarray) -> dict[str, dict]:
    """AUROC and average precision over codes, for all, incident and repeated ones; arguments as above.

    Returns:
        ``all``, ``incident`` and ``repeat``, each with ``micro_auroc``, ``micro_average_precision`` (all
        pairs of example and code ranked together), ``macro_...`` (mean over codes, each ranking the
        examples), ``codes`` (how many have both positives and negatives) and ``examples`` (how many have
        a figure of their own, and so count in the averages over samples); None where not defined.
    """
    found = {}
    for name, counted in zip(("all", "incident", "repeat"), _counted(seen_before), strict=True):
        of_code = figures_of_rows(labels.T, probabilities.T, None if counted is None else counted.T)
        defined = np.isfinite(of_code[0])
        positive, negative = (labels, ~labels) if counted is None else (labels & counted, ~labels & counted)
        micro = pooled_figures(probabilities[positive], probabilities[negative])
        has_both = positive.any(axis=1) & negative.any(axis=1)
        found[name] = {
            "micro_auroc": _or_none(micro[0]),
            "micro_average_precision": _or_none(micro[1]),
            "macro_auroc": _or_none(of_code[0][defined].mean() if defined.any() else np.nan),
            "macro_average_precision": _or_none(of_code[1][defined].mean() if defined.any() else np.nan),
            "codes": int(defined.sum()),
            "examples": int(has_both.sum()),
        }
    return found


def _counted(seen_before: np.ndarray) -> tuple[np.ndarray | None, np.ndarray, np.ndarray]:
    return None, ~seen_before, seen_before


def _or_none(value: float) -> float | None:
    return float(value) if np.isfinite(value) else None


# Figures of predicted numbers.


def regression_scorer(labels: np.ndarray, predictions: np.ndarray) -> Scorer:
    """Scorer of ``mae`` and ``rmse`` (in the unit of the labels), ``r2`` and ``spearman``.

    Args:
        labels: float64 ``[n]``.
        predictions: float64 ``[n]``.
    """
    errors = predictions - labels
    centred = labels - labels.mean()
    sums = np.stack([np.abs(errors), errors**2, centred, centred**2], axis=1)
    rankings = ranked(labels), ranked(predictions)

    def score(weights: np.ndarray) -> dict[str, np.ndarray]:
        absolute, squared, mean, square = (weights @ sums).T / weights.sum(axis=1)
        variance = square - mean**2
        variance[variance < 1e-12 * centred.var()] = 0.0  # what rounding leaves of equal labels
        ranks = [_mid_ranks(weights, *ranking) for ranking in rankings]
        with np.errstate(divide="ignore", invalid="ignore"):
            explained = 1 - squared / variance
            spearman = _correlation(weights, *ranks)
        explained[variance == 0] = np.nan
        return {"mae": absolute, "rmse": np.sqrt(squared), "r2": explained, "spearman": spearman}

    return score


def _mid_ranks(weights: np.ndarray, order: np.ndarray, first: np.ndarray, last: np.ndarray) -> np.ndarray:
    """Rank of each example, mean of equal ones, where it stands as often as its weight: ``[sets, n]``."""
    in_order = weights[:, order]
    total = np.cumsum(in_order, axis=1)
    ranks = np.empty_like(weights)
    ranks[:, order] = (total[:, last] + (total - in_order)[:, first]) / 2
    return ranks


def _correlation(weights: np.ndarray, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Weighted correlation of Pearson, ``[sets]``; NaN where either is constant."""
    total = weights.sum(axis=1, keepdims=True)
    x = x - (weights * x).sum(axis=1, keepdims=True) / total
    y = y - (weights * y).sum(axis=1, keepdims=True) / total
    return (weights * x * y).sum(axis=1) / np.sqrt(
        (weights * x**2).sum(axis=1) * (weights * y**2).sum(axis=1)
    )
