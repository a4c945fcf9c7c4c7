"""What the label makers look at: one split's histories, visits, deaths and ends of follow-up."""

from dataclasses import dataclass

import numpy as np

from behrt_jax.data.places import place_in
from behrt_jax.data.sequences import Sequences
from behrt_jax.data.visits import DAY
from behrt_jax.data.vocabulary import Vocabulary

NEVER = np.iinfo(np.int64).max
"""Time of what does not happen, as far as is known."""


def microseconds(days: float) -> int:
    """Days as times are counted."""
    return int(days * DAY)


@dataclass(frozen=True, eq=False)
class Visits:
    """The visits of one split, each subject's in the order of their first events."""

    subjects: np.ndarray
    """int64 ``[visits]``, places in the split."""
    offsets: np.ndarray
    """int64 ``[subjects + 1]``: subject i has the visits from ``offsets[i]`` to ``offsets[i + 1]``."""
    starts: np.ndarray
    """Time of the first event, int64 ``[visits]``, ascending within a subject."""
    ends: np.ndarray
    """Time of the last event, int64 ``[visits]``."""
    following: np.ndarray
    """int64 ``[visits]``: the first visit that begins after this one has ended; -1 where there is none."""
    others_go_on: np.ndarray
    """bool ``[visits]``: at the end, another visit that began before has not ended."""


def visits_of(part: Sequences, chosen: np.ndarray | None = None) -> Visits:
    """The visits of a split.

    Args:
        part: the histories.
        chosen: bool ``[V]``: only visits with such a code count; all where not given.
    """
    number = visit_numbers(part)
    count = int(number.max(initial=-1)) + 1
    subjects = np.zeros(count, np.int64)
    subjects[number] = np.repeat(np.arange(len(part)), part.lengths)
    starts, ends = np.full(count, NEVER), np.full(count, np.iinfo(np.int64).min)
    np.minimum.at(starts, number, part.times)
    np.maximum.at(ends, number, part.times)
    if chosen is not None:
        kept = np.zeros(count, bool)
        kept[number[chosen[part.codes]]] = True
        subjects, starts, ends = subjects[kept], starts[kept], ends[kept]
    offsets = np.searchsorted(subjects, np.arange(len(part) + 1))
    later = place_in(starts, offsets[subjects], offsets[subjects + 1], ends, inclusive=True)
    # The latest end so far of a subject: ranks ascend from subject to subject, so that one pass does.
    order = np.argsort(ends, kind="stable")
    rank = np.empty(len(ends), np.int64)
    rank[order] = np.arange(len(ends))
    latest = np.maximum.accumulate(subjects * len(ends) + rank)
    latest_end = ends[order[latest % max(len(ends), 1)]]
    return Visits(
        subjects,
        offsets,
        starts,
        ends,
        following=np.where(later < offsets[subjects + 1], later, -1),
        others_go_on=latest_end[later - 1] > ends,
    )


def visit_numbers(part: Sequences) -> np.ndarray:
    """The visit of each token, numbered through all subjects: int64 ``[tokens]``, ascending by subject."""
    if not len(part):
        return np.zeros(0, np.int64)
    per_subject = np.maximum.reduceat(part.visits, part.offsets[:-1]).astype(np.int64) + 1  # [S]
    return np.repeat(np.cumsum(per_subject) - per_subject, part.lengths) + part.visits


@dataclass(frozen=True, eq=False)
class SplitHistory:
    """One split of prepared data."""

    part: Sequences
    """The histories."""
    vocabulary: Vocabulary
    """Of the codes."""
    deaths: np.ndarray
    """int64 ``[subjects]``, microseconds since 1970; ``NEVER`` where none is known."""
    known_until: np.ndarray
    """int64 ``[subjects]``, the end of follow-up: what happens later is not known."""

    @classmethod
    def followed(
        cls, part: Sequences, vocabulary: Vocabulary, deaths: np.ndarray, until: int | None = None
    ) -> "SplitHistory":
        """With follow-up up to death or a time, or, where none is given, up to the last event or death."""
        last = part.times[part.offsets[1:] - 1]
        known_until = np.where(deaths < NEVER, np.maximum(deaths, last), last)
        if until is not None:
            known_until = np.minimum(deaths, until)
        return cls(part, vocabulary, deaths, known_until)

    def events_up_to(self, subjects: np.ndarray, times: np.ndarray) -> np.ndarray:
        """How many events a subject has at or before a time: int64 ``[n]``; places and times ``[n]``."""
        starts, stops = self.part.offsets[subjects], self.part.offsets[subjects + 1]
        return place_in(self.part.times, starts, stops, times, inclusive=True) - starts

    def first_times(self, chosen: np.ndarray) -> np.ndarray:
        """When each subject first has a code of ``chosen``, bool ``[V]``: int64 ``[subjects]``."""
        tokens = np.flatnonzero(chosen[self.part.codes])
        first = np.full(len(self.part), NEVER)
        subjects = np.searchsorted(self.part.offsets, tokens, side="right") - 1
        np.minimum.at(first, subjects, self.part.times[tokens])
        return first
