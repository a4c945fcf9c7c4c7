"""Calibration: temperature and threshold, which are fitted on the tuning split, and how far predictions agree
with what came true.
"""

from typing import Literal

import numpy as np

from behrt_jax.data.tasks import KINDS, TaskKind


def mean_predictions(kind: TaskKind, outputs: np.ndarray, temperature: float = 1.0) -> np.ndarray:
    """Mean over members of what their outputs, float32 ``[members, examples, outputs]``, say at a common
    temperature: float64 ``[examples, outputs]``.
    """
    return np.mean([KINDS[kind].predictions(one, temperature) for one in outputs], axis=0)


def fit_temperature(kind: TaskKind, outputs: np.ndarray, targets: np.ndarray) -> float:
    """Temperature at which the log loss of the mean prediction is least (Guo et al. 2017, arXiv 1706.04599).

    Args:
        kind: of the task; of regression and survival it is 1, and where no output is on the wrong side.
        outputs: float ``[members, examples, outputs]``.
        targets: ``[examples, targets]``, see `data.tasks`.
    """
    from scipy.optimize import minimize_scalar

    of = KINDS[kind]

    def loss(log_temperature: float) -> float:
        found = mean_predictions(kind, outputs, float(np.exp(log_temperature)))
        return float(-np.log(np.maximum(of.of_truth(found, targets), 1e-300)).mean())

    if not of.tempered or not of.errs(outputs, targets):
        return 1.0  # where nothing is wrong sharper is always better: nothing can be learnt
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


# How far predictions agree with what came true.

BINS = 10
_STEPS = 60
_NEAREST = 1e-7  # to 0 and 1: beyond, float32 cannot tell, and one example would decide the slope


def quantile_bins(probabilities: np.ndarray) -> np.ndarray:
    """Bins of (nearly) equal numbers of examples, equal probabilities together: int64 ``[n]``, from 0."""
    edges = np.unique(np.quantile(probabilities, np.linspace(0, 1, BINS + 1)[1:-1]))
    return np.unique(np.searchsorted(edges, probabilities, side="right"), return_inverse=True)[1]


def reliability_bins(labels: np.ndarray, probabilities: np.ndarray) -> list[dict[str, float]]:
    """Mean prediction and share of positives in each of :func:`quantile_bins`, ready for JSON.

    ``low`` and ``high`` are the 95 % interval of the share by Wilson (1927), which takes examples for
    independent.
    """
    found, z = [], 1.96
    for inside in _bins(probabilities):
        count, share = int(inside.sum()), int(labels[inside].sum()) / int(inside.sum())
        middle = (share + z * z / (2 * count)) / (1 + z * z / count)
        half = z / (1 + z * z / count) * np.sqrt(share * (1 - share) / count + (z / (2 * count)) ** 2)
        low, high = max(0.0, float(middle - half)), min(1.0, float(middle + half))
        found.append(_bin(probabilities[inside], share, low, high))
    return found


def regression_bins(labels: np.ndarray, predictions: np.ndarray) -> list[dict[str, float]]:
    """The same for predicted numbers: mean prediction, and mean label with its 95 % interval."""
    found = []
    for inside in _bins(predictions):
        of_bin = labels[inside]
        mean, count = float(of_bin.mean()), len(of_bin)
        half = 1.96 * float(of_bin.std(ddof=1)) / np.sqrt(count) if count > 1 else 0.0
        found.append(_bin(predictions[inside], mean, mean - half, mean + half))
    return found


def _bins(predictions: np.ndarray) -> list[np.ndarray]:
    bins = quantile_bins(predictions)
    return [bins == index for index in range(bins.max() + 1)]


def _bin(predictions: np.ndarray, observed: float, low: float, high: float) -> dict[str, float]:
    found = {"examples": len(predictions), "predicted": float(predictions.mean())}
    return {**found, "observed": observed, "low": low, "high": high}


def calibration_line(
    labels: np.ndarray, probabilities: np.ndarray, weights: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Calibration slope and intercept (Cox 1958; Van Calster et al. 2019, doi 10.1186/s12916-019-1466-7).

    The slope is that of a logistic regression of the labels on the log odds predicted: 1 is right, below 1
    the predictions are too extreme. The intercept is that with the slope held at 1 (calibration in the
    large): 0 is right, above 0 the risk is underestimated. Probabilities are kept 1e-7 away from 0 and 1.

    Args:
        labels: bool ``[n]``.
        probabilities: float64 ``[n]``.
        weights: float64 ``[sets, n]``.

    Returns:
        Two float64 ``[sets]``; NaN where there is one class only, where the slope has no finite value
        (labels that the predictions separate) or where all predictions are the same (slope alone).
    """
    clipped = np.clip(probabilities, _NEAREST, 1 - _NEAREST)
    odds = np.log(clipped) - np.log1p(-clipped)  # [n]
    spread = odds.std()
    intercept = _fit(np.ones((1, len(odds))), odds, labels, weights)[:, 0]
    if spread < 1e-9:
        return np.full(len(weights), np.nan), intercept
    scaled = (odds - odds.mean()) / spread
    slope = _fit(np.stack([np.ones_like(scaled), scaled]), np.zeros_like(odds), labels, weights)[:, 1]
    return slope / spread, intercept


def fit_platt(log_odds: np.ndarray, labels: np.ndarray) -> tuple[float, float]:
    """Slope and intercept of a logistic regression of labels on log odds (Platt 1999).

    Args:
        log_odds: float64 ``[n]``.
        labels: bool ``[n]``.

    Returns:
        NaN for both where they have no finite value: one class alone, labels that the log odds separate, or
        log odds that are all the same.
    """
    middle, spread = float(log_odds.mean()), float(log_odds.std())
    if spread < 1e-9:
        return float("nan"), float("nan")
    scaled = (log_odds - middle) / spread
    features = np.stack([np.ones_like(scaled), scaled])
    intercept, slope = _fit(features, np.zeros_like(scaled), labels, np.ones((1, len(scaled))))[0]
    return float(slope / spread), float(intercept - slope * middle / spread)


def _fit(features: np.ndarray, offsets: np.ndarray, labels: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Logistic regressions by Newton's method, one for each set of weights: ``[sets, F]``.

    ``features`` is ``[F, n]`` with F of 1 or 2, the first of them constant.
    """
    count, sets = len(features), len(weights)
    coefficients = np.zeros((sets, count))
    products = [(i, j) for i in range(count) for j in range(i, count)]
    squares = np.stack([features[i] * features[j] for i, j in products])  # [pairs, n]
    target = (weights * labels) @ features.T  # [sets, F]
    total = weights.sum(axis=1)
    going = (target[:, 0] > 0) & (target[:, 0] < total)
    coefficients[~going] = np.nan
    longest, before = np.full(sets, 4.0), np.zeros((sets, count))
    for _ in range(_STEPS):
        rows = np.flatnonzero(going)
        if not len(rows):
            break
        with np.errstate(over="ignore"):
            risk = 1 / (1 + np.exp(-(coefficients[rows] @ features + offsets)))  # [rows, n]
        weighted = weights[rows] * risk
        gradient = target[rows] - weighted @ features.T
        entries = (weighted * (1 - risk)) @ squares.T  # [rows, pairs]
        hessian = np.empty((len(rows), count, count))
        for place, (i, j) in enumerate(products):
            hessian[:, i, j] = hessian[:, j, i] = entries[:, place]
        bad = np.linalg.det(hessian) < 1e-12 * total[rows] ** count
        hessian[bad] = np.eye(count)
        step = np.linalg.solve(hessian, gradient[..., None])[..., 0]
        # A step that turns back has gone too far: the next ones are shorter.
        longest[rows] = np.where((step * before[rows]).sum(axis=1) < 0, longest[rows] / 2, longest[rows])
        step *= np.minimum(1, longest[rows] / np.maximum(np.abs(step).max(axis=1), 1e-30))[:, None]
        before[rows] = step
        coefficients[rows] += step
        coefficients[rows[bad]] = np.nan
        going[rows] = ~bad & (np.abs(step).max(axis=1) > 1e-7)
    coefficients[going] = np.nan
    return coefficients
