"""Figures of predictions: what they are called, and how they are computed under many sets of weights."""

from collections.abc import Callable, Mapping

import numpy as np

from behrt_jax.data.tasks import Predicts
from behrt_jax.evaluation.calibration import calibration_line, quantile_bins

Scorer = Callable[[np.ndarray], dict[str, np.ndarray]]
"""Figures under each set of weights: float64 ``[sets, examples]`` to name -> float64 ``[sets]``, NaN where
a figure is not defined."""
TITLES = {
    "auroc": "AUROC",
    "average_precision": "average precision",
    "brier": "Brier score",
    "log_loss": "log loss",
    "ece": "calibration error",
    "calibration_slope": "calibration slope",
    "calibration_intercept": "calibration intercept",
    "prevalence": "share of positives",
    "mean_prediction": "mean prediction",
    "f1": "F1",
    "precision": "precision",
    "recall": "recall",
    "specificity": "specificity",
    "accuracy": "accuracy",
    "macro_auroc": "AUROC, mean over classes",
    "weighted_auroc": "AUROC, mean by class size",
    "incident_average_precision": "average precision, new codes",
    "incident_auroc": "AUROC, new codes",
    "repeat_average_precision": "average precision, repeats",
    "repeat_auroc": "AUROC, repeats",
    "mae": "mean absolute error",
    "rmse": "root mean square error",
    "r2": "R2",
    "spearman": "Spearman correlation",
    "c_index": "time-dependent C-index",
    "integrated_brier": "integrated Brier score",
}
LESS_IS_BETTER = frozenset({"brier", "log_loss", "mae", "rmse", "integrated_brier", "ece"})
LEAKAGE_AUROC = 0.99
"""An AUROC from which on leakage is more likely than a good model."""
LEAKAGE_WORDS = (
    "So good a prediction of what is to come is hardly ever real: suspect that the outcome, or something "
    "written after it, is in the input.",
    "Audit the labels: behrt-jax doctor --data DATA --labels LABELS, with --horizon_days and "
    "--outcome_codes. "
    "Predict earlier, give delays, or leave out codes that tell the outcome.",
)
"""Why that matters, and what to do."""
THRESHOLDS = np.arange(1, 100) / 100
"""Threshold probabilities of the decision curve."""
_RANKED = 1 << 20
"""Scores ranked together."""
_COMPARED = 1 << 22
"""Pairs of examples compared at once."""


def weighted_means(weights: np.ndarray, columns: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Weighted mean of each column, float ``[n]``, over its entries that are not NaN: ``[sets]`` each."""
    values = np.stack(list(columns.values()), axis=1).astype(np.float64)  # [n, C]
    defined = ~np.isnan(values)
    with np.errstate(invalid="ignore"):
        means = (weights @ np.where(defined, values, 0.0)) / (weights @ defined)  # [sets, C]
    return dict(zip(columns, means.T, strict=True))


# AUROC and average precision of weighted and ranked examples, many rankings or sets of weights at once.


def ranked(scores: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Sort scores ``[..., n]`` in descending order and find the runs of equal ones.

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
    step = max(1, _RANKED // labels.shape[1])
    counted = np.ones_like(labels) if counted is None else counted
    for start in range(0, len(labels), step):
        piece = slice(start, start + step)
        order, first, last = ranked(scores[piece])
        positive, negative = (
            np.take_along_axis(cells & counted[piece], order, axis=1).astype(np.float64)
            for cells in (labels[piece], ~labels[piece])
        )
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
    """AUROC of scores, float ``[n]``, and labels, bool ``[n]``; None with one class alone, or a NaN."""
    found, _ = pooled_figures(scores[labels], scores[~labels])
    return None if np.isnan(found) else found


def _at(values: np.ndarray, ranks: np.ndarray) -> np.ndarray:
    return values[:, ranks] if ranks.ndim == 1 else np.take_along_axis(values, ranks, axis=1)


# Figures of predicted probabilities of yes or no.


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


def curves(labels: np.ndarray, probabilities: np.ndarray, points: int = 200) -> dict[str, list[float]] | None:
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


def over_codes(
    labels: np.ndarray, probabilities: np.ndarray, seen_before: np.ndarray
) -> dict[str, dict[str, float | None]]:
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
        macro = [figures[defined].mean() if defined.any() else np.nan for figures in of_code]
        names = ("micro_auroc", "micro_average_precision", "macro_auroc", "macro_average_precision")
        figures = {
            key: float(value) if np.isfinite(value) else None
            for key, value in zip(names, (*micro, *macro), strict=True)
        }
        found[name] = {**figures, "codes": int(defined.sum()), "examples": int(has_both.sum())}
    return found


def _counted(seen_before: np.ndarray) -> tuple[np.ndarray | None, np.ndarray, np.ndarray]:
    return None, ~seen_before, seen_before


# Figures of predicted numbers.


def regression_scorer(labels: np.ndarray, predictions: np.ndarray) -> Scorer:
    """Scorer of ``mae`` and ``rmse`` (in the unit of the labels), ``r2`` and ``spearman``; both ``[n]``."""
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


# Figures of predicted survival curves, with follow-up that may end before the event.


def survival_scorer(labels: np.ndarray, survival: np.ndarray, edges: np.ndarray) -> Scorer:
    """Scorer of ``c_index`` and ``integrated_brier``.

    ``c_index`` is time-dependent (Antolini et al. 2005, doi 10.1002/sim.2427): of two examples, the one
    that has the event first should, at that time, have the lower predicted survival; equal predictions
    count as half. Survival at a time is that at the end of its interval. Follow-up is cut at the last edge.

    ``integrated_brier`` is the Brier score weighted by the inverse probability of still being followed
    (Graf et al. 1999, doi 10.1002/(SICI)1097-0258(19990915/30)18:17/18<2529::AID-SIM274>3.0.CO;2-5),
    integrated over time by trapezoids from 0 up to the last edge at which somebody could still be followed,
    and divided by that time. The weights are estimated once, from all examples.

    Args:
        labels: float64 ``[n, 2]``: days to the event or to the end of follow-up, and 1 or 0 for the event.
        survival: float64 ``[n, T]``, probability of no event up to each edge.
        edges: float64 ``[T]``, days, ascending.
    """
    scores = brier_over_time(labels, survival, edges)
    usable = np.flatnonzero(~np.isnan(scores).any(axis=0))
    if len(usable):
        span = np.append(0.0, edges[usable])
        integrated = np.trapezoid(np.pad(scores[:, usable], ((0, 0), (1, 0))), span, axis=1) / span[-1]
    else:
        integrated = np.full(len(labels), np.nan)
    return lambda weights: {
        "c_index": _c_index(labels, survival, edges, weights),
        "integrated_brier": weights @ integrated / weights.sum(axis=1),
    }


def _c_index(labels: np.ndarray, survival: np.ndarray, edges: np.ndarray, weights: np.ndarray) -> np.ndarray:
    days, events = cut_follow_up(labels, edges[-1])
    cases = np.flatnonzero(events)
    step = max(1, _COMPARED // len(days))
    concordant, comparable = np.zeros(len(weights)), np.zeros(len(weights))
    columns = weights.T.astype(np.float32)  # [n, sets]; counts, exact
    for start in range(0, len(cases), step):
        case = cases[start : start + step]
        interval = np.searchsorted(edges, days[case], side="left")
        own, others = survival[case, interval][:, None], survival[:, interval].T  # [c, 1], [c, n]
        later = (days > days[case, None]) | ((days == days[case, None]) & ~events)  # [c, n]
        right = (later & (others > own)) + 0.5 * (later & (others == own))
        of_case = weights[:, case]  # [sets, c]
        concordant += np.einsum("sc,cs->s", of_case, right.astype(np.float32) @ columns)
        comparable += np.einsum("sc,cs->s", of_case, later.astype(np.float32) @ columns)
    with np.errstate(invalid="ignore"):
        return concordant / comparable


def brier_over_time(labels: np.ndarray, survival: np.ndarray, edges: np.ndarray) -> np.ndarray:
    """Each example's weighted square error at each edge, ``[n, T]``; their mean is the Brier score.

    NaN at edges past the end of all follow-up, where nothing can be said.
    """
    days, events = labels[:, 0], labels[:, 1] > 0
    censoring = kaplan_meier(days, ~events, edges, last=True)  # [T]
    before = kaplan_meier(days, ~events, days, last=True, left=True)  # [n]
    with np.errstate(divide="ignore"):
        dead = np.where(events, 1 / before, 0.0)[:, None] * (days[:, None] <= edges)  # [n, T]
        alive = (days[:, None] > edges) / np.where(censoring > 0, censoring, np.nan)
    return survival**2 * dead + (1 - survival) ** 2 * alive


def kaplan_meier(
    days: np.ndarray, events: np.ndarray, at: np.ndarray, *, last: bool = False, left: bool = False
) -> np.ndarray:
    """Share without an event after some days (Kaplan and Meier 1958), float64 in the shape of ``at``.

    Args:
        days: float64 ``[n]``, to the event or the end of follow-up.
        events: bool ``[n]``.
        at: days, any shape.
        last: the others of the same day come first, so that they are not at risk any more: for censoring.
        left: just before ``at``, not with it.
    """
    times, place = np.unique(days, return_inverse=True)
    counts, found = np.bincount(place), np.bincount(place, events)
    risk = len(days) - np.cumsum(counts) + counts
    risk = risk - (counts - found) if last else risk
    shares = np.cumprod(1 - np.divide(found, risk, out=np.zeros(len(times)), where=risk > 0))
    return np.append(1.0, shares)[np.searchsorted(times, at, side="left" if left else "right")]


def cut_follow_up(labels: np.ndarray, horizon: float) -> tuple[np.ndarray, np.ndarray]:
    """Days and events (bool), each ``[n]``, as if follow-up had ended at the horizon."""
    days, events = labels[:, 0], labels[:, 1] > 0
    return np.minimum(days, horizon), events & (days <= horizon)


def survival_by_edge(
    labels: np.ndarray, survival: np.ndarray, edges: np.ndarray
) -> list[dict[str, float | None]]:
    """Mean ``predicted`` and ``observed`` (Kaplan-Meier) survival at each edge (``days``); for JSON."""
    observed = kaplan_meier(labels[:, 0], labels[:, 1] > 0, edges)
    observed = np.where(edges <= labels[:, 0].max(), observed, np.nan)
    return [
        {"days": float(day), "predicted": float(mean), "observed": float(share) if share == share else None}
        for day, mean, share in zip(edges, survival.mean(axis=0), observed, strict=True)
    ]


# Figures of the tuning split while a model is trained.

ON_TUNING: dict[Predicts, dict[str, Callable[[np.ndarray, np.ndarray], float | None]]] = {
    "probability": {"auroc": lambda outputs, targets: auroc(outputs[:, 0], targets[:, 0] > 0.5)},
    "class": {"accuracy": lambda outputs, targets: float((outputs.argmax(axis=1) == targets[:, 0]).mean())},
}
"""By what a kind of task predicts: figures beside the loss, from outputs ``[examples, outputs]`` and targets
``[examples, targets]``; None where not defined."""
