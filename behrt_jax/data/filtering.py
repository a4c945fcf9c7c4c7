"""Which events become tokens: every rule that leaves one out, each counted."""

import bisect
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import pyarrow as pa

from behrt_jax.data.events import BIRTH_CODE, DEATH_CODE, EventCounts, EventSet
from behrt_jax.data.ordering import ascending, sort_rows
from behrt_jax.data.visits import DAY, first_in_visit, number_visits
from behrt_jax.errors import InputError

__all__ = ["DAY", "EventColumns", "Selected", "select_columns", "select_events"]

_NEVER = np.iinfo(np.int64).max

Duplicates = Literal["keep", "drop", "count"]

REPEATS = ("//x2", "//x3-5", "//x6+")
"""What ``duplicates="count"`` puts behind a code that occurs 2, 3 to 5, or 6 and more times in a visit."""


@dataclass(frozen=True, eq=False)
class Selected:
    """The events left, sorted by subject, time, visit and code, so whatever order they came in."""

    subject_ids: np.ndarray
    """int64 ``[subjects]``, ascending; only subjects with an event left."""
    births: np.ndarray
    """int64 ``[subjects]``, microseconds since 1970."""
    offsets: np.ndarray
    """int64 ``[subjects + 1]``: subject i has the events from ``offsets[i]`` to ``offsets[i + 1]``."""
    codes: np.ndarray
    """int32 ``[events]``, places in ``names``."""
    times: np.ndarray
    """int64 ``[events]``, microseconds since 1970."""
    visits: np.ndarray
    """int32 ``[events]``, from 0 for each subject, in the order of the visits' first events."""
    names: tuple[str, ...]
    """The distinct codes of the whole data set, sorted; where duplicates are counted, followed by all of
    them with each suffix of ``REPEATS`` in turn."""


@dataclass(frozen=True, eq=False)
class EventColumns:
    """Events in any row order, as arrays ``[events]``."""

    subject_ids: np.ndarray
    """int64."""
    codes: np.ndarray
    """int32 places in ``names``."""
    times: np.ndarray
    """int64 microseconds since 1970, 0 where null."""
    names: Sequence[str]
    """Distinct codes, ascending, so that places sort as the codes do."""
    timed: np.ndarray | None = None
    """bool: the time is not null. None where all are so."""
    visits: np.ndarray | None = None
    """int64 visit ids, anything where there is none. None where no event has one."""
    named: np.ndarray | None = None
    """bool: the event has a visit id. Given with ``visits``."""


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
    if not len(selected.codes):
        marker = np.isin(np.array(columns.names), [BIRTH_CODE, DEATH_CODE])  # [names]
        by_code = np.bincount(columns.codes, minlength=len(marker))[~marker]
        names = [name for name in columns.names if name not in (BIRTH_CODE, DEATH_CODE)]
        raise nothing_left(dict(zip(names, by_code.tolist(), strict=True)), event_set.counts)
    return selected


def selects(
    names: Sequence[str], codes: tuple[str, ...], exclude_codes: tuple[str, ...], options: str = "data."
) -> np.ndarray:
    """Which codes the patterns select, the second rule of :func:`select_events`: bool ``[names]``.

    Raises:
        InputError: a pattern is no regular expression; ``options`` goes before the option's name.
    """
    wanted = matches(names, codes, f"{options}codes") if codes else np.ones(len(names), bool)
    return wanted & ~matches(names, exclude_codes, f"{options}exclude_codes")


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
        first, times_seen = first_in_visit(visit, code)
        counts.drop("duplicate in visit", len(code) - len(first))
        if len(first) < len(code):
            subject, time, code, visit = (column[first] for column in (subject, time, code, visit))
        if duplicates == "count" and times_seen is not None:
            suffix = (times_seen > 1).astype(np.int32) + (times_seen > 2) + (times_seen > 5)
            counts.change("repeated in visit -> code with a count", int(np.count_nonzero(suffix)))
            code = code + suffix * np.int32(len(events.names))
    names = tuple(events.names)
    if duplicates == "count":
        names += tuple(f"{name}{repeats}" for repeats in REPEATS for name in events.names)

    starts = np.flatnonzero(np.diff(subject, prepend=np.int32(-1)))  # [S]
    offsets = np.append(starts, len(subject))
    present = subject[starts]
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
    )


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
    subjects, subject = _rank(events.subject_ids)
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


def event_columns(events: pa.Table) -> EventColumns:
    """The columns of an events table, with the codes' names sorted."""
    code = events["code"].combine_chunks()
    given = code.dictionary.to_pylist()
    names = sorted(set(given))
    place = {name: index for index, name in enumerate(names)}
    lookup = np.array([place[name] for name in given], np.int32)
    time = events["time"].cast(pa.int64())
    visits = named = None
    if "visit_id" in events.column_names and events["visit_id"].null_count < events.num_rows:
        named = events["visit_id"].is_valid().to_numpy()
        visits = events["visit_id"].fill_null(0).to_numpy()
    return EventColumns(
        subject_ids=events["subject_id"].to_numpy(),
        codes=lookup[code.indices.to_numpy()],
        times=time.fill_null(0).to_numpy(),
        names=names,
        timed=time.is_valid().to_numpy() if time.null_count else None,
        visits=visits,
        named=named,
    )


def _rank(ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Distinct ids, ascending, and the place of each id ``[N]`` among them, int32 ``[N]``."""
    if not len(ids):
        return ids, np.empty(0, np.int32)
    if ascending(ids):
        leads = np.ones(len(ids), bool)
        leads[1:] = ids[1:] != ids[:-1]
        return ids[leads], np.cumsum(leads, dtype=np.int32) - np.int32(1)
    least, most = int(ids.min()), int(ids.max())
    if most - least < max(4 * len(ids), 1 << 16):  # a table of all numbers in between is small enough
        shifted = ids - least
        seen = np.zeros(most - least + 1, bool)
        seen[shifted] = True
        place = np.cumsum(seen, dtype=np.int32) - np.int32(1)
        return np.flatnonzero(seen) + least, place[shifted]
    coded = pa.array(ids).dictionary_encode()
    distinct, rank = np.unique(coded.dictionary.to_numpy(), return_inverse=True)
    return distinct, rank.astype(np.int32)[coded.indices.to_numpy()]


def matches(names: Sequence[str], patterns: tuple[str, ...], option: str) -> np.ndarray:
    """Whether any pattern matches at the start of each name: bool ``[names]``.

    Raises:
        InputError: a pattern is no regular expression; ``option`` is named as the place to mend it.
    """
    compiled = []
    for pattern in patterns:
        try:
            compiled.append(re.compile(pattern))
        except re.error as error:
            raise InputError(
                f"{option} has {pattern!r}, which is no regular expression ({error}): mend it, or put a "
                "backslash before the sign to take it literally."
            ) from error
    if not compiled:
        return np.zeros(len(names), dtype=bool)
    return np.array([any(pattern.match(name) for pattern in compiled) for name in names], dtype=bool)


def _earliest(rows: np.ndarray, events: EventColumns, subject: np.ndarray, subjects: int) -> np.ndarray:
    """Earliest time among some rows by subject: int64 ``[subjects]``, ``_NEVER`` where none."""
    first = np.full(subjects, _NEVER)
    if events.timed is not None:
        rows = rows[events.timed[rows]]
    np.minimum.at(first, subject[rows], events.times[rows])
    return first


def nothing_left(by_code: Mapping[str, int], counts: EventCounts, options: str = "data.") -> InputError:
    """The error of a data set from which the rules leave nothing.

    Args:
        by_code: code, or prefix of codes -> events read, markers of birth and death aside.
        counts: what the rules dropped.
        options: goes before the names of the options.
    """
    by_prefix = Counter()
    for name, count in by_code.items():
        by_prefix[name.split("//")[0]] += count
    prefixes = ", ".join(prefix for prefix, count in by_prefix.most_common(10) if count)
    rules = ", ".join(f"{rule}: {count}" for rule, count in counts.dropped.items())
    return InputError(
        f"No event is left after filtering ({rules}): choose {options}codes and {options}exclude_codes to "
        f"fit the codes of the data set (most frequent prefixes: {prefixes or 'none'}), and see that "
        f"subjects have a {BIRTH_CODE} event with a time."
    )
