"""Figures of predicted survival curves, with follow-up that may end before the event."""

from typing import Any

import numpy as np

from behrt_jax.evaluation.bootstrap import Scorer

_PIECE = 1 << 22
"""Pairs of examples compared at once."""


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

    def score(weights: np.ndarray) -> dict[str, np.ndarray]:
        return {
            "c_index": _c_index(labels, survival, edges, weights),
            "integrated_brier": weights @ integrated / weights.sum(axis=1),
        }

    return score


def _c_index(labels: np.ndarray, survival: np.ndarray, edges: np.ndarray, weights: np.ndarray) -> np.ndarray:
    days, events = cut_follow_up(labels, edges[-1])
    cases = np.flatnonzero(events)
    step = max(1, _PIECE // len(days))
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


def survival_by_edge(labels: np.ndarray, survival: np.ndarray, edges: np.ndarray) -> list[dict[str, Any]]:
    """Mean ``predicted`` and ``observed`` (Kaplan-Meier) survival at each edge (``days``); for JSON."""
    observed = kaplan_meier(labels[:, 0], labels[:, 1] > 0, edges)
    observed = np.where(edges <= labels[:, 0].max(), observed, np.nan)
    return [
        {"days": float(day), "predicted": float(mean), "observed": float(share) if share == share else None}
        for day, mean, share in zip(edges, survival.mean(axis=0), observed, strict=True)
    ]
