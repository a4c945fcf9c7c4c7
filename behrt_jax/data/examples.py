"""Histories up to the prediction times of labels: what a model may see of a subject, and nothing later.

A token is known at its time, or later where its code has a delay; one that is known at the prediction time
itself is in. Nothing that lies later changes an example, but whether a visit of a code with the delay
``visit`` has ended by then. A subject without any event is as one whose first event comes later.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from behrt_jax.data.delays import code_delays
from behrt_jax.data.hidden_tokens import Known, known_where_hidden
from behrt_jax.data.labels import Labels
from behrt_jax.data.places import find_subjects, place_in
from behrt_jax.data.sequences import YEAR, Sequences, SequenceSet, with_separators
from behrt_jax.data.visits import DAY
from behrt_jax.data.vocabulary import UNK
from behrt_jax.data.windows import Windows, ragged_indices
from behrt_jax.errors import InputError

_HOUR = DAY // 24


@dataclass(frozen=True, eq=False)
class Examples:
    """Histories up to prediction times: one example a label, in the order of the label table."""

    sequences: Sequences
    """What `windows` index: the split itself where nothing has to be hidden, else what the examples see and
    no more, with each example as a subject of its own (its id may repeat, in any order)."""
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
            windows=Windows(self.windows.starts[kept], self.windows.lengths[kept]),
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
) -> Examples:
    """Cut the histories of a split's subjects at the prediction times of their labels.

    Where a delay hides a token, a history is empty or separators are put in, what the examples see is copied,
    at most ``max_tokens`` each: give labels in parts where that is too much.

    Args:
        data: opened without separators.
        split: whose subjects; labels of other splits are passed over.
        labels: in any order.
        max_tokens: longest example, in tokens, separators included.
        delays: ``REGEX=DAYS`` or ``REGEX=visit``; see `delays.code_delays`.
        sep_token: put a [SEP] after each run of known events of one visit.

    Raises:
        InputError: no such split, no room for a token, a delay of another form, or prediction times before
            birth.
    """
    if split not in data.splits:
        raise InputError(f"There is no split {split!r}: choose one of {', '.join(data.splits)}.")
    if max_tokens < 1:
        raise InputError(f"data.max_length leaves an example {max_tokens} codes: give it more")
    code_delay = code_delays(data.vocabulary, delays)
    part, born = data.splits[split], data.births[split]
    if len(born):  # after the others, with no token each
        offsets = np.pad(part.offsets, (0, len(born)), "edge")
        part = replace(part, subject_ids=data.subject_ids(split), offsets=offsets)
    place = find_subjects(part.subject_ids, labels.subject_ids)
    rows = np.flatnonzero(place >= 0)
    subjects, times = place[rows], labels.times[rows]
    starts, stops = part.offsets[subjects], part.offsets[subjects + 1]
    births = np.empty(len(rows), np.float64)
    has_events = stops > starts
    first = starts[has_events]
    births[has_events] = part.times[first] - part.ages[first].astype(np.float64) * YEAR
    births[~has_events] = born.times[subjects[~has_events] - (len(part) - len(born))]
    early = times < births - DAY  # ages are rounded to minutes
    if early.any():
        raise InputError(
            f"{np.count_nonzero(early):,} of {len(rows):,} labels of {split} have a prediction time before "
            "the subject's birth: mend the prediction times (another unit, clock or subject?)."
        )

    up_to = place_in(part.times, starts, stops, times, inclusive=True)
    begins = np.maximum(starts, up_to - max_tokens)
    lengths = up_to - begins
    pieces = list(known_where_hidden(part, code_delay, subjects, times, up_to, max_tokens))
    for examples, kept, *_ in pieces:
        lengths[examples] = kept
    empty = lengths == 0
    sequences, windows = data.splits[split], Windows(begins, lengths.astype(np.int32))
    if pieces or sep_token or empty.any():
        ids = labels.subject_ids[rows]
        sequences = _copied(part, ids, times, begins, lengths, pieces)
        windows = Windows(sequences.offsets[:-1], np.maximum(lengths, 1).astype(np.int32))
    ages = np.where(empty, 0.0, _ages_at(times, sequences, windows))
    # Of births, which are whole hours, any token of the subject tells the same.
    ages[empty] = (times - np.round(births / _HOUR) * _HOUR)[empty] / YEAR
    ages = np.maximum(ages, 0).astype(np.float32)
    if empty.any():
        sequences.ages[windows.starts[empty]] = ages[empty]
    if sep_token:
        sequences, windows = _separated(sequences, empty, max_tokens)
    return Examples(
        sequences,
        windows,
        rows=rows,
        subject_ids=labels.subject_ids[rows],
        times=times,
        ages=ages,
        empty=empty,
        unknown_subjects=of_unknown_subjects(data, labels),
    )


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
    pieces: Sequence[Known],
) -> Sequences:
    """The tokens of each example; one [UNK] where it has none, whose age is to be filled in."""
    offsets = np.concatenate([[0], np.cumsum(np.maximum(lengths, 1))])
    tokens = np.zeros(offsets[-1], np.int64)  # places in the split
    known = ragged_indices(offsets[:-1], lengths)
    tokens[known] = ragged_indices(begins, lengths)
    for examples, kept, place, _ in pieces:
        tokens[ragged_indices(offsets[examples], kept)] = place
    places, columns = tokens[known], {}
    for name in ("codes", "ages", "visits", "times"):
        column = getattr(part, name)
        columns[name] = np.zeros(len(tokens), column.dtype)
        columns[name][known] = column[places]
    for examples, kept, _, visits in pieces:
        columns["visits"][ragged_indices(offsets[examples], kept)] = visits
    empty = lengths == 0
    alone = offsets[:-1][empty]
    columns["codes"][alone], columns["times"][alone] = UNK, times[empty]
    return Sequences(subject_ids=subject_ids, offsets=offsets, **columns)


def _separated(sequences: Sequences, empty: np.ndarray, max_tokens: int) -> tuple[Sequences, Windows]:
    sequences = with_separators(sequences)
    lengths = np.minimum(sequences.lengths, max_tokens)
    starts = sequences.offsets[1:] - lengths
    # Nothing was known, so there is no visit to close.
    starts[empty], lengths[empty] = sequences.offsets[:-1][empty], 1
    return sequences, Windows(starts, lengths.astype(np.int32))


def of_unknown_subjects(data: SequenceSet, labels: Labels) -> int:
    """How many labels are of subjects that no split of the data has."""
    known = np.concatenate([data.subject_ids(name) for name in data.splits])
    return int(np.count_nonzero(~np.isin(labels.subject_ids, known)))
