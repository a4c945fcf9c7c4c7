"""Generated records whose best possible prediction is known: drawn from a :class:`LatentModel`.

How many visits a subject has, when, and how many codes each has, says nothing about the conditions, so
that :mod:`behrt_jax.evaluation.oracle` can take them as given.
"""

from dataclasses import dataclass

import numpy as np

from behrt_jax.data.events import DAY, EventSet
from behrt_jax.records.synthetic.histories import (
    MINUTE_US,
    Histories,
    check_options,
    draw_births,
    draw_subject_ids,
    history_lengths,
    to_event_set,
)
from behrt_jax.records.synthetic.latent_model import LatentModel, code_texts, latent_model

NEVER = np.iinfo(np.int64).max
_FUTURE = 1  # names the stream that draws what comes after the record


@dataclass(frozen=True, eq=False)
class LatentPaths:
    """What is behind the events: the stages of all conditions."""

    histories: Histories
    states: np.ndarray
    """int64 ``[visits]``: joint stage, a row of the model's ``states``."""
    onset_days: np.ndarray
    """int64 ``[subjects, conditions]``: day since 1970 of the first visit, in the record or after it, at
    which the condition is present; :data:`NEVER` where there is none up to ``until_days``."""
    until_days: np.ndarray
    """int64 ``[subjects]``: day since 1970 up to which the course is known."""


def generate_latent(
    subjects: int,
    code_count: int,
    events_mean: float,
    events_spread: float,
    seed: int,
    difficulty: float = 0.5,
) -> EventSet:
    """Generate histories of codes that depend on latent conditions, on age and on the code before.

    A visit has 1 to 6 codes, 3 on average, which may come again; the next visit follows with a chance of
    1 in 90 on each day. Minutes within a visit ascend in the order in which the codes were drawn.

    Args:
        subjects: number of subjects.
        code_count: number of codes.
        events_mean: mean number of events in a history, births aside; as each has one visit at least, it
            cannot fall below 3.
        events_spread: standard deviation of its logarithm; see
            :func:`~behrt_jax.records.synthetic.histories.history_lengths`.
        seed: of subjects and of the model's parameters. Equal seeds give equal events.
        difficulty: see :func:`~behrt_jax.records.synthetic.latent_model.latent_model`.

    Raises:
        InputError: an option is out of its range.
    """
    check_options(subjects, events_mean, events_spread, seed)
    model = latent_model(code_count, seed, difficulty)
    rng = np.random.default_rng(seed)
    histories = draw_latent_histories(rng, model, subjects, events_mean, events_spread)
    states = draw_states(rng, model, histories)
    codes = draw_codes(rng, model, histories, states)
    return to_event_set("latent", histories, codes, code_texts(model))


def latent_paths(
    subjects: int,
    code_count: int,
    events_mean: float,
    events_spread: float,
    seed: int,
    difficulty: float = 0.5,
    follow_up_days: int = 0,
) -> LatentPaths:
    """Draw the stages behind the events that :func:`generate_latent` gives with the same options.

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
    states = draw_states(rng, model, histories)
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


def draw_latent_histories(
    rng: np.random.Generator, model: LatentModel, subjects: int, mean: float, spread: float
) -> Histories:
    """Draw subjects, visits and times; see :func:`generate_latent` for the arguments.

    Visits are never cut short, and their sizes are independent of all else. They begin after noon and end
    before six, so that all events of a visit are in the age band of its day.
    """
    sizes = np.arange(1, len(model.sizes) + 1)
    lengths = history_lengths(rng, subjects, mean, spread)
    subject_visits = np.maximum(np.rint(lengths / (model.sizes @ sizes)), 1).astype(np.int64)
    first_visits = np.cumsum(subject_visits) - subject_visits
    visit_subjects = np.repeat(np.arange(subjects), subject_visits)
    visits = len(visit_subjects)
    visit_events = rng.choice(sizes, visits, p=model.sizes)

    birth_days, first_days = draw_births(rng, subjects)
    days = np.cumsum(rng.geometric(model.daily_visit, visits))
    visit_days = days + (first_days - days[first_visits])[visit_subjects]

    visit_starts = np.cumsum(visit_events) - visit_events
    event_places = np.arange(visit_events.sum()) - np.repeat(visit_starts, visit_events)
    # Ages are float32 later on, at worst four minutes wrong: keep away from noon.
    opening = rng.integers(12 * 60 + 10, 16 * 60, visits)
    minutes_apart = rng.integers(1, 20, visits)
    event_times = np.repeat(visit_days * DAY + opening * MINUTE_US, visit_events)
    event_times += event_places * np.repeat(minutes_apart * MINUTE_US, visit_events)
    return Histories(
        subject_ids=draw_subject_ids(rng, subjects),
        birth_days=birth_days,
        first_visits=first_visits,
        visit_subjects=visit_subjects,
        visit_days=visit_days,
        visit_events=visit_events,
        event_places=event_places,
        event_times=event_times,
    )


def draw_states(rng: np.random.Generator, model: LatentModel, histories: Histories) -> np.ndarray:
    """Draw the joint stage at each visit, int64 ``[visits]``."""
    bands = model.band_of_day(histories.visit_days - histories.birth_days[histories.visit_subjects])
    uniforms = rng.random(len(bands))
    initial, transitions = _cumulative(model.initial), _cumulative(model.transitions)
    states = np.empty(len(bands), np.int64)
    rows = histories.first_visits
    ends = np.append(rows[1:], len(bands))
    states[rows] = (uniforms[rows, None] >= initial[bands[rows]]).sum(axis=1)
    while True:
        chosen = rows + 1 < ends
        rows, ends = rows[chosen] + 1, ends[chosen]
        if not len(rows):
            return states
        states[rows] = (uniforms[rows, None] >= transitions[bands[rows], states[rows - 1]]).sum(axis=1)


def draw_codes(
    rng: np.random.Generator, model: LatentModel, histories: Histories, states: np.ndarray
) -> np.ndarray:
    """Draw the code of each event, int32 ``[events]``, given the joint stage at each visit."""
    bands = model.band_of_day(histories.visit_days - histories.birth_days[histories.visit_subjects])
    starts, follows = _cumulative(model.starts), _cumulative(model.follows)
    visit_starts = np.cumsum(histories.visit_events) - histories.visit_events
    restart, which, draw = rng.random((3, len(histories.event_places)))
    rows = np.empty(len(draw), np.int64)  # which emissions each event draws from
    visits = np.arange(len(states))
    topics = np.empty(len(states), np.int64)
    for place in range(int(histories.visit_events.max())):
        visits = visits[histories.visit_events[visits] > place]
        events = visit_starts[visits] + place
        drawn = (which[events, None] >= starts[states[visits]]).sum(axis=1)
        if place:
            going_on = restart[events] < model.continues[topics[visits]]
            following = (which[events, None] >= follows[topics[visits]]).sum(axis=1)
            drawn = np.where(going_on, following, drawn)
        topics[visits] = drawn
        rows[events] = model.rows[states[visits], drawn]
    rows += np.repeat(bands, histories.visit_events) * model.emissions.shape[1]
    return _draw_by_row(draw, rows, _cumulative(model.emissions.reshape(-1, model.emissions.shape[2])))


def _draw_by_row(uniforms: np.ndarray, rows: np.ndarray, cumulative: np.ndarray) -> np.ndarray:
    """Draw one value for each uniform number from the distribution in its row, int32 ``[n]``."""
    order = np.argsort(rows, kind="stable")
    drawn = np.empty(len(rows), np.int32)
    used, begins = np.unique(rows[order], return_index=True)
    for row, places in zip(used, np.split(order, begins[1:]), strict=True):
        drawn[places] = np.searchsorted(cumulative[row], uniforms[places], side="right")
    return drawn


def _draw_onsets(
    rng: np.random.Generator, model: LatentModel, histories: Histories, states: np.ndarray, days: int
) -> np.ndarray:
    """First day on which each condition is present, int64 ``[subjects, conditions]``."""
    present = model.states > 0  # [Z, K]
    seen = np.where(present[states], histories.visit_days[:, None], NEVER)  # [visits, K]
    onsets = np.minimum.reduceat(seen, histories.first_visits, axis=0)
    last = np.append(histories.first_visits[1:], len(states)) - 1
    state, day = states[last], histories.visit_days[last]
    until = day + days
    transitions = _cumulative(model.transitions)
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


def _cumulative(probabilities: np.ndarray) -> np.ndarray:
    """Cumulative sums over the last axis that end in 1 from the last possible value on."""
    sums = np.cumsum(probabilities, axis=-1)
    return np.where(sums >= sums[..., -1:], 1.0, sums)
