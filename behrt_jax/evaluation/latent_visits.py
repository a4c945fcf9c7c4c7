"""Messages of a :class:`LatentModel` within visits and between them, many visits at a time."""

from dataclasses import dataclass

import numpy as np

from behrt_jax.data.synthetic.histories import YEAR_DAYS
from behrt_jax.data.synthetic.latent_model import LatentModel


@dataclass(frozen=True, eq=False)
class Visits:
    """The visits of some histories, in order; each visit's tokens stand together."""

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
    firsts: np.ndarray
    """int64 ``[histories]``: first visit."""
    counts: np.ndarray
    """int64 ``[histories]``: number of visits."""


def find_visits(model: LatentModel, histories: np.ndarray, visits: np.ndarray, ages: np.ndarray) -> Visits:
    """Group tokens by visit.

    Args:
        model: knows the age bands.
        histories: int ``[tokens]``, which history a token is of; equal ones stand together.
        visits: int ``[tokens]``, ordinal of the visit within its history, ascending.
        ages: years ``[tokens]``.
    """
    new_history = np.append(True, histories[1:] != histories[:-1])
    leads = new_history | np.append(True, visits[1:] != visits[:-1])
    starts = np.flatnonzero(leads)
    firsts = np.flatnonzero(new_history[starts])
    days = np.floor(ages[starts].astype(np.float64) * YEAR_DAYS).astype(np.int64)
    return Visits(
        of_token=np.cumsum(leads) - 1,
        starts=starts,
        sizes=np.diff(np.append(starts, len(leads))),
        bands=model.band_of_day(days),
        days=days,
        firsts=firsts,
        counts=np.diff(np.append(firsts, len(starts))),
    )


def read_forward(
    model: LatentModel, visits: Visits, likelihoods: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Read the codes of each visit in order.

    Args:
        model: the probabilities, with Z joint stages and T topics.
        visits: V of them.
        likelihoods: ``[tokens, R]``, of each token given the row of emissions.

    Returns:
        ``[tokens, Z, T]``: a token's topic together with the tokens before it in the visit, given the joint
        stage; and ``[V, Z]``: all tokens of the visit given it. Each up to a factor by token and by visit.
    """
    going_on, fresh = model.continues[:, None] * model.follows, 1 - model.continues  # [T, T], [T]
    arriving = np.empty((len(likelihoods), *model.starts.shape))
    totals = np.empty((len(visits.starts), len(model.starts)))
    filtered = np.empty((0, *model.starts.shape))  # [n, Z, T], of the visits `chosen`
    chosen = np.arange(len(visits.starts))
    for place in range(int(visits.sizes.max())):
        if place:
            longer = visits.sizes[chosen] > place
            chosen, filtered = chosen[longer], filtered[longer]
        rows = visits.starts[chosen] + place
        if place:
            arriving[rows] = filtered @ going_on + (filtered @ fresh)[:, :, None] * model.starts
        else:
            arriving[rows] = model.starts
        filtered = arriving[rows] * likelihoods[rows][:, model.rows]
        total = filtered.sum(axis=2)  # [n, Z]
        # One factor for all stages of a visit keeps the numbers from vanishing and cancels later.
        factor = total.max(axis=1, keepdims=True)
        totals[chosen] = total / factor
        filtered /= factor[:, :, None]
    return arriving, totals


def read_backward(model: LatentModel, visits: Visits, likelihoods: np.ndarray) -> np.ndarray:
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


def pass_over_visits(model: LatentModel, visits: Visits, likelihoods: np.ndarray) -> np.ndarray:
    """Joint stage at each visit given all other visits of the history, ``[V, Z]``, up to a factor."""
    before = filter_visits(model, visits, likelihoods)
    after = np.ones_like(before)
    for place in range(int(visits.counts.max()) - 2, -1, -1):
        rows = visits.firsts[visits.counts > place + 1] + place
        ahead = likelihoods[rows + 1] * after[rows + 1]  # [n, Z]
        bands = visits.bands[rows + 1]
        message = np.empty_like(ahead)
        for band in np.unique(bands):
            chosen = bands == band
            message[chosen] = ahead[chosen] @ model.transitions[band].T
        after[rows] = message / message.max(axis=1, keepdims=True)
    return before * after


def filter_visits(model: LatentModel, visits: Visits, likelihoods: np.ndarray) -> np.ndarray:
    """Joint stage at each visit given the visits before it: float64 ``[V, Z]``, rows sum to 1."""
    before = np.empty_like(likelihoods)
    for place in range(int(visits.counts.max())):
        rows = visits.firsts[visits.counts > place] + place
        if place == 0:
            before[rows] = model.initial[visits.bands[rows]]
            continue
        known = before[rows - 1] * likelihoods[rows - 1]  # [n, Z]
        known /= known.sum(axis=1, keepdims=True)
        bands = visits.bands[rows]
        for band in np.unique(bands):
            chosen = bands == band
            before[rows[chosen]] = known[chosen] @ model.transitions[band]
    return before


def rows_of_targets(
    model: LatentModel,
    visits: Visits,
    outside: np.ndarray,
    messages: tuple[np.ndarray, np.ndarray],
    targets: np.ndarray,
) -> np.ndarray:
    """Row of emissions that each target is drawn from, given every token but itself.

    Args:
        model: the probabilities.
        visits: V of them.
        outside: ``[V, Z]``, of :func:`pass_over_visits`.
        messages: ``[tokens, Z, T]`` each, of :func:`read_forward` and :func:`read_backward`.
        targets: int ``[n]``, tokens.

    Returns:
        float64 ``[n, R]``, rows sum to 1.
    """
    arriving, rests = messages
    joint = arriving[targets] * rests[targets]  # [n, Z, T]
    joint *= outside[visits.of_token[targets]][:, :, None]
    to_row = np.zeros((model.rows.size, model.emissions.shape[1]))
    to_row[np.arange(model.rows.size), model.rows.reshape(-1)] = 1.0
    rows = joint.reshape(len(targets), -1) @ to_row
    return rows / rows.sum(axis=1, keepdims=True)
