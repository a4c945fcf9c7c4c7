"""Births, deaths and ages: which of several are taken, and which cannot be."""

from dataclasses import dataclass
from typing import Literal

import numpy as np

from behrt_jax.data.events import DAY, YEAR, EventColumns, EventCounts
from behrt_jax.errors import InputError

NEVER = np.iinfo(np.int64).max
"""Of a birth or death that is not known."""
LONGEST_LIFE = int(150 * YEAR)
"""In microseconds."""
_HIDDEN_AGES = int(300 * YEAR), int(330 * YEAR)
"""Ages, from and to, by which MIMIC-III hides those over 89: they are taken as they are."""
_CARE_AFTER_DEATH = 60 * DAY
_PLACEHOLDERS = np.array(
    ["0001-01-01", "1753-01-01", "1800-01-01", "1899-12-30", "1899-12-31", "1900-01-01", "1901-01-01"],
    "datetime64[us]",
).astype(np.int64)
"""Days, in microseconds since 1970, that often stand for an unknown birth."""
PLACEHOLDER_BIRTH = "birth on a placeholder's day, kept"
_GIVES_WAY = np.int64(1 << 62)

WithoutBirth = Literal["drop", "first_event", "unknown"]
ImplausibleAges = Literal["refuse", "drop", "keep"]
TOO_OLD = "age above 150 years"
"""The rule that drops events at an age that cannot be."""


@dataclass(frozen=True)
class LifeRules:
    """What becomes of events whose age is not known or cannot be."""

    without_birth: WithoutBirth = "drop"
    """Of subjects without a birth, events are dropped, or their age counts from the first event left, or is
    unknown (NaN)."""
    implausible_ages: ImplausibleAges = "refuse"
    """Events at an age above 150 years (but of 300 to 330, as MIMIC-III has them) are dropped, or kept; to
    ``refuse`` them is up to the caller, by their count: see `check_ages`."""


DEFAULT_RULES = LifeRules()


def check_ages(counts: EventCounts, life: LifeRules) -> None:
    """Refuse events at an age that cannot be, unless they are to be dropped or kept.

    Raises:
        InputError: there are some; it says how many.
    """
    if life.implausible_ages == "refuse" and (events := counts.dropped.get(TOO_OLD)):
        raise InputError(
            f"{events:,} events are at an age above 150 years, so their time or their subject's birth is "
            "wrong (another unit, or damage): mend them, or prepare with --implausible_ages drop or keep."
        )


def too_old(times: np.ndarray, births: np.ndarray) -> np.ndarray:
    """At an age that cannot be: bool ``[n]``; not where no birth is known."""
    begin = np.minimum(births, NEVER - _HIDDEN_AGES[1])  # so that sums stay within 64 bits
    least, most = (begin + age for age in _HIDDEN_AGES)
    return (births != NEVER) & (times > begin + LONGEST_LIFE) & ((times < least) | (times > most))


def births_of(
    born: np.ndarray, events: EventColumns, subject: np.ndarray, subjects: int, counts: EventCounts
) -> np.ndarray:
    """Birth of each subject, int64 ``[subjects]``, ``NEVER`` where none is known."""
    rows = np.flatnonzero(born if events.timed is None else born & events.timed)
    ranks = birth_ranks(events.times[rows])
    best, worst = np.full(subjects, NEVER), np.full(subjects, -NEVER)
    np.minimum.at(best, subject[rows], ranks)
    np.maximum.at(worst, subject[rows], ranks)
    known = best != NEVER
    births = births_of_ranks(best)
    counts.change("births differ", int(np.count_nonzero(known & (best != worst))))
    counts.change(PLACEHOLDER_BIRTH, int(np.count_nonzero(known & (births != best))))
    return np.where(known, births, NEVER)


def birth_ranks(births: np.ndarray) -> np.ndarray:
    """Numbers, int64 ``[n]``, of which the smallest is that of the birth to take: placeholders come last."""
    return np.where(np.isin(births, _PLACEHOLDERS), births + _GIVES_WAY, births)


def births_of_ranks(ranks: np.ndarray) -> np.ndarray:
    """The births of which these are the `birth_ranks`."""
    births = ranks - _GIVES_WAY
    return np.where(np.isin(births, _PLACEHOLDERS), births, ranks)


def deaths_of(
    died: np.ndarray,
    events: EventColumns,
    subject: np.ndarray,
    births: np.ndarray,
    keep: np.ndarray,
    counts: EventCounts,
    life: LifeRules,
) -> np.ndarray:
    """Death of each subject, int64 ``[subjects]``, ``NEVER`` where none is known; ``keep`` as so far."""
    rows = np.flatnonzero(died if events.timed is None else died & events.timed)
    first = np.full(len(births), NEVER)
    if not len(rows):
        return first
    of, time = subject[rows], events.times[rows]
    early = time // DAY < np.where(births == NEVER, -NEVER, births)[of] // DAY
    late = ~early & (life.implausible_ages != "keep") & too_old(time, births[of])
    counts.change("death before birth, passed over", int(np.count_nonzero(early)))
    counts.change(f"death at an {TOO_OLD}, passed over", int(np.count_nonzero(late)))
    of, time = of[~(early | late)], time[~(early | late)]
    last = np.full(len(births), -NEVER)
    np.minimum.at(first, of, time)
    np.maximum.at(last, of, time)
    differ = (first != NEVER) & (first // DAY != last // DAY)  # [S]
    if differ.any():
        counts.change("deaths differ", int(np.count_nonzero(differ)))
        of = np.flatnonzero(keep & differ[subject])
        care, of = events.times[of], subject[of]
        between = (care > first[of] + _CARE_AFTER_DEATH) & (care // DAY <= last[of] // DAY)
        false = np.zeros(len(births), bool)
        false[of[between]] = True
        counts.change("care between deaths, the last taken", int(np.count_nonzero(false)))
        first = np.where(false, last, first)
    return first
