"""Messages of a latent model within visits and between them, many visits at a time.

Forward and backward (Rabiner 1989, Proceedings of the IEEE 77(2), section III) over the codes of each visit,
and over the visits of each history.
"""

from dataclasses import dataclass

import numpy as np

from behrt_jax.data.events import DAY
from behrt_jax.records.synthetic.histories import YEAR_DAYS
from behrt_jax.records.synthetic.latent import LatentModel, VisitIndex


@dataclass(frozen=True, eq=False)
class VisitRuns:
    """The visits of some histories, in order; the tokens of each are a run."""

    of_token: np.ndarray
    """int64 ``[tokens]``: the visit of each token."""
    starts: np.ndarray
    """int64 ``[visits]``: first token."""
    sizes: np.ndarray
    """int64 ``[visits]``: number of tokens."""
    bands: np.ndarray
    """int64 ``[visits]``: age band."""
    days: np.ndarray
    """int64 ``[visits]``: whole days since birth."""
    index: VisitIndex
    """Rows of the model that hold for each visit."""
    gap_days: np.ndarray
    """int64 ``[visits]``: days since the visit before, 0 of a history's first one."""
    firsts: np.ndarray
    """int64 ``[histories]``: first visit."""
    counts: np.ndarray
    """int64 ``[histories]``: number of visits."""


def find_visits(
    model: LatentModel,
    histories: np.ndarray,
    visits: np.ndarray,
    ages: np.ndarray,
    times: np.ndarray | None = None,
    subject_ids: np.ndarray | None = None,
) -> VisitRuns:
    """Group tokens by visit.

    Args:
        model: knows the age bands, and the sex of a subject where it matters.
        histories: int ``[tokens]``, which history a token is of; equal ones stand together.
        visits: int ``[tokens]``, ordinal of the visit within its history, ascending.
        ages: years ``[tokens]``.
        times: int64 ``[tokens]``, microseconds since 1970; needed where there are covariates.
        subject_ids: int64 ``[tokens]``, likewise.
    """
    new_history = np.append(True, histories[1:] != histories[:-1])
    leads = new_history | np.append(True, visits[1:] != visits[:-1])
    starts = np.flatnonzero(leads)
    firsts = np.flatnonzero(new_history[starts])
    days = np.floor(ages[starts].astype(np.float64) * YEAR_DAYS).astype(np.int64)
    gap_days = np.diff(days, prepend=0)
    gap_days[firsts] = 0
    bands = model.band_of_day(days)
    index = model.index(bands)
    if model.covariates is not None:
        assert times is not None
        assert subject_ids is not None
        sexes = model.covariates.sex_of(subject_ids[starts])
        index = model.index(bands, sexes, times[starts] // DAY, gap_days)
    return VisitRuns(
        of_token=np.cumsum(leads) - 1,
        starts=starts,
        sizes=np.diff(np.append(starts, len(leads))),
        bands=bands,
        days=days,
        index=index,
        gap_days=gap_days,
        firsts=firsts,
        counts=np.diff(np.append(firsts, len(starts))),
    )


def read_forward(
    model: LatentModel, visits: VisitRuns, likelihoods: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Read the codes of each visit in order.

    Args:
        model: the probabilities, with Z joint stages and T topics.
        visits: V of them.
        likelihoods: ``[tokens, R]``, of each token given the row of emissions.

    Returns:
        ``[tokens, Z, T]``: a token's topic together with the tokens before it in the visit, given the joint
        stage, up to a factor by token; ``[V, Z]``: all tokens of the visit given it, up to a factor by visit;
        and ``[V]``, the logarithm of that factor.
    """
    going_on, fresh = model.continues[:, None] * model.follows, 1 - model.continues  # [T, T], [T]
    arriving = np.empty((len(likelihoods), *model.starts.shape))
    totals = np.empty((len(visits.starts), len(model.starts)))
    logarithms = np.zeros(len(visits.starts))
    filtered = np.empty((0, *model.starts.shape))  # [n, Z, T], of the visits `chosen`
    chosen = np.arange(len(visits.starts))
    arriving[visits.starts] = model.starts
    for place in range(int(visits.sizes.max())):
        rows = visits.starts[chosen] + place
        if place:
            longer = visits.sizes[chosen] > place
            chosen, filtered, rows = chosen[longer], filtered[longer], rows[longer]
            arriving[rows] = filtered @ going_on + (filtered @ fresh)[:, :, None] * model.starts
        filtered = arriving[rows] * likelihoods[rows][:, model.rows]
        total = filtered.sum(axis=2)  # [n, Z]
        # One factor for all stages of a visit keeps the numbers from vanishing and cancels later.
        factor = total.max(axis=1, keepdims=True)
        totals[chosen] = total / factor
        logarithms[chosen] += np.log(factor[:, 0])
        filtered /= factor[:, :, None]
    return arriving, totals, logarithms


def read_backward(model: LatentModel, visits: VisitRuns, likelihoods: np.ndarray) -> np.ndarray:
    """Read the codes of each visit from its end; arguments as of :func:`read_forward`.

    Returns:
        ``[tokens, Z, T]``: the tokens after a token in the visit, given its topic and the joint stage, up
        to a factor by token.
    """
    going_on, fresh = model.continues[:, None] * model.follows, 1 - model.continues  # [T, T], [T]
    rests = np.ones((len(likelihoods), *model.starts.shape))
    for place in range(int(visits.sizes.max()) - 2, -1, -1):
        rows = visits.starts[visits.sizes > place + 1] + place
        ahead = likelihoods[rows + 1][:, model.rows] * rests[rows + 1]  # [n, Z, T]
        anew = (ahead * model.starts).sum(axis=2)  # [n, Z]
        rest = ahead @ going_on.T + anew[:, :, None] * fresh
        rests[rows] = rest / rest.max(axis=(1, 2), keepdims=True)
    return rests


def pass_over_visits(
    model: LatentModel, visits: VisitRuns, likelihoods: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Joint stage at each visit given all other visits of the history.

    Returns:
        ``[V, Z]``, up to a factor by visit; and the logarithms of the probabilities of the visits given those
        before them, ``[V]``, up to a factor that is the same for all stages, eras and sexes.
    """
    before, evidence = filter_visits(model, visits, likelihoods)
    chances = _gap_chances(model, visits)
    after = np.ones_like(before)
    for place in range(int(visits.counts.max()) - 2, -1, -1):
        rows = visits.firsts[visits.counts > place + 1] + place
        ahead = likelihoods[rows + 1] * after[rows + 1]  # [n, Z]
        message = by_row(ahead, visits.index.steps[rows + 1], model.transitions.swapaxes(1, 2))
        message *= chances[rows + 1]
        after[rows] = message / message.max(axis=1, keepdims=True)
    return before * after, evidence


def filter_visits(
    model: LatentModel, visits: VisitRuns, likelihoods: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Joint stage at each visit given the visits before it: float64 ``[V, Z]``, rows sum to 1.

    Beside it, ``[V]``, as the second of :func:`pass_over_visits`.
    """
    before = np.empty_like(likelihoods)
    evidence = np.zeros(len(likelihoods))
    chances = _gap_chances(model, visits)
    for place in range(int(visits.counts.max())):
        rows = visits.firsts[visits.counts > place] + place
        if place == 0:
            before[rows] = model.initial[visits.index.begins[rows]]
        else:
            known = before[rows - 1] * likelihoods[rows - 1]  # [n, Z]
            known *= chances[rows] / known.sum(axis=1, keepdims=True)
            arriving = by_row(known, visits.index.steps[rows], model.transitions)
            total = arriving.sum(axis=1)
            before[rows] = arriving / total[:, None]
            evidence[rows] = np.log(total)
    return before, evidence + np.log((before * likelihoods).sum(axis=1))


def _gap_chances(model: LatentModel, visits: VisitRuns) -> np.ndarray:
    """Chance of the days since the visit before given the stage then, ``[V, Z]``, up to a factor by visit."""
    if model.covariates is None or model.covariates.daily_visits is None:
        return np.ones((len(visits.gap_days), 1))
    rates = model.covariates.daily_visits
    logarithms = np.log(rates) + np.log1p(-rates) * (visits.gap_days[:, None] - 1)
    logarithms[visits.gap_days == 0] = 0.0
    return np.exp(logarithms - logarithms.max(axis=1, keepdims=True))


def by_row(values: np.ndarray, which: np.ndarray, matrices: np.ndarray) -> np.ndarray:
    """Each row of values ``[n, K]`` times one of the matrices ``[M, K, L]``: ``[n, L]``."""
    found = np.empty((len(values), matrices.shape[2]))
    for number in np.unique(which):
        found[which == number] = values[which == number] @ matrices[number]
    return found
