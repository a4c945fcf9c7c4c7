"""AUROC and average precision of weighted and ranked examples, many rankings or sets of weights at once."""

import numpy as np

_PIECE = 1 << 20
"""Scores ranked together."""


def ranked(scores: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Sort scores in descending order and find the runs of equal ones.

    Args:
        scores: float ``[..., n]``.

    Returns:
        order: int64 ``[..., n]``, places of the scores, the highest first;
        first, last: int64 ``[..., n]``, ranks of the first and last score equal to that of each rank.
    """
    order = np.argsort(-scores, axis=-1, kind="stable")
    values = np.take_along_axis(scores, order, axis=-1)
    ranks = np.broadcast_to(np.arange(scores.shape[-1]), scores.shape)
    changes = values[..., 1:] != values[..., :-1]
    edge = np.ones((*scores.shape[:-1], 1), bool)
    first = np.where(np.concatenate([edge, changes], axis=-1), ranks, 0)
    last = np.where(np.concatenate([changes, edge], axis=-1), ranks, scores.shape[-1])
    first = np.maximum.accumulate(first, axis=-1)
    last = np.flip(np.minimum.accumulate(np.flip(last, axis=-1), axis=-1), axis=-1)
    return order, first, last


def ranked_figures(
    positive: np.ndarray, negative: np.ndarray, first: np.ndarray, last: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """AUROC and average precision from the weights of positive and negative examples, in rank order.

    AUROC counts a tie as half (Mann-Whitney); average precision is the sum of precision over steps of
    recall, without interpolation, as scikit-learn has it.

    Args:
        positive: float64 ``[rows, n]``, weight of the example at each rank where it is positive, else 0.
        negative: the same for negative ones.
        first: of :func:`ranked`, ``[n]`` where all rows share one ranking, or ``[rows, n]``.
        last: likewise.

    Returns:
        Two float64 ``[rows]``; NaN where positives (or, for AUROC, negatives) have no weight.
    """
    hits, alarms = np.cumsum(positive, axis=1), np.cumsum(negative, axis=1)  # [R, n]
    all_positive, all_negative = hits[:, -1], alarms[:, -1]
    above = _at(alarms - negative, first)
    hits, alarms = _at(hits, last), _at(alarms, last)
    with np.errstate(divide="ignore", invalid="ignore"):
        beaten = np.einsum("rn,rn->r", positive, all_negative[:, None] - (alarms + above) / 2)
        auroc = beaten / (all_positive * all_negative)
        precision = np.where(positive > 0, hits / (hits + alarms), 0.0)
        average_precision = np.einsum("rn,rn->r", positive, precision) / all_positive
    return auroc, average_precision


def figures_of_rows(
    labels: np.ndarray, scores: np.ndarray, counted: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """AUROC and average precision within each row.

    Args:
        labels: bool ``[rows, n]``.
        scores: float ``[rows, n]``.
        counted: bool ``[rows, n]``, which entries count; all where not given.

    Returns:
        Two float64 ``[rows]``, NaN where a row has no positive, or (both) no negative to tell it from.
    """
    found = np.full((2, len(labels)), np.nan)
    if not labels.shape[1]:
        return found[0], found[1]
    step = max(1, _PIECE // labels.shape[1])
    for start in range(0, len(labels), step):
        piece = slice(start, start + step)
        order, first, last = ranked(scores[piece])
        sorted_labels = np.take_along_axis(labels[piece], order, axis=1)
        weights = (
            np.ones_like(sorted_labels) if counted is None else np.take_along_axis(counted[piece], order, 1)
        )
        positive = (sorted_labels & weights).astype(np.float64)
        negative = (~sorted_labels & weights).astype(np.float64)
        found[:, piece] = ranked_figures(positive, negative, first, last)
    found[1, np.isnan(found[0])] = np.nan
    return found[0], found[1]


def pooled_figures(positive: np.ndarray, negative: np.ndarray) -> tuple[float, float]:
    """AUROC and average precision of two flat sets of scores, in little memory: NaN where one is empty, or a
    score is NaN.
    """
    if not len(positive) or not len(negative):
        return np.nan, np.nan
    positive, negative = np.sort(positive), np.sort(negative)
    if np.isnan(positive[-1]) or np.isnan(negative[-1]):  # NaN is sorted to the end
        return np.nan, np.nan
    below = np.searchsorted(negative, positive, side="left")
    beaten = (below + np.searchsorted(negative, positive, side="right")) / 2  # a tie is half
    hits = len(positive) - np.searchsorted(positive, positive, side="left")
    precision = hits / (hits + len(negative) - below)
    return float(beaten.mean() / len(negative)), float(precision.mean())


def auroc(scores: np.ndarray, labels: np.ndarray) -> float | None:
    """AUROC of one set of examples; None where there is one class alone, or a score is NaN.

    Args:
        scores: float ``[examples]``.
        labels: bool ``[examples]``.
    """
    found, _ = pooled_figures(scores[labels], scores[~labels])
    return None if np.isnan(found) else found


def _at(values: np.ndarray, ranks: np.ndarray) -> np.ndarray:
    return values[:, ranks] if ranks.ndim == 1 else np.take_along_axis(values, ranks, axis=1)
