"""Labels made of prepared data at the ends of visits: death, first occurrence, readmission, the next visit.

A split's visits, deaths and follow-up are found first; the ends of its visits are the candidates for
prediction times, from which rule after rule leaves some out, each counted; what is left gets its label.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa

from behrt_jax.config.data import MakeLabelsConfig
from behrt_jax.data.events import DAY
from behrt_jax.data.labels import Labels
from behrt_jax.data.sequences import Sequences
from behrt_jax.data.sorting import find_ids, place_in
from behrt_jax.data.splits import hash_words
from behrt_jax.data.vocabulary import SPECIAL_TOKENS, Vocabulary, matching_codes

NEVER = np.iinfo(np.int64).max
"""Time of what does not happen, as far as is known."""


def microseconds(days: float) -> int:
    """Days as times are counted."""
    return int(days * DAY)


@dataclass(frozen=True, eq=False)
class SplitVisits:
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


def visits_of(part: Sequences, chosen: np.ndarray | None = None) -> SplitVisits:
    """The visits of a split; with ``chosen``, bool ``[V]``, only those with such a code count."""
    number = part.numbered_visits()
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
    return SplitVisits(
        subjects,
        offsets,
        starts,
        ends,
        following=np.where(later < offsets[subjects + 1], later, -1),
        others_go_on=latest_end[later - 1] > ends,
    )


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
    index: Labels | None = None
    """Subjects and prediction times, of this split and of others, in place of the ends of visits."""

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

    def candidates(self, visits: SplitVisits) -> "Candidates":
        """The ends of visits, or the index dates where there are any, by subject and time."""
        if self.index is None:
            return Candidates(visits.subjects, visits.ends)
        place = find_ids(self.part.subject_ids, self.index.subject_ids)
        order = np.lexsort([self.index.times, place])
        order = order[place[order] >= 0]
        return Candidates(place[order], self.index.times[order])

    def events_up_to(self, subjects: np.ndarray, times: np.ndarray) -> np.ndarray:
        """Number of a subject's events at or before a time: int64 ``[n]``, of places and times ``[n]``."""
        starts, stops = self.part.offsets[subjects], self.part.offsets[subjects + 1]
        return place_in(self.part.times, starts, stops, times, inclusive=True) - starts

    def first_times(self, chosen: np.ndarray) -> np.ndarray:
        """Time at which each subject first has a code of ``chosen``, bool ``[V]``: int64 ``[subjects]``."""
        tokens = np.flatnonzero(chosen[self.part.codes])
        first = np.full(len(self.part), NEVER)
        subjects = np.searchsorted(self.part.offsets, tokens, side="right") - 1
        np.minimum.at(first, subjects, self.part.times[tokens])
        return first


# The times at which a subject is labelled: the candidates that are left, and why the others are not.


@dataclass(frozen=True, eq=False)
class MadeLabels:
    """The labels of one split, with an account of all candidates."""

    subject_ids: np.ndarray
    """int64 ``[labels]``."""
    times: np.ndarray
    """Prediction times, int64 ``[labels]``, microseconds since 1970."""
    values: Mapping[str, pa.Array]
    """Column of the label table -> ``[labels]``."""
    counts: Mapping[str, int]
    """``candidates`` (ends of visits) equals ``labels`` and all that begins with ``left out``."""


def _draw(subject_ids: np.ndarray, seed: int, count: np.ndarray) -> np.ndarray:
    """A number below ``count``, int64 ``[n]``, for each subject, int64 ``[n]``, by a hash of seed and id."""
    words = hash_words(subject_ids).view(np.int64) ^ np.int64(seed)
    return (hash_words(words) % count.astype(np.uint64)).astype(np.int64)


@dataclass(eq=False)
class Candidates:
    """The ends of visits, from which rule after rule leaves some out."""

    subjects: np.ndarray
    """int64 ``[candidates]``, places in the split, ascending."""
    times: np.ndarray
    """int64 ``[candidates]``."""
    left: np.ndarray = field(init=False)
    """bool ``[candidates]``: no rule has left it out so far."""
    counts: dict[str, int] = field(init=False)

    def __post_init__(self):
        self.left = np.ones(len(self.subjects), bool)
        self.counts = {"candidates": len(self.subjects)}

    def leave_out(self, why: str, rows: np.ndarray) -> None:
        """Leave out those of ``rows``, bool ``[candidates]``, that are left, and count them."""
        gone = rows & self.left
        self.left &= ~gone
        if count := int(np.count_nonzero(gone)):
            self.counts[f"left out: {why}"] = count

    def _in_order(self) -> np.ndarray:
        """Places of those left, by subject and time."""
        rows = np.flatnonzero(self.left)
        return rows[np.lexsort([self.times[rows], self.subjects[rows]])]

    def leave_out_short(self, history: SplitHistory, least: int) -> None:
        """Leave out those with fewer than ``least`` events up to the prediction time, and a time again."""
        events = history.events_up_to(self.subjects, self.times)
        self.leave_out(f"fewer than {least} events of history", events < least)
        rows = self._in_order()
        same = (np.diff(self.subjects[rows]) == 0) & (np.diff(self.times[rows]) == 0)
        again = np.zeros(len(self.times), bool)
        again[rows[1:][same]] = True
        self.leave_out("another visit ends at the same time", again)

    def choose(
        self,
        history: SplitHistory,
        config: MakeLabelsConfig,
        room: np.ndarray | None = None,
        positive: np.ndarray | None = None,
    ) -> None:
        """Keep all, or one of each subject: the last, or one drawn by a hash of seed and subject.

        The last is taken from ``room``, bool ``[candidates]``, whatever the outcome; from all that are left
        where it is not given. With index dates drawn, the one of a subject with any ``positive``, bool
        ``[candidates]``, is drawn from these, and that of any other is the last one at or before a time
        drawn from those of the positive.
        """
        if config.index == "positives" and positive is not None:
            self._match(history, config.seed, positive)
        if config.times == "all":
            return
        if config.times == "last" and room is not None:
            self.leave_out("follow-up ends before the horizon does", ~room)
        rows = self._in_order()
        own, first, count = np.unique(self.subjects[rows], return_index=True, return_counts=True)
        place = count - 1
        if config.times == "random":
            place = _draw(history.part.subject_ids[own], config.seed, count)
        other = self.left.copy()
        other[rows[first + place]] = False
        self.leave_out("not the one that is chosen of the subject", other)

    def _match(self, history: SplitHistory, seed: int, positive: np.ndarray) -> None:
        rows = self._in_order()
        rows = rows[np.argsort(~positive[rows], kind="stable")]  # the positive first, each still in order
        cases = rows[positive[rows]]
        own, first, count = np.unique(self.subjects[cases], return_index=True, return_counts=True)
        drawn = cases[first + _draw(history.part.subject_ids[own], seed, count)]
        chosen = np.zeros(len(self.left), bool)
        chosen[drawn] = True
        dates = np.sort(self.times[drawn])
        others = rows[~np.isin(self.subjects[rows], own)]
        own, first, count = np.unique(self.subjects[others], return_index=True, return_counts=True)
        if len(dates):
            place = _draw(history.part.subject_ids[own], seed, np.full(len(own), len(dates)))
            found = place_in(self.times[others], first, first + count, dates[place], inclusive=True) - 1
            chosen[others[found[found >= first]]] = True
            early = np.isin(self.subjects, own[found < first])
            self.leave_out("no end of a visit up to the index date that was drawn", early)
        self.leave_out("not the one that is chosen of the subject", self.left & ~chosen)

    def labelled(self, history: SplitHistory, values: Mapping[str, pa.Array], **counts: int) -> MadeLabels:
        """The candidates that are left, with values of each; ``counts`` are added to the account."""
        labels = int(np.count_nonzero(self.left))
        return MadeLabels(
            history.part.subject_ids[self.subjects[self.left]],
            self.times[self.left],
            values,
            self.counts | {"labels": labels} | counts,
        )


# Whether something happens within a horizon, or when.


def label_event(
    candidates: Candidates,
    history: SplitHistory,
    config: MakeLabelsConfig,
    happens: np.ndarray,
    known_until: np.ndarray,
    death_ends: bool = True,
) -> MadeLabels:
    """Survival labels with ``config.survival``, else boolean ones.

    Survival labels are days from the prediction time until it happens, or until it is not known any more, up
    to the end of the horizon; without ``horizon_days`` all of the follow-up counts. Boolean ones say whether
    it happens after the gap and within the horizon that follows it; left out and counted are candidates
    without an answer: death comes first, or what happens is not known up to the end of the horizon. In both,
    candidates where it happens in the gap are left out.

    Args:
        candidates: all of whom can still have it.
        history: the split.
        config: ``horizon_days`` (given for boolean labels) and ``gap_days`` are read.
        happens: int64 ``[candidates]``, after the prediction time; `NEVER` where it does not.
        known_until: int64 ``[candidates]``.
        death_ends: whether a death within the horizon leaves the question of boolean labels open.
    """
    begin = candidates.times + microseconds(config.gap_days)
    end = np.full(len(begin), NEVER)
    if config.horizon_days is not None:
        end = begin + microseconds(config.horizon_days)
    room = known_until >= end
    candidates.leave_out("it happens in the gap", happens <= begin)
    if not config.survival:
        positive = happens <= end
        if death_ends:
            died = ~positive & (history.deaths[candidates.subjects] <= end)
            candidates.leave_out("death before the end of the horizon", died)
        if config.times != "last":
            candidates.leave_out("follow-up ends before the horizon does", ~positive & ~room)
        candidates.choose(history, config, room, positive)
        chosen = positive[candidates.left]
        return candidates.labelled(history, {"boolean_value": pa.array(chosen)}, positive=int(chosen.sum()))
    candidates.leave_out("follow-up ends before the gap does", (happens == NEVER) & (known_until <= begin))
    seen = (happens <= end) & (happens < NEVER)
    candidates.choose(history, config, room, seen)
    until = np.minimum(np.where(happens < NEVER, happens, known_until), end)
    left = candidates.left
    values = {
        "boolean_value": pa.array(seen[left]),
        "float_value": pa.array(((until - candidates.times)[left] / DAY).astype(np.float32)),  # of the schema
    }
    events = int(seen[left].sum())
    return candidates.labelled(history, values, positive=events, censored=int(left.sum()) - events)


# The tasks.


def label_death(history: SplitHistory, config: MakeLabelsConfig) -> MadeLabels:
    """Death, within a horizon or when.

    Deaths are those of MEDS_DEATH, at their time in the source, which is often the day alone: a prediction
    later on that day is after death. Who has no death lives up to the end of follow-up.
    """
    candidates = history.candidates(visits_of(history.part))
    happens = history.deaths[candidates.subjects]
    candidates.leave_out("the subject has died", happens <= candidates.times)
    candidates.leave_out_short(history, config.min_events)
    known_until = np.where(happens < NEVER, NEVER, history.known_until[candidates.subjects])
    return label_event(candidates, history, config, happens, known_until, death_ends=False)


def label_first_occurrence(history: SplitHistory, config: MakeLabelsConfig) -> MadeLabels:
    """First occurrence of a set of codes, for subjects who have had none of them so far.

    [UNK], which may stand for any code, is none of the set. Follow-up ends with a subject's last event or
    death: death before the end of the horizon is no answer (a competing event), nor is silence.
    """
    first = history.first_times(matching_codes(history.vocabulary, config.codes, "--codes"))
    candidates = history.candidates(visits_of(history.part))
    happens = first[candidates.subjects]
    candidates.leave_out("it has happened already", happens <= candidates.times)
    candidates.leave_out("the subject has died", history.deaths[candidates.subjects] <= candidates.times)
    candidates.leave_out_short(history, config.min_events)
    return label_event(candidates, history, config, happens, history.known_until[candidates.subjects])


def label_next_visit(history: SplitHistory, config: MakeLabelsConfig) -> MadeLabels:
    """Sets of codes: those of the first visit that begins later.

    They are codes of the vocabulary, or of ``config.codes``; [UNK] is none. A set may be empty.
    """
    part, visits = history.part, visits_of(history.part)
    wanted = np.arange(len(history.vocabulary)) >= len(SPECIAL_TOKENS)
    if config.codes:
        wanted = matching_codes(history.vocabulary, config.codes, "--codes")
    candidates = Candidates(visits.subjects, visits.ends)
    candidates.leave_out("no visit begins later", visits.following < 0)
    candidates.leave_out("another visit goes on", visits.others_go_on)
    candidates.leave_out_short(history, config.min_events)
    candidates.choose(history, config)

    # Codes of each visit, as pairs of visit and code, once each and ascending by visit.
    tokens = np.flatnonzero(wanted[part.codes])
    pairs = np.unique(part.numbered_visits()[tokens] * len(history.vocabulary) + part.codes[tokens])
    visit, code = np.divmod(pairs, len(history.vocabulary))
    asked = visits.following[candidates.left]
    starts, stops = np.searchsorted(visit, asked), np.searchsorted(visit, asked, side="right")
    names = np.array(history.vocabulary.codes, object)
    sets = [sorted(names[code[start:stop]]) for start, stop in zip(starts, stops, strict=True)]
    values = {"categorical_values": pa.array(sets, pa.list_(pa.string()))}
    empty = int(np.count_nonzero(starts == stops))
    return candidates.labelled(history, values, without_code=empty, codes=int((stops - starts).sum()))


def label_readmission(history: SplitHistory, config: MakeLabelsConfig) -> MadeLabels:
    """Another visit that begins after the end of this one.

    Visits are those of the prepared data, with ``config.codes`` only those that have such a code. A death on
    the day on which a visit ends, or before, leaves nobody to be readmitted; a later one that comes before a
    readmission and within the horizon is no answer.
    """
    chosen = matching_codes(history.vocabulary, config.codes, "--codes") if config.codes else None
    visits = visits_of(history.part, chosen)
    candidates = Candidates(visits.subjects, visits.ends)
    following = np.append(visits.starts, NEVER)[visits.following]
    deaths = history.deaths[visits.subjects]
    candidates.leave_out("another visit goes on", visits.others_go_on)
    candidates.leave_out("death in the visit, or on the day of its end", deaths // DAY <= visits.ends // DAY)
    candidates.leave_out_short(history, config.min_events)
    return label_event(candidates, history, config, following, history.known_until[visits.subjects])
