"""Figures of predicted numbers."""

import numpy as np

from behrt_jax.evaluation.bootstrap import Scorer
from behrt_jax.evaluation.ranking import ranked


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
