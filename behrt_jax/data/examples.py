"""Histories up to the prediction times of labels: what a model may see of a subject, and nothing later.

A token is known at its time, or later where its code has a delay; one that is known at the prediction time
itself is in. Nothing that lies later changes an example, but whether a visit of a code with the delay
``visit`` has ended by then. A subject without any event is as one whose first event comes later.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal, NamedTuple

import numpy as np

from behrt_jax.data.event_rules import number_visits
from behrt_jax.data.events import DAY, YEAR, SubjectTimes
from behrt_jax.data.facts import FactRuns
from behrt_jax.data.labels import Labels
from behrt_jax.data.packing import Windows, room_beside
from behrt_jax.data.sequences import Sequences, SequenceSet, with_separators
from behrt_jax.data.sorting import find_ids, leads, place_in, ragged_indices, run_offsets, runs
from behrt_jax.data.vocabulary import UNK, Vocabulary, matching_codes
from behrt_jax.errors import InputError

OutsideLife = Literal["leave_out", "keep"] | None
_HOUR = DAY // 24
_PIECE_TOKENS = 1 << 22  # looked at together


@dataclass(frozen=True, eq=False)
class Examples:
    """Histories up to prediction times: one example a label, in the order of the label table."""

    sequences: Sequences
    """The tokens of `windows`: the split itself where nothing has to be hidden, else what the examples see
    and no more, with each example as a subject of its own (its id may repeat, in any order)."""
    windows: Windows
    """``[examples]``, 1 token or more: the most recent tokens known at the prediction time."""
    rows: np.ndarray
    """int64 ``[examples]``, row of each in the labels."""
    subject_ids: np.ndarray
    """int64 ``[examples]``."""
    times: np.ndarray
    """Prediction times, int64 ``[examples]``, microseconds since 1970."""
    ages: np.ndarray
    """float32 ``[examples]``, years at the prediction time."""
    empty: np.ndarray
    """bool ``[examples]``: nothing is known yet. Read as one [UNK] token with the age at the prediction time,
    visit 0."""
    unknown_subjects: int
    """Labels whose subject is in no split of the data; they are left out."""
    outside_life: Mapping[str, int] = field(default_factory=dict)
    """Labels of the split that are left out as before birth or after death, by which it is."""

    def __len__(self) -> int:
        return len(self.rows)

    def of_some_subjects(self, share: float, seed: int) -> "Examples":
        """The examples of a share of the subjects, of one at least, drawn by the seed."""
        subjects = np.unique(self.subject_ids)
        chosen = np.random.default_rng(seed).permutation(subjects)[: max(1, round(share * len(subjects)))]
        return self.take(np.isin(self.subject_ids, chosen))

    def take(self, kept: np.ndarray) -> "Examples":
        """Some of the examples, by a bool ``[examples]``."""
        return replace(
            self,
            windows=self.windows.take(kept),
            rows=self.rows[kept],
            subject_ids=self.subject_ids[kept],
            times=self.times[kept],
            ages=self.ages[kept],
            empty=self.empty[kept],
        )


def find_examples(
    data: SequenceSet,
    split: str,
    labels: Labels,
    *,
    max_tokens: int,
    delays: Sequence[str] = (),
    sep_token: bool = False,
    outside_life: OutsideLife = None,
) -> Examples:
    """Cut the histories of a split's subjects at the prediction times of their labels.

    Where a delay hides a token, a history is empty or separators are put in, what the examples see is copied,
    at most ``max_tokens`` each: give labels in parts where that is too much.

    Args:
        data: opened without separators.
        split: whose subjects; labels of other splits are passed over.
        labels: in any order.
        max_tokens: longest example, in tokens, separators and, where the data have them, facts included.
        delays: ``REGEX=DAYS`` or ``REGEX=visit``; see `code_delays`.
        sep_token: put a [SEP] after each run of known events of one visit.
        outside_life: labels at a time before birth, or on a day after the death that the data have: leave
            them out, or keep them (before birth at age 0). By default those after death are left out, and one
            before birth is an error, since the clocks do not agree then.

    Raises:
        InputError: no such split, no room for a token, a delay of another form, or prediction times before
            birth.
    """
    if split not in data.splits:
        raise InputError(f"There is no split {split!r}: choose one of {', '.join(data.splits)}.")
    code_delay = code_delays(data.vocabulary, delays)
    part, born = data.splits[split], data.births[split]
    if len(born):  # after the others, with no token each
        offsets = np.pad(part.offsets, (0, len(born)), "edge")
        facts = part.facts and part.facts.followed_by(data.facts_without_events[split])
        part = replace(part, subject_ids=data.subject_ids(split), offsets=offsets, facts=facts)
    place = find_ids(part.subject_ids, labels.subject_ids)
    rows = np.flatnonzero(place >= 0)
    subjects, times = place[rows], labels.times[rows]
    births, with_events = np.empty(len(rows), np.float64), subjects < len(data.splits[split])
    births[with_events] = part.births(subjects[with_events])
    births[~with_events] = born.times[subjects[~with_events] - len(data.splits[split])]
    early = times < births - DAY  # ages are rounded to minutes
    if outside_life is None and early.any():
        raise InputError(
            f"{np.count_nonzero(early):,} of {len(rows):,} labels of {split} have a prediction time before "
            "the subject's birth: mend the prediction times (another unit, clock or subject?), or leave "
            "these labels out with outside_life leave_out."
        )
    left_out = {}
    if outside_life != "keep":
        late = _after_death(data.deaths[split], labels.subject_ids[rows], times)
        left_out = {"before_birth": int(early.sum()), "after_death": int(late.sum())}
        kept = ~(early | late)
        rows, subjects, times, births = rows[kept], subjects[kept], times[kept], births[kept]

    facts = None if part.facts is None else part.facts.runs(subjects)
    room = room_beside(facts, max_tokens)  # [examples], or the same for all
    starts, stops = part.offsets[subjects], part.offsets[subjects + 1]
    up_to = place_in(part.times, starts, stops, times, inclusive=True)
    begins = np.maximum(starts, up_to - room)
    lengths = up_to - begins
    pieces = list(known_where_hidden(part, code_delay, Cuts(subjects, times, up_to), room))
    for known in pieces:
        lengths[known.examples] = known.lengths
    empty = lengths == 0
    sequences, windows = data.splits[split], Windows(begins, lengths.astype(np.int32), facts)
    if pieces or sep_token or empty.any():
        ids = labels.subject_ids[rows]
        sequences = _copied(part, ids, times, begins, lengths, pieces)
        windows = Windows(sequences.offsets[:-1], np.maximum(lengths, 1).astype(np.int32), facts)
    ages = np.where(empty, 0.0, _ages_at(times, sequences, windows))
    # Of births, which are whole hours, any token of the subject tells the same.
    ages[empty] = (times - np.round(births / _HOUR) * _HOUR)[empty] / YEAR
    ages = np.maximum(ages, 0).astype(np.float32)
    if empty.any():
        sequences.ages[windows.starts[empty]] = ages[empty]
    if sep_token:
        sequences, windows = _separated(sequences, empty, room, facts)
    return Examples(
        # Runs of facts are of the subjects of the split, whose tokens may have been copied.
        sequences if part.facts is None else replace(sequences, facts=part.facts),
        windows,
        rows=rows,
        subject_ids=labels.subject_ids[rows],
        times=times,
        ages=ages,
        empty=empty,
        unknown_subjects=of_unknown_subjects(data, labels),
        outside_life=left_out,
    )


def _after_death(deaths: SubjectTimes, subject_ids: np.ndarray, times: np.ndarray) -> np.ndarray:
    """On a day after the subject's death: bool ``[n]``."""
    place = find_ids(deaths.subject_ids, subject_ids)
    late = place >= 0
    late[late] = times[late] // DAY > deaths.times[place[late]] // DAY
    return late


def _ages_at(times: np.ndarray, sequences: Sequences, windows: Windows) -> np.ndarray:
    """Age at the prediction time by that at the last known token: float64 ``[examples]``, years."""
    last = windows.starts + windows.lengths - 1
    return sequences.ages[last].astype(np.float64) + (times - sequences.times[last]) / YEAR


def _copied(
    part: Sequences,
    subject_ids: np.ndarray,
    times: np.ndarray,
    begins: np.ndarray,
    lengths: np.ndarray,
    pieces: Sequence["Known"],
) -> Sequences:
    """The tokens of each example; one [UNK] where it has none, whose age is to be filled in."""
    offsets = run_offsets(np.maximum(lengths, 1))
    tokens = np.zeros(offsets[-1], np.int64)  # places in the split
    known = ragged_indices(offsets[:-1], lengths)
    tokens[known] = ragged_indices(begins, lengths)
    copies = [ragged_indices(offsets[piece.examples], piece.lengths) for piece in pieces]
    for copied, piece in zip(copies, pieces, strict=True):
        tokens[copied] = piece.tokens
    places, columns = tokens[known], {}
    for name in ("codes", "ages", "visits", "times"):
        column = getattr(part, name)
        columns[name] = np.zeros(len(tokens), column.dtype)
        columns[name][known] = column[places]
    for copied, piece in zip(copies, pieces, strict=True):
        columns["visits"][copied] = piece.visits
    empty = lengths == 0
    alone = offsets[:-1][empty]
    columns["codes"][alone], columns["times"][alone] = UNK, times[empty]
    return Sequences(subject_ids=subject_ids, offsets=offsets, **columns)


def _separated(
    sequences: Sequences, empty: np.ndarray, room: np.ndarray | int, facts: FactRuns | None
) -> tuple[Sequences, Windows]:
    sequences = with_separators(sequences)
    lengths = np.minimum(sequences.lengths, room)
    starts = sequences.offsets[1:] - lengths
    # Nothing was known, so there is no visit to close.
    starts[empty], lengths[empty] = sequences.offsets[:-1][empty], 1
    return sequences, Windows(starts, lengths.astype(np.int32), facts)


def of_unknown_subjects(data: SequenceSet, labels: Labels) -> int:
    """Number of labels of subjects that no split of the data has."""
    known = np.concatenate([data.subject_ids(name) for name in data.splits])
    return int(np.count_nonzero(~np.isin(labels.subject_ids, known)))


# Delays: some codes are known only days after their time, or at the end of their visit.


def parse_delay(option: str) -> tuple[str, float | None]:
    """Pattern and days of ``REGEX=DAYS``; None for ``REGEX=visit``.

    Raises:
        InputError: it has another form, or the days are negative or no number.
    """
    pattern, _, delay = option.rpartition("=")
    try:
        days = None if delay == "visit" else float(delay)
    except ValueError:
        days = -1.0
    if not pattern or (days is not None and not 0 <= days < 1e6):
        raise InputError(f"--delays has {option!r}: write REGEX=DAYS, such as DIAGNOSIS//=2, or REGEX=visit.")
    return pattern, days


@dataclass(frozen=True, eq=False)
class CodeDelays:
    """The delays of every row of a vocabulary."""

    micros: np.ndarray
    """int64 ``[V]``: how long after its time a token is known."""
    by_visit: np.ndarray
    """bool ``[V]``: it is not known before its visit has ended either."""

    @property
    def delayed(self) -> np.ndarray:
        """Bool ``[V]``: known later than at its time."""
        return self.by_visit | (self.micros > 0)

    def known_at(self, part: Sequences, subjects: np.ndarray) -> np.ndarray:
        """Tell when each token of some subjects, int64 ``[subjects]`` distinct places, is known.

        Returns:
            int64 ``[tokens of these subjects, one after the other]``, microseconds since 1970.
        """
        lengths = part.lengths[subjects]
        tokens = ragged_indices(part.offsets[subjects], lengths)
        times, codes = part.times[tokens], part.codes[tokens]
        known_at = times + self.micros[codes]
        waits = self.by_visit[codes]
        if not waits.any():
            return known_at
        # Visits are numbered from 0 for each subject, so that a subject has no more of them than tokens.
        visit = np.repeat(np.cumsum(lengths) - lengths, lengths) + part.visits[tokens]
        ends = np.full(len(tokens), np.iinfo(np.int64).min)
        np.maximum.at(ends, visit, times)
        return np.where(waits, np.maximum(known_at, ends[visit]), known_at)


def code_delays(vocabulary: Vocabulary, options: Sequence[str]) -> CodeDelays:
    """The delay of each code, from options ``REGEX=DAYS`` or ``REGEX=visit``.

    A pattern matches at the start of a code. Where several match, the latest counts. [UNK] may stand for
    any code, so that it waits for all of them.

    Raises:
        InputError: an option has another form.
    """
    micros, by_visit = np.zeros(len(vocabulary), np.int64), np.zeros(len(vocabulary), bool)
    for option in options:
        pattern, days = parse_delay(option)
        chosen = matching_codes(vocabulary, (pattern,), "--delays")
        chosen[UNK] = True
        if days is None:
            by_visit |= chosen
        else:
            micros[chosen] = np.maximum(micros[chosen], int(days * DAY))
    return CodeDelays(micros, by_visit)


# The tokens that are left where a delay hides others.


class Cuts(NamedTuple):
    """The ends of the histories of examples."""

    subjects: np.ndarray
    """int64 ``[examples]``, places in the split."""
    times: np.ndarray
    """Prediction times, int64 ``[examples]``."""
    up_to: np.ndarray
    """One after the last token at or before that time, int64 ``[examples]``."""

    def take(self, chosen: np.ndarray) -> "Cuts":
        """Some of them, by place."""
        return Cuts(*(column[chosen] for column in self))


class Known(NamedTuple):
    """The tokens that are known of some examples, one example after the other."""

    examples: np.ndarray
    """int64 ``[n]``, which examples."""
    lengths: np.ndarray
    """int64 ``[n]``, tokens of each."""
    tokens: np.ndarray
    """int64 ``[tokens]``, places in the split."""
    visits: np.ndarray
    """int32 ``[tokens]``."""


def known_where_hidden(
    part: Sequences, delays: CodeDelays, cuts: Cuts, room: np.ndarray | int
) -> Iterator[Known]:
    """The last known tokens, ``room`` at most (int64 ``[examples]``, or the same for all), of those examples
    from which a delay hides some token.

    Visits are numbered anew, in the order of their first known tokens: a number that is skipped would tell
    that there is something hidden.
    """
    if not delays.delayed.any() or not len(cuts.subjects):
        return
    order = np.argsort(cuts.subjects, kind="stable")
    own, first = np.unique(cuts.subjects[order], return_index=True)
    first = np.append(first, len(order))
    room = np.broadcast_to(room, len(cuts.subjects))
    for begin, end in runs(np.cumsum(part.lengths[own]) // _PIECE_TOKENS):
        examples = order[first[begin] : first[end]]
        for known in _known_of(part, delays, own[begin:end], cuts.take(examples), room[examples]):
            yield known._replace(examples=examples[known.examples])


def _known_of(
    part: Sequences, delays: CodeDelays, own: np.ndarray, cuts: Cuts, room: np.ndarray
) -> Iterator[Known]:
    """Those of some subjects, places ``own`` in the split, ascending."""
    known_at = delays.known_at(part, own)  # [T], the tokens of these subjects
    tokens = ragged_indices(part.offsets[own], part.lengths[own])
    offsets = run_offsets(part.lengths[own])
    rank = np.searchsorted(own, cuts.subjects)  # [examples]
    starts, stops = offsets[rank], offsets[rank + 1]
    up_to = starts + cuts.up_to - part.offsets[cuts.subjects]

    late = np.flatnonzero(known_at > part.times[tokens])
    owner = np.searchsorted(offsets, late, side="right")
    by_known = known_at[late][np.lexsort([known_at[late], owner])]
    begin = np.searchsorted(late, starts)
    recorded = np.searchsorted(late, up_to) - begin
    known = place_in(by_known, begin, np.searchsorted(late, stops), cuts.times, inclusive=True) - begin
    affected = np.flatnonzero(recorded > known)
    lengths = (up_to - starts)[affected]
    for first, last in runs(np.cumsum(lengths) // _PIECE_TOKENS):
        chosen, length = affected[first:last], lengths[first:last]
        place = ragged_indices(starts[chosen], length)
        example = np.repeat(np.arange(len(chosen), dtype=np.int32), length)
        seen = known_at[place] <= cuts.times[chosen][example]
        place, example = tokens[place[seen]], example[seen]
        visits = _renumbered(example, part.times[place], part.visits[place])
        count = np.bincount(example, minlength=len(chosen))
        kept = np.minimum(count, room[chosen])
        recent = ragged_indices(np.cumsum(count) - kept, kept)
        yield Known(chosen, kept, place[recent], visits[recent])


def _renumbered(example: np.ndarray, times: np.ndarray, visits: np.ndarray) -> np.ndarray:
    """Visits of each example from 0, in the order of their first tokens: int32 ``[tokens]``."""
    number = number_visits(example, times, np.ones(len(example), bool), visits.astype(np.int64))
    starts = leads([example])
    return number - number[starts][np.cumsum(starts) - 1]
