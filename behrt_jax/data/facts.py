"""Facts that do not change about a subject (sex, race, ethnicity): codes without a time, apart from events.

As recorded they are codes of subjects (:class:`CodedFacts`). A model with ``fact_tokens`` reads them as ids
of its vocabulary (:class:`StaticFacts`), before the first event of each segment.
"""

import hashlib
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import pyarrow as pa

from behrt_jax.data.event_rules import Selected, code_prefix
from behrt_jax.data.events import (
    BIRTH_CODE,
    DEATH_CODE,
    SPLITS,
    EventColumns,
    EventCounts,
    SubjectTimes,
)
from behrt_jax.data.sorting import find_ids, leads, ragged_indices, run_offsets
from behrt_jax.data.vocabulary import UNK, Vocabulary

FACT_VISIT = -1
"""Visit of a fact in a batch: it is in none."""


class FactRuns(NamedTuple):
    """The facts of the subjects of n windows, as runs of ``StaticFacts.codes``."""

    starts: np.ndarray
    """int64 ``[n]``."""
    lengths: np.ndarray
    """int32 ``[n]``."""

    def take(self, chosen: np.ndarray) -> "FactRuns":
        """Those of some windows."""
        return FactRuns(self.starts[chosen], self.lengths[chosen])


@dataclass(frozen=True, eq=False)
class StaticFacts:
    """The facts of subjects, one subject after the other, as a model reads them."""

    offsets: np.ndarray
    """int64 ``[subjects + 1]``: subject i has the facts from ``offsets[i]`` to ``offsets[i + 1]``."""
    codes: np.ndarray
    """int32 ``[facts]``, vocabulary ids."""

    def runs(self, subjects: np.ndarray) -> FactRuns:
        """Those of some subjects, int64 ``[n]``, each as often as it is named."""
        starts = self.offsets[subjects]
        return FactRuns(starts, (self.offsets[subjects + 1] - starts).astype(np.int32))

    def of(self, subjects: np.ndarray) -> "StaticFacts":
        """Those of some subjects alone: int64 ``[n]``, in any order."""
        runs = self.runs(subjects)
        return StaticFacts(run_offsets(runs.lengths), self.codes[ragged_indices(*runs)])

    def followed_by(self, other: "StaticFacts") -> "StaticFacts":
        """These subjects and then the others."""
        offsets = np.append(self.offsets, self.offsets[-1] + other.offsets[1:])
        return StaticFacts(offsets, np.concatenate([self.codes, other.codes]))

    def fingerprint(self) -> str:
        """SHA-256 of the content."""
        columns = (np.ascontiguousarray(column).data for column in (self.offsets, self.codes))
        return hashlib.sha256(b"".join(columns)).hexdigest()


@dataclass(frozen=True, eq=False)
class CodedFacts:
    """Facts as recorded, by subject and code, none twice."""

    subject_ids: np.ndarray
    """int64 ``[facts]``, ascending."""
    codes: np.ndarray
    """int32 ``[facts]``, places in ``names``."""
    names: tuple[str, ...]

    @classmethod
    def of(cls, subject_ids: np.ndarray, codes: pa.Array | pa.ChunkedArray) -> "CodedFacts":
        """Of codes as strings ``[facts]``."""
        if isinstance(codes, pa.ChunkedArray):
            codes = codes.combine_chunks()
        coded = codes.dictionary_encode()
        return cls(subject_ids, coded.indices.to_numpy(), tuple(coded.dictionary.to_pylist()))

    def counts(self, subject_ids: np.ndarray) -> dict[str, int]:
        """Code -> how many of some subjects, int64 ``[n]`` ascending, have it."""
        of_them = find_ids(subject_ids, self.subject_ids) >= 0
        found = np.bincount(self.codes[of_them], minlength=len(self.names)).tolist()
        return {name: count for name, count in zip(self.names, found, strict=True) if count}

    def subjects_with_several(self) -> int:
        """Subjects that have several values of one fact, such as two codes GENDER//: all of them are kept."""
        prefixes = [code_prefix(name) for name in self.names]
        place = {prefix: number for number, prefix in enumerate(dict.fromkeys(prefixes))}
        of_code = np.array([place[prefix] for prefix in prefixes], np.int64)
        pairs = self.subject_ids, of_code[self.codes]
        order = np.lexsort(pairs[::-1])
        again = ~leads([column[order] for column in pairs]) if len(order) else np.zeros(0, bool)
        return len(np.unique(self.subject_ids[order][again]))

    def encoded(self, subject_ids: np.ndarray, vocabulary: Vocabulary) -> StaticFacts:
        """Those of some subjects, int64 ``[subjects]`` ascending, in ids; without a row they are [UNK]."""
        place = find_ids(subject_ids, self.subject_ids)
        ids = vocabulary.encode(self.names)[self.codes[place >= 0]]
        counts = np.bincount(place[place >= 0], minlength=len(subject_ids))
        return StaticFacts(run_offsets(counts), ids)


@dataclass(frozen=True, eq=False)
class FactTable:
    """The facts of a data set, read when a model asks for them."""

    read: Callable[[], Mapping[str, CodedFacts]]
    """By split."""
    rows: Callable[[], Sequence[str]]
    """Codes of facts that get a row of the vocabulary where no event has given them one."""


def fact_rows(counts: Mapping[str, int], min_count: int) -> tuple[str, ...]:
    """The facts that get a row: those of ``min_count`` train subjects or more, the most frequent first.

    ``counts`` is code -> train subjects with events that have it.
    """
    enough = (code for code, count in counts.items() if count >= min_count)
    return tuple(sorted(enough, key=lambda code: (-counts[code], code)))


def without_row(counts: Mapping[str, int], vocabulary: Vocabulary, rows: Sequence[str]) -> int:
    """How many facts, code -> subjects, are read as [UNK]."""
    ids = vocabulary.encode(list(counts))
    known = set(rows)
    unknown = (code for code, row in zip(counts, ids.tolist(), strict=True) if row == UNK)
    return sum(counts[code] for code in unknown if code not in known)


# From the events of a source to what is known of its subjects.


@dataclass(frozen=True, eq=False)
class SubjectFacts:
    """What is known of some subjects, ascending, beside their events."""

    static: CodedFacts
    deaths: SubjectTimes
    births: SubjectTimes
    """Of those without any event left."""


FACT_WITH_TIME = "fact with a time"


def subject_facts(
    events: EventColumns,
    static: np.ndarray,
    selected: Selected,
    split_of: Callable[[np.ndarray], np.ndarray],
    tokens: np.ndarray,
    counts: EventCounts,
) -> dict[str, SubjectFacts]:
    """Split -> what is known of its subjects.

    A code at another time than that of birth is no fact, however static it is meant to be: where it is not
    selected as an event either, it is counted as ``fact with a time``. Birth and death themselves are none:
    a fact is known all along.

    Args:
        events: all events of whole subjects.
        static: bool ``[names]``, codes that are static facts where they have no time, or that of birth.
        selected: what the rules made of them.
        split_of: from subject ids, ascending, to the places of their splits in `events.SPLITS`.
        tokens: bool ``[names]``, codes that are selected as events.
        counts: of the rules.
    """
    static = static & np.array([name not in (BIRTH_CODE, DEATH_CODE) for name in events.names], bool)
    rows = np.flatnonzero(static[events.codes])
    without = np.zeros(len(rows), bool) if events.timed is None else ~events.timed[rows]
    at_birth = np.zeros(len(rows), bool)
    for ids, times in ((selected.subject_ids, selected.births), vars(selected.without_events).values()):
        place = find_ids(ids, events.subject_ids[rows])
        known = place >= 0
        at_birth[known] = events.times[rows[known]] == times[place[known]]
    timed = int(np.count_nonzero(~without & ~at_birth & ~tokens[events.codes[rows]]))
    counts.move("code not selected", FACT_WITH_TIME, timed)
    rows = rows[without | at_birth]
    facts = np.unique(np.stack([events.subject_ids[rows], events.codes[rows]]), axis=1)  # [2, facts]
    used, codes = np.unique(facts[1], return_inverse=True)
    names = tuple(events.names[int(code)] for code in used)
    births, deaths = selected.without_events, selected.deaths
    split, split_of_dead, split_of_births = map(split_of, (facts[0], deaths.subject_ids, births.subject_ids))
    return {
        name: SubjectFacts(
            CodedFacts(facts[0][split == index], codes[split == index].astype(np.int32), names),
            deaths.of(split_of_dead == index),
            births.of(split_of_births == index),
        )
        for index, name in enumerate(SPLITS)
    }


class FactCounts:
    """Facts of one split, counted part by part, subjects ascending."""

    def __init__(self):
        self.subjects = 0
        """Subjects with any."""
        self.several = 0
        """See `CodedFacts.subjects_with_several`."""
        self.by_code: Counter[str] = Counter()
        """Code -> subjects."""
        self.with_events: Counter[str] = Counter()
        """Code -> subjects with events."""

    def add(self, facts: CodedFacts, with_events: np.ndarray) -> None:
        """Count the facts of further subjects; of them, int64 ``[n]`` ascending have events."""
        subjects = np.unique(facts.subject_ids)
        self.subjects += len(subjects)
        self.several += facts.subjects_with_several()
        self.by_code.update(facts.counts(subjects))
        self.with_events.update(facts.counts(with_events))
