"""Histories by hand or drawn at random, as sequences; and what is known of them, by slow loops."""

from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from behrt_jax.data.events import DAY, SPLITS, YEAR, EventCounts, SubjectTimes
from behrt_jax.data.examples import parse_delay
from behrt_jax.data.labels import Labels
from behrt_jax.data.sequences import Sequences, SequenceSet
from behrt_jax.data.vocabulary import SPECIAL_TOKENS, UNK, Vocabulary

CODES = ("A//1", "A//2", "B//1", "B//2")


class Event(NamedTuple):
    """``time`` in microseconds; the code's name, [UNK] too; visits are told apart by any number."""

    time: int
    code: str
    visit: int


def sequence_set(
    splits: Mapping[str, Mapping[int, Iterable[Event]]],
    births: Mapping[int, int] | None = None,
    codes: Sequence[str] = CODES,
) -> SequenceSet:
    """Split -> subject -> events in any order, or none; born at 0 where not said."""
    names = (*SPECIAL_TOKENS, *codes)
    vocabulary = Vocabulary(names, np.zeros(len(names), np.int64), (None,) * len(names))
    births = births or {}
    parts = {name: _part(splits.get(name, {}), births, names) for name in SPLITS}
    alone = {name: _births(splits.get(name, {}), births) for name in SPLITS}
    return SequenceSet(vocabulary, parts, EventCounts(), "", births=alone)


def _births(subjects: Mapping[int, Iterable[Event]], births: Mapping[int, int]) -> SubjectTimes:
    ids = sorted(subject for subject, events in subjects.items() if not [*events])
    times = [births.get(subject, 0) for subject in ids]
    return SubjectTimes(np.array(ids, np.int64), np.array(times, np.int64))


def _part(
    subjects: Mapping[int, Iterable[Event]], births: Mapping[int, int], names: Sequence[str]
) -> Sequences:
    rows, ages, lengths = [], [], []
    subjects = {subject: listed for subject, events in subjects.items() if (listed := [*events])}
    for subject, events in sorted(subjects.items()):
        events = sorted(events)
        number: dict[int, int] = {}
        for event in events:
            rows.append((event.time, names.index(event.code), number.setdefault(event.visit, len(number))))
            ages.append((event.time - births.get(subject, 0)) / YEAR)
        lengths.append(len(events))
    columns = np.array(rows, np.int64).reshape(-1, 3).T
    return Sequences(
        subject_ids=np.array(sorted(subjects), np.int64),
        offsets=np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
        codes=columns[1].astype(np.int32),
        ages=np.array(ages, np.float32),
        visits=columns[2].astype(np.int32),
        times=columns[0].copy(),
    )


def labels_at(pairs: Sequence[tuple[int, int]]) -> Labels:
    """Labels that are all true, of (subject, time)."""
    columns = np.array(pairs, np.int64).reshape(-1, 2).T
    return Labels(columns[0].copy(), columns[1].copy(), np.ones(len(pairs), bool), "boolean")


def known_at(event: Event, events: Iterable[Event], delays: Sequence[str]) -> int:
    """When it is known; patterns are beginnings of codes here."""
    known = event.time
    for pattern, days in map(parse_delay, delays):
        if event.code.startswith(pattern) or event.code == SPECIAL_TOKENS[UNK]:
            visit = [other.time for other in events if other.visit == event.visit]
            known = max(known, max(visit) if days is None else event.time + int(days * DAY))
    return known
