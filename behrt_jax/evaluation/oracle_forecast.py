"""The best possible forecasts from generated records: the next visit's codes, the onset of a condition."""

from dataclasses import dataclass
from typing import Any

import numpy as np

from behrt_jax.data.sequences import Sequences
from behrt_jax.data.vocabulary import CLS, MASK, PAD, SEP
from behrt_jax.evaluation.latent_visits import Visits, filter_visits, find_visits, read_forward
from behrt_jax.evaluation.oracle import Oracle

_CHUNK = 4096  # tokens worked on at once


@dataclass(frozen=True, eq=False)
class StagePosteriors:
    """What the codes of whole histories tell of the conditions at each visit."""

    visits: Visits
    """All visits, subject by subject; ``firsts`` says where each subject's begin."""
    stages: np.ndarray
    """float64 ``[visits, Z]``: joint stage given the codes up to and with that visit."""


def stage_posteriors(oracle: Oracle, sequences: Sequences) -> StagePosteriors:
    """Filter the histories of all subjects, each of which has an event at least; nothing is masked."""
    seen = ~np.isin(sequences.codes, (PAD, CLS, SEP))
    subjects = np.repeat(np.arange(len(sequences)), sequences.lengths)[seen]
    codes = sequences.codes[seen]
    visits = find_visits(oracle.model, subjects, sequences.visits[seen], sequences.ages[seen])
    bands = visits.bands[visits.of_token]
    likelihoods = np.empty((len(visits.starts), len(oracle.model.states)))
    for start in range(0, len(visits.starts), _CHUNK // 4):
        chunk = slice(start, start + _CHUNK // 4)
        starts, sizes = visits.starts[chunk], visits.sizes[chunk]
        tokens = slice(starts[0], starts[-1] + sizes[-1])
        part = Visits(
            visits.of_token[tokens] - start,
            starts - starts[0],
            sizes,
            visits.bands[chunk],
            visits.days[chunk],
            np.array([0]),
            np.array([len(starts)]),
        )
        given = oracle.emissions[bands[tokens], :, codes[tokens]]  # [tokens, R]
        likelihoods[chunk] = read_forward(oracle.model, part, given)[1]
    stages = filter_visits(oracle.model, visits, likelihoods) * likelihoods
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
        absent[rows] += by_band[rows, band, None] * (stages @ _absent_from_visit(oracle, int(band)))
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


def _absent_from_visit(oracle: Oracle, band: int) -> np.ndarray:
    """Probability that a code does not occur in a visit, given the joint stage: ``[Z, vocabulary]``."""
    model = oracle.model
    going_on, fresh = model.continues[:, None] * model.follows, 1 - model.continues
    others = 1 - oracle.emissions[band][model.rows]  # [Z, T, V]
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
    days = posteriors.visits.days[chosen]
    present = model.states[:, condition] > 0  # [Z]
    stages = np.where(present, 0.0, posteriors.stages[chosen])  # [n, Z]
    first_days = model.first_days(np.arange(model.bands))
    last_days = np.append(first_days[1:] - 1, np.iinfo(np.int64).max)
    first_days[0] = np.iinfo(np.int64).min
    for band in range(model.bands):
        begin = np.maximum(days + 1, first_days[band])
        end = np.minimum(days + horizon_days, last_days[band])
        _advance(stages, np.maximum(end - begin + 1, 0), model.transitions[band], model.daily_visit)
    return np.clip(stages[:, present].sum(axis=1), 0.0, 1.0)


def _advance(stages: np.ndarray, days: np.ndarray, transitions: np.ndarray, daily_visit: float) -> None:
    """Move each row of stages ``[n, Z]`` on by its number of days ``[n]``, in place, in one age band."""
    power = (1 - daily_visit) * np.eye(len(transitions)) + daily_visit * transitions
    while days.any():
        odd = days % 2 == 1
        stages[odd] = stages[odd] @ power
        days = days // 2
        power = power @ power


def forecast_metrics(probabilities: np.ndarray, labels: np.ndarray) -> dict[str, Any]:
    """Loss (nats, mean over all), AUROC and average precision of forecasts of yes or no.

    Needs scikit-learn. AUROC and average precision are None where all labels are the same.

    Args:
        probabilities: float, any shape; exact ones, so that the loss is the least that can be expected.
        labels: bool, same shape.
    """
    from sklearn.metrics import average_precision_score, roc_auc_score

    labels, probabilities = labels.reshape(-1), probabilities.reshape(-1)
    with np.errstate(divide="ignore"):
        losses = -np.where(labels, np.log(probabilities), np.log1p(-probabilities))
    both = bool(labels.any() and not labels.all())
    return {
        "loss": float(losses.mean()),
        "auroc": float(roc_auc_score(labels, probabilities)) if both else None,
        "average_precision": float(average_precision_score(labels, probabilities)) if both else None,
        "positives": int(np.count_nonzero(labels)),
        "count": len(labels),
    }
