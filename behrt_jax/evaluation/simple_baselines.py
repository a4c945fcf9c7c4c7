"""Baselines that need no model: how common an outcome is, and what the history already has."""

import numpy as np

from behrt_jax.evaluation.baseline import Baseline, BaselineData
from behrt_jax.evaluation.count_models import boosting_baseline, regression_baseline
from behrt_jax.evaluation.histories import Histories
from behrt_jax.evaluation.survival import kaplan_meier

_PRIOR = 10.0
"""Examples that a rate of all codes together counts for in that of one code."""
_CELLS = 7
_PIECE = 1 << 22
"""Pairs of examples and codes looked at together."""


def run_baselines(data: BaselineData) -> list[Baseline]:
    """All baselines of the kind of task, the simplest first."""
    if data.kind == "survival":
        return [prevalence_baseline(data)]
    found = [prevalence_baseline(data)]
    if data.kind == "multilabel":
        return [*found, history_baseline(data), regression_baseline(data)]
    return [*found, regression_baseline(data), boosting_baseline(data)]


def prevalence_baseline(data: BaselineData) -> Baseline:
    """The same for everyone, as it is on average in the train split (survival: Kaplan-Meier)."""
    targets, count = data.train_targets, len(data.evaluated)
    if data.kind == "survival":
        curve = kaplan_meier(targets[:, 0], targets[:, 1] > 0, data.edges_days)
        return Baseline("Kaplan-Meier", np.tile(curve, (count, 1)), "the train split's curve for everyone")
    if data.kind == "multiclass":
        shares = np.bincount(targets, minlength=len(data.classes)) / len(targets)
        return Baseline("prevalence", np.tile(shares, (count, 1)), "shares of the classes in train")
    if data.kind == "multilabel":
        shares = targets.mean(axis=0, dtype=np.float64).astype(np.float32)
        return Baseline("prevalence", np.tile(shares, (count, 1)), "share of each code in train")
    name = "mean" if data.kind == "regression" else "prevalence"
    return Baseline(name, np.full(count, targets.mean(dtype=np.float64)), f"{name} of the train split")


def history_baseline(data: BaselineData) -> Baseline:
    """Codes come again: the rate, in train, at which a code is in the label after it was seen so often.

    A code is in one of seven cells: never seen; or seen once, two or three times, or more often, in the
    last visit or not. Each code has a rate of its own in each cell, drawn towards that of all codes.
    """
    seen, found = np.zeros((2, len(data.classes), _CELLS))
    for rows, cells in _cells(data.train, data.class_ids):
        for cell in range(_CELLS):
            inside = cells == cell
            seen[:, cell] += inside.sum(axis=0)
            found[:, cell] += (inside & data.train_targets[rows]).sum(axis=0)
    together = found.sum(axis=0) / np.maximum(seen.sum(axis=0), 1)  # [cells]
    rates = (found + _PRIOR * together) / (seen + _PRIOR)  # [K, cells]
    predictions = np.empty((len(data.evaluated), len(data.classes)), np.float32)
    for rows, cells in _cells(data.evaluated, data.class_ids):
        predictions[rows] = np.take_along_axis(rates.T, cells, axis=0)
    return Baseline("codes seen before", predictions, "rates by how often and how lately a code was seen")


def _cells(histories: Histories, class_ids: np.ndarray):
    """Piece by piece, a slice of the examples and the cell of each of their codes, int64 ``[m, K]``."""
    known = class_ids >= 0
    step = max(1, _PIECE // max(len(class_ids), 1))
    for start in range(0, len(histories), step):
        rows = slice(start, min(start + step, len(histories)))
        counts, lately = (
            np.where(known, part[rows][:, np.maximum(class_ids, 0)].toarray(), 0)
            for part in (histories.counts, histories.last_visit)
        )
        often = np.searchsorted(
            (1, 2, 4), counts, side="right"
        )  # 0: never, 1: once, 2: two or three, 3: more
        yield rows, np.where(often > 0, often + 3 * (lately > 0), 0)
