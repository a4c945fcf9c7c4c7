"""Which events become tokens: every rule that leaves one out, each counted."""

import bisect
import functools
from collections.abc import Sequence
from typing import Literal

import numpy as np

from behrt_jax.data.event_columns import Births, EventColumns, Selected, event_columns, rank_ids
from behrt_jax.data.events import BIRTH_CODE, DEATH_CODE, EventCounts, EventSet
from behrt_jax.data.ordering import sort_rows
from behrt_jax.data.selection import nothing_left, selects
from behrt_jax.data.visits import DAY, first_in_visit, number_visits

__all__ = ["DAY", "Selected", "select_columns", "select_events"]

_NEVER = np.iinfo(np.int64).max

Duplicates = Literal["keep", "drop", "count"]

REPEATS = ("//x2", "//x3-5", "//x6+")
"""What ``duplicates="count"`` puts behind a code that occurs 2, 3 to 5, or 6 and more times in a visit."""


def select_events(
    event_set: EventSet,
    codes: tuple[str, ...],
    exclude_codes: tuple[str, ...],
    duplicates: Duplicates,
) -> Selected:
    """Apply the rules below in this order, and number each subject's visits.

    Each rule adds the events it drops to ``event_set.counts`` under its name:

    1. ``birth or death marker``: MEDS_BIRTH and MEDS_DEATH set the birth and the day of death (the
       earliest where there are several) and are no tokens;
    2. ``code not selected``: no pattern of ``codes`` matches, or one of ``exclude_codes`` does;
    3. ``null time (static)``;
    4. ``no birth``: the subject's birth is not known, so the age is not either;
    5. ``before birth``;
    6. ``after death``: on a later calendar day than the death. The same day is kept, since deaths are
       often known by the day alone and records of that day are signed after it;
    7. ``duplicate in visit``: the code came earlier in the same visit (unless duplicates are kept; where
       they are counted, the first event's code gets a suffix of ``REPEATS``, and is counted as changed).

    A visit is a visit id where the event has one, else a calendar day. Events are in the order of time,
    so one visit may be interrupted by another.

    Args:
        event_set: events in any row order; ``counts`` is filled.
        codes: regular expressions, matched at the start of a code; none selects all.
        exclude_codes: regular expressions likewise.
        duplicates: what the seventh rule does.

    Raises:
        InputError: a pattern is no regular expression, or no event is left.
    """
    columns = event_columns(event_set.events)
    wanted = selects(columns.names, codes, exclude_codes)
    selected = select_columns(columns, wanted, duplicates, event_set.counts)
    count_repeated(selected.codes, len(columns.names), event_set.counts)
    if not len(selected.codes):
        marker = np.isin(np.array(columns.names), [BIRTH_CODE, DEATH_CODE])  # [names]
        by_code = np.bincount(columns.codes, minlength=len(marker))[~marker]
        names = [name for name in columns.names if name not in (BIRTH_CODE, DEATH_CODE)]
        raise nothing_left(dict(zip(names, by_code.tolist(), strict=True)), event_set.counts)
    return selected


def select_columns(
    events: EventColumns, wanted: np.ndarray | None, duplicates: Duplicates, counts: EventCounts
) -> Selected:
    """Apply the rules of :func:`select_events` to columns; it may be that no event is left.

    Args:
        events: the events, in any order.
        wanted: bool ``[names]``, the codes selected; None for all.
        duplicates: what the seventh rule does.
        counts: is filled.
    """
    subjects, births, kept = apply_rules(events, wanted, counts)
    subject, time, *ties, code = sort_rows(kept)
    visit = number_visits(subject, time, *ties)  # [K]
    if duplicates != "keep":
        first, repeated, times_seen = first_in_visit(visit, code)
        if duplicates == "count":
            suffix = (times_seen > 1).astype(np.int32) + (times_seen > 2) + (times_seen > 5)
            code = code.copy()
            code[repeated] += suffix * np.int32(len(events.names))
        if len(repeated):
            subject, time, code, visit = (column[first] for column in (subject, time, code, visit))
        counts.drop("duplicate in visit", len(first) - len(code))
    names = tuple(events.names)
    if duplicates == "count":
        names = _with_repeats(names)

    starts = np.flatnonzero(np.diff(subject, prepend=np.int32(-1)))  # [S]
    offsets = np.append(starts, len(subject))
    present = subject[starts]
    alone = births != _NEVER
    alone[present] = False
    # A subject's first event is of its first visit.
    visit -= np.repeat(visit[starts], np.diff(offsets))
    return Selected(
        subject_ids=subjects[present],
        births=births[present],
        offsets=offsets,
        codes=code,
        times=time,
        visits=visit,
        names=names,
        without_events=Births(subjects[alone], births[alone]),
    )


@functools.lru_cache(maxsize=2)  # the same for many partitions
def _with_repeats(names: tuple[str, ...]) -> tuple[str, ...]:
    return names + tuple(f"{name}{repeats}" for repeats in REPEATS for name in names)


def count_repeated(code: np.ndarray, names: int, counts: EventCounts) -> None:
    """Count the events whose code got a suffix of ``REPEATS``, being beyond the ``names`` without one."""
    counts.change("repeated in visit -> code with a count", int(np.count_nonzero(code >= names)))


def apply_rules(
    events: EventColumns, wanted: np.ndarray | None, counts: EventCounts, also: Sequence[np.ndarray] = ()
) -> tuple[np.ndarray, np.ndarray, list[np.ndarray]]:
    """Apply all rules but the one on duplicates.

    Args:
        events: the events, in any order.
        wanted: bool ``[names]``, the codes selected; None for all.
        counts: is filled.
        also: more columns ``[events]``, to be returned for the events kept.

    Returns:
        The subjects' ids, ascending, and births, int64 ``[subjects]`` each, and columns ``[kept]`` in the
        order in which events are sorted: place of the subject (int32), time, where there are any visit
        ids whether the event has one and which, code, and those of ``also``.
    """
    code, time = events.codes, events.times
    subjects, subject = rank_ids(events.subject_ids)
    born, died = (code == _place(events.names, marker) for marker in (BIRTH_CODE, DEATH_CODE))
    births, deaths = (
        _earliest(np.flatnonzero(marked), events, subject, len(subjects)) for marked in (born, died)
    )

    keep = ~(born | died)  # [N]
    counts.drop("birth or death marker", len(keep) - int(np.count_nonzero(keep)))

    def drop(rule: str, broken: np.ndarray) -> None:
        nonlocal keep
        broken &= keep
        counts.drop(rule, int(np.count_nonzero(broken)))
        keep ^= broken

    if wanted is not None and not wanted.all():
        drop("code not selected", ~wanted[code])
    if events.timed is not None:
        drop("null time (static)", ~events.timed)
    unborn = births == _NEVER  # [S]
    if unborn.any():
        drop("no birth", unborn[subject])
    drop("before birth", time < births[subject])
    if (deaths != _NEVER).any():
        ends = np.where(deaths == _NEVER, _NEVER, (deaths // DAY + 1) * DAY)
        drop("after death", time >= ends[subject])

    columns = [subject, time, code, *also]
    if events.visits is not None and events.named is not None:
        # The time decides the day, so that only visit ids tell events of one time apart.
        columns[2:2] = [events.named, np.where(events.named, events.visits, 0)]
    return subjects, births, [column[keep] for column in columns]


def _place(names: Sequence[str], name: str) -> int:
    """Place of a name in names, ascending; -1 where it is not there."""
    place = bisect.bisect_left(names, name)
    return place if place < len(names) and names[place] == name else -1


def _earliest(rows: np.ndarray, events: EventColumns, subject: np.ndarray, subjects: int) -> np.ndarray:
    """Earliest time among some rows by subject: int64 ``[subjects]``, ``_NEVER`` where none."""
    first = np.full(subjects, _NEVER)
    if events.timed is not None:
        rows = rows[events.timed[rows]]
    np.minimum.at(first, subject[rows], events.times[rows])
    return first
