"""Which events become tokens: every rule that leaves one out, each counted, and the visits of the rest."""

import re
from collections import Counter
from dataclasses import dataclass
from typing import Literal

import numpy as np
import pyarrow as pa

from behrt_jax.data.events import BIRTH_CODE, DEATH_CODE, EventCounts, EventSet
from behrt_jax.errors import InputError

DAY = 86_400_000_000
"""Microseconds in a day."""
_NEVER = np.iinfo(np.int64).max


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
    """The distinct codes of the whole data set, sorted."""


@dataclass(frozen=True, eq=False)
class _Columns:
    """The events table as arrays ``[events]``."""

    ids: np.ndarray  # int64 [subjects], ascending
    subject: np.ndarray  # place in ids
    names: np.ndarray  # str [distinct codes], ascending
    code: np.ndarray  # int32 place in names, so that it sorts as the names do
    time: np.ndarray  # int64 microseconds, 0 where null
    timed: np.ndarray  # bool
    visit: np.ndarray  # int64: visit id, or the calendar day where there is none
    named: np.ndarray  # bool: `visit` is a visit id


def select_events(
    event_set: EventSet,
    codes: tuple[str, ...],
    exclude_codes: tuple[str, ...],
    duplicates: Literal["keep", "drop"],
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
    7. ``duplicate in visit``: the code came earlier in the same visit (``duplicates="drop"`` only).

    A visit is a visit id where the event has one, else a calendar day. Events are in the order of time,
    so one visit may be interrupted by another.

    Args:
        event_set: events in any row order; ``counts`` is filled.
        codes: regular expressions, matched at the start of a code; none selects all.
        exclude_codes: regular expressions likewise.
        duplicates: whether the seventh rule applies.

    Raises:
        InputError: a pattern is no regular expression, or no event is left.
    """
    events = _columns(event_set.events)
    selected = _matches(events.names, codes, "data.codes") if codes else np.ones(len(events.names), bool)
    selected &= ~_matches(events.names, exclude_codes, "data.exclude_codes")
    born, died = ((events.names == marker)[events.code] for marker in (BIRTH_CODE, DEATH_CODE))
    births, deaths = (_earliest(events, marker) for marker in (born, died))  # [S]

    keep = np.ones(len(events.code), dtype=bool)  # [N]
    for rule, broken in (
        ("birth or death marker", born | died),
        ("code not selected", ~selected[events.code]),
        ("null time (static)", ~events.timed),
        ("no birth", births[events.subject] == _NEVER),
        ("before birth", events.time < births[events.subject]),
        ("after death", events.time // DAY > deaths[events.subject] // DAY),
    ):
        event_set.counts.drop(rule, int(np.count_nonzero(keep & broken)))
        keep &= ~broken
    if not keep.any():
        raise _nothing_left(events, born | died, event_set.counts)

    rows = np.flatnonzero(keep)
    # The time decides the day, so only visit ids need keys of their own.
    ties = (events.visit, events.named) if events.named.any() else ()
    keys = (events.code, *ties, events.time, events.subject)
    rows = rows[np.lexsort([key[rows] for key in keys])]  # [K]
    subject, code = events.subject[rows], events.code[rows]
    visit = _visit_ordinals(subject, events.named[rows], events.visit[rows])  # [K]
    if duplicates == "drop":
        first = np.sort(np.unique(visit * len(events.names) + code, return_index=True)[1])
        event_set.counts.drop("duplicate in visit", len(rows) - len(first))
        rows, subject, code, visit = rows[first], subject[first], code[first], visit[first]

    present, lengths = np.unique(subject, return_counts=True)  # [S]
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    visit -= np.repeat(visit[offsets[:-1]], lengths)  # a subject's first event is of its first visit
    return Selected(
        subject_ids=events.ids[present],
        births=births[present],
        offsets=offsets,
        codes=code,
        times=events.time[rows],
        visits=visit.astype(np.int32),
        names=tuple(events.names),
    )


def _columns(events: pa.Table) -> _Columns:
    subject = events["subject_id"].combine_chunks().dictionary_encode()
    ids, rank = np.unique(subject.dictionary.to_numpy(), return_inverse=True)
    code = events["code"].combine_chunks()
    names, name_rank = np.unique(np.array(code.dictionary.to_pylist(), dtype=object), return_inverse=True)
    time = events["time"].cast(pa.int64())
    micros = time.fill_null(0).to_numpy()
    visit, named = micros // DAY, np.zeros(len(micros), dtype=bool)
    if "visit_id" in events.column_names:
        named = events["visit_id"].is_valid().to_numpy()
        visit = np.where(named, events["visit_id"].fill_null(0).to_numpy(), visit)
    return _Columns(
        ids=ids,
        subject=rank[subject.indices.to_numpy()],
        names=names,
        code=name_rank.astype(np.int32)[code.indices.to_numpy()],
        time=micros,
        timed=time.is_valid().to_numpy(),
        visit=visit,
        named=named,
    )


def _matches(names: np.ndarray, patterns: tuple[str, ...], option: str) -> np.ndarray:
    """Whether any pattern matches at the start of each name: bool ``[names]``."""
    compiled = []
    for pattern in patterns:
        try:
            compiled.append(re.compile(pattern))
        except re.error as error:
            raise InputError(
                f"{option} has {pattern!r}, which is no regular expression ({error}): mend it, or put a "
                "backslash before the sign to take it literally."
            ) from error
    return np.array([any(pattern.match(name) for pattern in compiled) for name in names], dtype=bool)


def _earliest(events: _Columns, marker: np.ndarray) -> np.ndarray:
    """Earliest time of the marked events by subject: int64 ``[subjects]``, ``_NEVER`` where none."""
    first = np.full(len(events.ids), _NEVER)
    marked = marker & events.timed
    np.minimum.at(first, events.subject[marked], events.time[marked])
    return first


def _visit_ordinals(subject: np.ndarray, named: np.ndarray, visit: np.ndarray) -> np.ndarray:
    """Number the visits of all subjects through, in the order of their first events: int64 ``[K]``."""
    # The sort is stable, so that a visit's first event leads its group. Days are in order already.
    order = np.lexsort([visit, named, subject]) if named.any() else np.arange(len(subject))  # [K]
    keys = [key[order] for key in (subject, named, visit)]
    leads = np.ones(len(order), dtype=bool)
    leads[1:] = np.logical_or.reduce([key[1:] != key[:-1] for key in keys])
    ordinal = np.empty(np.count_nonzero(leads), dtype=np.int64)
    ordinal[np.argsort(order[leads])] = np.arange(len(ordinal))
    numbered = np.empty(len(order), dtype=np.int64)
    numbered[order] = ordinal[np.cumsum(leads) - 1]
    return numbered


def _nothing_left(events: _Columns, marker: np.ndarray, counts: EventCounts) -> InputError:
    by_prefix = Counter()
    by_code = np.bincount(events.code[~marker], minlength=len(events.names))
    for name, count in zip(events.names, by_code, strict=True):
        by_prefix[name.split("//")[0]] += int(count)
    prefixes = ", ".join(prefix for prefix, count in by_prefix.most_common(10) if count)
    rules = ", ".join(f"{rule}: {count}" for rule, count in counts.dropped.items())
    return InputError(
        f"No event is left after filtering ({rules}): choose data.codes and data.exclude_codes to fit "
        f"the codes of the data set (most frequent prefixes: {prefixes or 'none'}), and see that "
        f"subjects have a {BIRTH_CODE} event with a time."
    )
