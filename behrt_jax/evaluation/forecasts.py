"""The best possible forecasts from generated records: the next visit's codes, codes within a horizon, onsets.

Records are those of :mod:`behrt_jax.records.synthetic.latent`, whose probabilities are known. What a history
tells of the conditions at its last visit is all that matters for what comes after it.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from behrt_jax.config.data import DataConfig
from behrt_jax.data.sequences import Sequences
from behrt_jax.data.vocabulary import CLS, MASK, PAD, SEP
from behrt_jax.errors import InputError
from behrt_jax.evaluation.oracle import Oracle
from behrt_jax.evaluation.visit_messages import VisitRuns, filter_visits, find_visits, read_forward
from behrt_jax.records.synthetic.latent import LatentModel

_CHUNK = 4096  # tokens worked on at once


@dataclass(frozen=True, eq=False)
class StagePosteriors:
    """What the codes of whole histories tell of the conditions at each visit."""

    visits: VisitRuns
    """All visits, subject by subject; ``firsts`` says where each subject's begin."""
    stages: np.ndarray
    """float64 ``[visits, Z]``: joint stage given the codes up to and with that visit."""


def stage_posteriors(oracle: Oracle, sequences: Sequences) -> StagePosteriors:
    """Filter the histories of all subjects, each of which has an event at least; nothing is masked."""
    seen = ~np.isin(sequences.codes, (PAD, CLS, SEP))
    subjects = np.repeat(np.arange(len(sequences)), sequences.lengths)[seen]
    codes = sequences.codes[seen]
    if oracle.model.covariates is not None:
        raise InputError("Forecasts are known of records without covariates: leave out data.covariates.")
    visits = find_visits(oracle.model, subjects, sequences.visits[seen], sequences.ages[seen])
    bands = visits.bands[visits.of_token]
    likelihoods = np.empty((len(visits.starts), len(oracle.model.states)))
    for start in range(0, len(visits.starts), _CHUNK // 4):
        chunk = slice(start, start + _CHUNK // 4)
        starts, sizes = visits.starts[chunk], visits.sizes[chunk]
        tokens = slice(starts[0], starts[-1] + sizes[-1])
        part = replace(
            visits, of_token=visits.of_token[tokens] - start, starts=starts - starts[0], sizes=sizes
        )
        given = oracle.emissions[bands[tokens], :, codes[tokens]]  # [tokens, R]
        likelihoods[chunk] = read_forward(oracle.model, part, given)[1]
    stages = filter_visits(oracle.model, visits, likelihoods)[0] * likelihoods
    return StagePosteriors(visits, stages / stages.sum(axis=1, keepdims=True))


def next_visit_codes(oracle: Oracle, posteriors: StagePosteriors, chosen: np.ndarray) -> np.ndarray:
    """Probability of each code to occur in the next visit, if there is one: float64 ``[n, vocabulary]``.

    When that visit is and how many codes it has is not known beforehand, and so averaged over.

    Args:
        oracle: of the records.
        posteriors: of :func:`stage_posteriors`.
        chosen: int ``[n]``, visits of ``posteriors``; the codes up to and with each are known.
    """
    model = oracle.model
    by_band = _next_bands(oracle, posteriors.visits.days[chosen])  # [n, B]
    absent = np.zeros((len(chosen), oracle.emissions.shape[2]))
    for band in np.flatnonzero(by_band.any(axis=0)):
        rows = np.flatnonzero(by_band[:, band])
        stages = posteriors.stages[chosen[rows]] @ model.transitions[band]  # [n, Z]
        of_codes = _absent_from_visit(model, oracle.emissions[band])  # [Z, V]
        absent[rows] += by_band[rows, band, None] * (stages @ of_codes)
    occurs = np.clip(1 - absent, 0.0, 1.0)  # sums of probabilities may be off by rounding
    occurs[:, [PAD, MASK, CLS, SEP]] = 0.0
    return occurs


def _next_bands(oracle: Oracle, days: np.ndarray) -> np.ndarray:
    """Age band of the next visit after some days since birth: ``[n, B]``, rows sum to 1."""
    model = oracle.model
    begins = np.maximum(model.first_days(np.arange(model.bands)) - days[:, None] - 1, 0)  # [n, B]
    begins[:, 0] = 0  # days between without a visit
    reached = (1 - model.daily_visit) ** begins
    return reached - np.append(reached[:, 1:], np.zeros((len(days), 1)), axis=1)


def _absent_from_visit(model: LatentModel, emissions: np.ndarray) -> np.ndarray:
    """Probability that none of some codes occurs in a visit, given the joint stage: ``[Z, Q]``.

    Args:
        model: the probabilities.
        emissions: ``[R, Q]``, chance of one of the codes in each row, for Q sets of codes.
    """
    going_on, fresh = model.continues[:, None] * model.follows, 1 - model.continues
    others = 1 - emissions[model.rows]  # [Z, T, Q]
    absent = np.zeros((len(model.starts), others.shape[2]))
    topics = np.broadcast_to(model.starts[:, :, None], others.shape)
    for share in model.sizes:
        avoided = topics * others
        absent += share * avoided.sum(axis=1)
        topics = going_on.T @ avoided + model.starts[:, :, None] * (fresh @ avoided)[:, None, :]
    return absent


def onset_probabilities(
    oracle: Oracle, posteriors: StagePosteriors, chosen: np.ndarray, condition: int, horizon_days: int
) -> np.ndarray:
    """Probability that a condition, now absent, is present at a visit within the horizon: ``[n]``.

    Args:
        oracle: of the records.
        posteriors: of :func:`stage_posteriors`.
        chosen: int ``[n]``, visits of ``posteriors``: the prediction times.
        condition: from 0.
        horizon_days: the last day that counts, from the visit; visits come at their daily chance.
    """
    model = oracle.model
    present = model.states[:, condition] > 0  # [Z]
    stages = np.where(present, 0.0, posteriors.stages[chosen])  # [n, Z]
    for band, days in _days_by_band(model, posteriors.visits.days[chosen], horizon_days):
        _advance(stages, days, model.transitions[band], model.daily_visit)
    return np.clip(stages[:, present].sum(axis=1), 0.0, 1.0)


def _days_by_band(
    model: LatentModel, days: np.ndarray, horizon_days: int
) -> Iterator[tuple[int, np.ndarray]]:
    """Yield each age band, and how many of the days after some day since birth ``[n]`` up to the horizon lie
    in it, int64 ``[n]``; bands without any are left out.
    """
    first_days = model.first_days(np.arange(model.bands))
    last_days = np.append(first_days[1:] - 1, np.iinfo(np.int64).max)
    first_days[0] = np.iinfo(np.int64).min
    for band in range(model.bands):
        begin = np.maximum(days + 1, first_days[band])
        end = np.minimum(days + horizon_days, last_days[band])
        of_band = np.maximum(end - begin + 1, 0)
        if of_band.any():
            yield band, of_band


def _advance(stages: np.ndarray, days: np.ndarray, transitions: np.ndarray, daily_visit: float) -> None:
    """Move each row of stages ``[n, Z]`` on by its number of days ``[n]``, in place, in one age band."""
    power = (1 - daily_visit) * np.eye(len(transitions)) + daily_visit * transitions
    while days.any():
        odd = days % 2 == 1
        stages[odd] = stages[odd] @ power
        days = days // 2
        power = power @ power


# Whether codes come within a horizon: what a question about a history is answered by.


def occurrence_probability(
    oracle: Oracle,
    posteriors: StagePosteriors,
    chosen: np.ndarray,
    questions: Sequence[Sequence[int]],
    horizon_days: int,
    visits_left: np.ndarray | None = None,
    followed: bool = False,
) -> np.ndarray:
    """Probability that a code of a set occurs after a visit and within the horizon: float64 ``[n, Q]``.

    Exact. Visits count from the day after the chosen one up to ``horizon_days`` after it, that day
    included. Of the chosen visit all codes are known; a prediction time within some days after it, before
    the next visit, has the same probability in the days that follow, since visits come at a daily chance.

    The number of visits of a record is drawn independently of all else, but its follow-up ends with a
    visit, so how long it lasts is not independent of how many visits there were. Two probabilities can
    therefore be asked for. Without ``visits_left`` records go on for as long as the horizon: what a
    predictor should say that knows nothing of how records end. With it, the probability among questions
    that a record answers, for one who does not know how many visits are left: yes where a code comes within
    the horizon and the record, no where none does and the record has a visit after the horizon; a question
    with neither is unknown and left out. A code that comes early is answered with a short record too, so this
    one is higher, the more so the longer the horizon.

    Args:
        oracle: of the records.
        posteriors: of :func:`stage_posteriors`.
        chosen: int ``[n]``, visits of ``posteriors``.
        questions: Q sets of vocabulary ids; any one of a set answers yes.
        horizon_days: from 1.
        visits_left: float64 ``[n, K]``: chances of 0, 1, ... visits after the chosen one, as of
            :func:`chances_of_visits_left`.
        followed: with ``visits_left``, among records that go on beyond the horizon alone, whatever the
            answer: those of which `data.questions` asks.

    Raises:
        InputError: a horizon below 1, or an empty set of codes.
    """
    if horizon_days < 1:
        raise InputError(f"The horizon is {horizon_days} days: give at least 1.")
    if not all(len(codes) for codes in questions):
        raise InputError("A question names no code: give each at least one.")
    model = oracle.model
    emissions = np.stack([oracle.emissions[:, :, list(set(q))].sum(axis=2) for q in questions], axis=2)
    begin = posteriors.stages[chosen]  # [n, Z]
    segments = list(_days_by_band(model, posteriors.visits.days[chosen], horizon_days))
    absent = {band: _absent_from_visit(model, emissions[band]) for band, _ in segments}  # [Z, Q] each
    found = np.empty((len(chosen), len(questions)))
    for question in range(len(questions)):
        # A visit without the codes takes a stage to the next one; what is lost is what occurred.
        passing = [(model.transitions[band] * absent[band][:, question], days) for band, days in segments]
        if visits_left is None:
            stages = begin.copy()
            for step, days in passing:
                _advance(stages, days, step, model.daily_visit)
            found[:, question] = 1 - stages.sum(axis=1)
        else:
            none, ended = _absent_by_visits(begin, passing, model.daily_visit, visits_left.shape[1])
            no = np.cumsum(none, axis=1) - none  # [n, K]: fewer visits within the horizon than are left
            yes = 1 - no - ended
            if followed:
                from scipy.stats import binom  # slow to import, and few need it

                fewer = binom.cdf(np.arange(no.shape[1]) - 1, horizon_days, model.daily_visit)  # [K]
                yes = fewer[None] - no
            answered = (visits_left * np.stack([no, yes])).sum(axis=2)  # [2, n]
            found[:, question] = answered[1] / answered.sum(axis=0)
    return np.clip(found, 0.0, 1.0)  # sums of probabilities may be off by rounding


def chances_of_visits_left(model: LatentModel, data: DataConfig, visits: np.ndarray) -> np.ndarray:
    """Chance that 0, 1, ... visits follow in a record after its first ``visits``: float64 ``[n, K]``.

    Args:
        model: of the records.
        data: options that the records were generated with.
        visits: int ``[n]``, visits so far, from 1.
    """
    from scipy.special import ndtr

    size = float(model.sizes @ np.arange(1, len(model.sizes) + 1))
    mean = np.log(data.events_mean) - data.events_spread**2 / 2  # as in histories.history_lengths
    longest = int(np.exp(mean + 6 * data.events_spread)) + 2  # more events have a chance of 1e-9
    ends = np.log(np.arange(1, longest + 1) + 0.5)
    below = ndtr((ends - mean) / data.events_spread) if data.events_spread else (ends >= mean).astype(float)
    of_lengths = np.diff(below, prepend=0.0)
    counts = np.maximum(np.rint(np.arange(1, longest + 1) / size), 1).astype(np.int64)
    of_counts = np.bincount(counts, of_lengths)
    of_counts = np.append(of_counts, np.zeros(int(np.max(visits)) + 1))
    left = of_counts[np.minimum(visits[:, None] + np.arange(len(of_counts)), len(of_counts) - 1)]
    left = left[:, : max(int(left.any(axis=0).sum()), 1)]
    return left / left.sum(axis=1, keepdims=True)


def _absent_by_visits(
    begin: np.ndarray, passing: list[tuple[np.ndarray, np.ndarray]], daily_visit: float, size: int
) -> tuple[np.ndarray, np.ndarray]:
    """Chance of no occurrence in the horizon's days, by the number of visits in them.

    Args:
        begin: stages before, ``[n, Z]``.
        passing: what a visit without occurrence makes of a stage, ``[Z, Z]``, and the days in which it does,
            int ``[n]``; one after the other.
        daily_visit: chance of a visit on each day.
        size: K; more visits than that are not told apart.

    Returns:
        float64 ``[n, K]`` each: exactly 0, 1, ... visits come and none has an occurrence; at least 0, 1, ...
        come and those first ones have none.
    """
    from scipy.stats import binom  # slow to import, and few need it

    total = sum(days for _, days in passing)
    # Numbers of visits that have a chance of 1e-15 and more.
    kept = min(size, int(binom.isf(1e-15, np.max(total), daily_visit)) + 2)
    none, reached = np.zeros((2, len(begin), size))
    reached[:, 0] = 1.0
    for start in range(0, len(begin), _CHUNK // 8):
        chunk = slice(start, start + _CHUNK // 8)
        by_visits = np.zeros((len(begin[chunk]), kept, begin.shape[1]))  # [c, K, Z]
        by_visits[:, 0] = begin[chunk]
        passed = np.zeros(len(by_visits), bool)
        for step, days in passing:
            days = days[chunk]
            for rows, most in ((~passed & (days > 0), 1), (passed & (days > 0), kept)):
                if not rows.any():
                    continue
                moved, found = by_visits[rows, :most], np.zeros((rows.sum(), *by_visits.shape[1:]))
                for count in range(kept):
                    if count:  # visits further on, from each number of them before
                        moved = moved[:, : kept - count] @ step
                        more = binom.sf(count - 1, days[rows], daily_visit)[:, None]
                        reached[start + np.flatnonzero(rows), count : count + moved.shape[1]] += (
                            more * moved.sum(axis=2)
                        )
                    chance = binom.pmf(count, days[rows], daily_visit)[:, None, None]
                    found[:, count : count + moved.shape[1]] += chance * moved
                by_visits[rows] = found
            passed |= days > 0
        none[chunk, :kept] = by_visits.sum(axis=2)
    return none, reached
