"""Generated histories whatever their codes: lengths, visits, times and births; and codes drawn at random."""

from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from behrt_jax.data.events import BIRTH_CODE, DAY, EVENT_SCHEMA, EventCounts, EventSet
from behrt_jax.errors import InputError

YEAR_DAYS = 365.25

VISIT_SIZES = np.array([1, 1, 2, 2, 2, 2, 3, 3, 3, 3, 3, 4, 4, 4, 5, 6])
"""Equally likely numbers of events in a visit (3 on average, before the end of a history cuts one)."""

FIRST_DAY, LAST_DAY = np.array(["2004-01-01", "2016-01-01"], "datetime64[D]").astype(np.int64)
"""Days since 1970 between which first visits lie, each day as likely; the last one is not included."""
_MINUTE = 60_000_000  # microseconds
_GAP_DAYS = 90.0
_LONGEST_SPAN_DAYS = 15 * YEAR_DAYS


@dataclass(frozen=True)
class GeneratedHistories:
    """Subjects, their visits and the times of their events; days and microseconds since 1970.

    Visits and events are in order of subject and time, so ``np.repeat(values, visit_events)`` takes
    one value per visit to one per event.
    """

    subject_ids: np.ndarray
    """int64 ``[subjects]``: any 64-bit number, in no order."""
    birth_days: np.ndarray
    """int64 ``[subjects]``."""
    first_visits: np.ndarray
    """int64 ``[subjects]``: index of the subject's first visit; each has one at least."""
    visit_subjects: np.ndarray
    """int64 ``[visits]``: index of the subject."""
    visit_days: np.ndarray
    """int64 ``[visits]``: each later than the subject's visit before, none before birth."""
    visit_events: np.ndarray
    """int64 ``[visits]``: number of events, 1 to 6."""
    event_places: np.ndarray
    """int64 ``[events]``: 0 for the first event of a visit, then 1, 2 ..."""
    event_times: np.ndarray
    """int64 ``[events]``: microseconds; the minutes of a visit's events differ."""

    @property
    def visit_age_days(self) -> np.ndarray:
        """int64 ``[visits]``: days since the subject's birth."""
        return self.visit_days - self.birth_days[self.visit_subjects]


def check_options(subjects: int, events_mean: float, events_spread: float, seed: int) -> None:
    """Check what all generators take.

    Raises:
        InputError: ``data.subjects``, ``data.events_mean``, ``data.events_spread`` or ``data.seed`` is
            out of its range.
    """
    if subjects < 1:
        raise InputError(f"data.subjects is {subjects}: give at least 1.")
    if not 1 <= events_mean <= 10_000:
        raise InputError(f"data.events_mean is {events_mean}: give a number from 1 to 10000.")
    if not 0 <= events_spread <= 3:
        raise InputError(f"data.events_spread is {events_spread}: give a number from 0 to 3.")
    if seed < 0:
        raise InputError(f"data.seed is {seed}: give 0 or a positive whole number.")


def history_lengths(rng: np.random.Generator, subjects: int, mean: float, spread: float) -> np.ndarray:
    """Draw the number of events of each subject, int64 ``[subjects]``, from a lognormal distribution.

    ``spread`` is the standard deviation of the logarithm and ``mean`` the expectation, so the mean of
    the logarithm is log(mean) - spread**2 / 2. Lengths are rounded; those below 1 become 1, which
    lifts the mean where many are (small mean, large spread). With mean 15 and spread 0.9, half the
    subjects have 10 events or fewer and one in a hundred more than 80.
    """
    logarithms = rng.normal(np.log(mean) - spread**2 / 2, spread, subjects)
    return np.maximum(np.rint(np.exp(logarithms)), 1).astype(np.int64)


def draw_histories(rng: np.random.Generator, subjects: int, mean: float, spread: float) -> GeneratedHistories:
    """Draw subjects with visits of 1 to 6 events, weeks to months apart.

    The first visit lies from 2004 to 2015, at an age from 0 to 90 years; one subject in six is a child.
    Visits of a long history are closer together, so that it spans about 15 years at most (one day apart
    at the closest).
    """
    lengths = history_lengths(rng, subjects, mean, spread)
    ends = np.cumsum(lengths)
    events = int(ends[-1])

    cuts = np.cumsum(VISIT_SIZES[rng.integers(0, len(VISIT_SIZES), events, dtype=np.uint8)])
    starts_visit = np.zeros(events, bool)
    starts_visit[cuts[: np.searchsorted(cuts, events)]] = True
    starts_visit[ends - lengths] = True
    visit_starts = np.flatnonzero(starts_visit)  # [visits]
    visit_events = np.diff(visit_starts, append=events)
    subject_visits = np.add.reduceat(starts_visit, ends - lengths, dtype=np.int64)
    visit_subjects = np.repeat(np.arange(subjects), subject_visits)

    birth_days, first_days = draw_births(rng, subjects)
    gap_days = np.minimum(_GAP_DAYS * rng.uniform(0.5, 1.5, subjects), _LONGEST_SPAN_DAYS / subject_visits)
    relative_gaps = 0.3 + 0.7 * rng.standard_exponential(len(visit_starts), np.float32)
    gaps = 1 + (gap_days[visit_subjects] * relative_gaps).astype(np.int64)
    return lay_out(rng, visit_subjects, visit_events, gaps, (birth_days, first_days), (8 * 60, 16 * 60))


def lay_out(
    rng: np.random.Generator,
    visit_subjects: np.ndarray,
    visit_events: np.ndarray,
    gaps: np.ndarray,
    births: tuple[np.ndarray, np.ndarray],
    opening: tuple[int, int],
) -> GeneratedHistories:
    """Draw the minutes of visits and events, and the subjects' ids, and put histories together.

    Args:
        rng: random numbers.
        visit_subjects: int64 ``[visits]``, ascending, each subject at least once.
        visit_events: int64 ``[visits]``.
        gaps: days from the visit before, int64 ``[visits]``; of a subject's first visit any.
        births: days of birth and of the first visit, as `draw_births` gives them.
        opening: minutes of the day between which visits begin.
    """
    birth_days, first_days = births
    first_visits = np.searchsorted(visit_subjects, np.arange(len(birth_days)))
    days = np.cumsum(gaps)
    visit_days = days + (first_days - days[first_visits])[visit_subjects]
    visit_starts = np.cumsum(visit_events) - visit_events
    event_places = np.arange(visit_events.sum()) - np.repeat(visit_starts, visit_events)
    begins = rng.integers(*opening, len(visit_subjects))
    minutes_apart = rng.integers(1, 20, len(visit_subjects))
    event_times = np.repeat(visit_days * DAY + begins * _MINUTE, visit_events)
    event_times += event_places * np.repeat(minutes_apart * _MINUTE, visit_events)
    return GeneratedHistories(
        subject_ids=draw_subject_ids(rng, len(birth_days)),
        birth_days=birth_days,
        first_visits=first_visits,
        visit_subjects=visit_subjects,
        visit_days=visit_days,
        visit_events=visit_events,
        event_places=event_places,
        event_times=event_times,
    )


def draw_subject_ids(rng: np.random.Generator, subjects: int) -> np.ndarray:
    """Draw distinct int64 ids ``[subjects]`` from all 64 bits: in no order, of both signs, beyond 2**53."""
    # Multiplying by an odd number and adding any other is a one-to-one map modulo 2**64.
    odd, shift = rng.integers(0, 2**64, 2, dtype=np.uint64)
    return (np.arange(subjects, dtype=np.uint64) * (odd | np.uint64(1)) + shift).view(np.int64)


def draw_births(rng: np.random.Generator, subjects: int) -> tuple[np.ndarray, np.ndarray]:
    """Draw the days of birth and of the first visit, both int64 ``[subjects]``."""
    child = rng.random(subjects) < 1 / 6
    child_ages = 18 * rng.random(subjects) ** 1.5
    adult_ages = np.clip(rng.normal(55, 20, subjects), 18, 90)
    first_days = rng.integers(FIRST_DAY, LAST_DAY, subjects)
    ages = np.where(child, child_ages, adult_ages)  # years
    return first_days - (ages * YEAR_DAYS).astype(np.int64), first_days


def to_event_set(
    source: str,
    histories: GeneratedHistories,
    event_codes: np.ndarray,
    descriptions: dict[str, str],
    facts: dict[str, tuple[np.ndarray, np.ndarray]] | None = None,
) -> EventSet:
    """Turn histories and their codes into MEDS-shaped events, without a split of the subjects.

    Args:
        source: Name of the generator.
        histories: Subjects, visits and times.
        event_codes: int32 ``[events]``, index into ``descriptions``.
        descriptions: Every code that the generator can emit -> its text.
        facts: Further events, one a subject at most: code -> (indices of the subjects, times as
            datetime64[us], NaT for a static fact).

    Returns:
        Events with a birth for each subject, then the facts, then the histories: not sorted by subject.
    """
    births = (np.arange(len(histories.birth_days)), (histories.birth_days * DAY).view("datetime64[us]"))
    facts = {BIRTH_CODE: births} | (facts or {})
    of_events = np.repeat(histories.visit_subjects, histories.visit_events)
    subjects = [*(rows for rows, _ in facts.values()), of_events]
    times = [*(when for _, when in facts.values()), histories.event_times.view("datetime64[us]")]
    fact_codes = np.arange(len(facts), dtype=np.int32) + len(descriptions)
    codes = np.repeat(fact_codes, [len(rows) for rows, _ in facts.values()])
    indices = np.concatenate([codes, event_codes.astype(np.int32, copy=False)])
    dictionary = pa.array([*descriptions, *facts], pa.string())
    columns = [
        pa.array(histories.subject_ids[np.concatenate(subjects)]),
        pa.array(np.concatenate(times), pa.timestamp("us")),  # NaT becomes null
        pa.DictionaryArray.from_arrays(pa.array(indices), dictionary),
        pa.nulls(len(indices), pa.float32()),
    ]
    return EventSet(
        source=source,
        events=pa.Table.from_arrays(columns, schema=EVENT_SCHEMA),
        splits={},
        counts=EventCounts(read=len(indices)),
        descriptions=descriptions,
        declared_codes=tuple(descriptions),
    )


# Codes drawn at random: what a model looks like when there is nothing to learn.


def generate_uniform(
    subjects: int, code_count: int, events_mean: float, events_spread: float, seed: int
) -> EventSet:
    """Generate histories whose codes are independent and equally likely.

    No code says anything about another, about age or about time: the best loss that masked-code
    prediction can reach is ln(``code_count``), that of a guess (6.908 for 1000 codes). A model that
    gets below it on subjects it has not seen points to a leak.

    Args:
        subjects: Number of subjects.
        code_count: Number of codes, ``DX//U0000`` and so on.
        events_mean: Mean number of events in a history, births aside.
        events_spread: Standard deviation of its logarithm; see `history_lengths`.
        seed: Equal seeds give equal events.

    Raises:
        InputError: An option is out of its range.
    """
    check_options(subjects, events_mean, events_spread, seed)
    if code_count < 2:
        raise InputError(
            f"data.vocabulary_size leaves {code_count} codes to the uniform source: give 2 or more."
        )
    rng = np.random.default_rng(seed)
    histories = draw_histories(rng, subjects, events_mean, events_spread)
    codes = rng.integers(0, code_count, len(histories.event_times), dtype=np.int32)
    descriptions = {f"DX//U{number:04d}": f"Code {number}, drawn at random" for number in range(code_count)}
    return to_event_set("uniform", histories, codes, descriptions)
