"""The course behind generated records: when each latent condition begins, also after the record's end."""

from dataclasses import dataclass

import numpy as np

from behrt_jax.records.synthetic.histories import GeneratedHistories, check_options
from behrt_jax.records.synthetic.latent import (
    LatentModel,
    cumulative,
    draw_course,
    draw_latent_histories,
    latent_model,
)

NEVER = np.iinfo(np.int64).max
_FUTURE = 1  # names the stream that draws what comes after the record


@dataclass(frozen=True, eq=False)
class LatentPaths:
    """What is behind the events: the stages of all conditions."""

    histories: GeneratedHistories
    states: np.ndarray
    """int64 ``[visits]``: joint stage, a row of the model's ``states``."""
    onset_days: np.ndarray
    """int64 ``[subjects, conditions]``: day since 1970 of the first visit, in the record or after it, at
    which the condition is present; `NEVER` where there is none up to ``until_days``."""
    until_days: np.ndarray
    """int64 ``[subjects]``: day since 1970 up to which the course is known."""


def latent_paths(
    subjects: int,
    code_count: int,
    events_mean: float,
    events_spread: float,
    seed: int,
    difficulty: float = 0.5,
    follow_up_days: int = 0,
) -> LatentPaths:
    """Draw the stages behind the events that `latent.generate_latent` gives with the same options.

    Args:
        subjects: as there, like the options that follow.
        code_count: as there.
        events_mean: as there.
        events_spread: as there.
        seed: as there.
        difficulty: as there.
        follow_up_days: days after the last visit in which the course goes on, at visits that leave no
            record.
    """
    check_options(subjects, events_mean, events_spread, seed)
    model = latent_model(code_count, seed, difficulty)
    rng = np.random.default_rng(seed)
    histories = draw_latent_histories(rng, model, subjects, events_mean, events_spread)
    histories, states = draw_course(rng, model, histories)
    future = np.random.default_rng([seed, _FUTURE])
    onsets = _draw_onsets(future, model, histories, states, follow_up_days)
    last = np.append(histories.first_visits[1:], len(states)) - 1
    return LatentPaths(histories, states, onsets, histories.visit_days[last] + follow_up_days)


def onset_labels(paths: LatentPaths, visits: np.ndarray, condition: int, horizon_days: int) -> np.ndarray:
    """Whether a condition begins after a visit and within the horizon: bool ``[n]``.

    False where it is present at that visit already.

    Args:
        paths: followed up for ``horizon_days`` after the last visit at least.
        visits: index into the visits of ``paths.histories``, ``[n]``: the prediction times.
        condition: from 0.
        horizon_days: the last day that counts, from the visit.

    Raises:
        ValueError: the course is not known for so long.
    """
    subjects, days = paths.histories.visit_subjects[visits], paths.histories.visit_days[visits]
    if (days + horizon_days > paths.until_days[subjects]).any():
        raise ValueError("the paths end before the horizon: draw them with follow_up_days")
    onsets = paths.onset_days[subjects, condition]
    return (onsets > days) & (onsets <= days + horizon_days)


def _draw_onsets(
    rng: np.random.Generator, model: LatentModel, histories: GeneratedHistories, states: np.ndarray, days: int
) -> np.ndarray:
    """First day on which each condition is present, int64 ``[subjects, conditions]``."""
    present = model.states > 0  # [Z, K]
    seen = np.where(present[states], histories.visit_days[:, None], NEVER)  # [visits, K]
    onsets = np.minimum.reduceat(seen, histories.first_visits, axis=0)
    last = np.append(histories.first_visits[1:], len(states)) - 1
    state, day = states[last], histories.visit_days[last]
    until = day + days
    transitions = cumulative(model.transitions)
    subjects = np.arange(len(last))
    while len(subjects):
        day = day + rng.geometric(model.daily_visit, len(subjects))
        chosen = day <= until[subjects]
        subjects, day, state = subjects[chosen], day[chosen], state[chosen]
        bands = model.band_of_day(day - histories.birth_days[subjects])
        uniforms = rng.random(len(subjects))
        state = (uniforms[:, None] >= transitions[bands, state]).sum(axis=1)
        new = np.where(present[state], day[:, None], NEVER)
        onsets[subjects] = np.minimum(onsets[subjects], new)
    return onsets
