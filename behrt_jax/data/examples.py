"""Histories up to the prediction times of labels: what a model may see of a subject, and nothing later.

A token is known at its time, or later where its code has a delay; one that is known at the prediction time
itself is in. Nothing that lies later changes an example, but whether a visit of a code with the delay
``visit`` has ended by then. A subject without any event is as one whose first event comes later.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import NamedTuple

import numpy as np

from behrt_jax.data.batches import Batch, gather_rows
from behrt_jax.data.delays import CodeDelays, code_delays
from behrt_jax.data.event_rules import DAY, number_visits
from behrt_jax.data.labels import Labels
from behrt_jax.data.packing import RowPlan, Windows, one_per_row, pack_lengths, plan_rows
from behrt_jax.data.ragged import ragged_indices
from behrt_jax.data.sequences import YEAR, Sequences, SequenceSet, with_separators
from behrt_jax.data.sorting import find_subjects, place_in
from behrt_jax.data.vocabulary import UNK
from behrt_jax.errors import InputError

# Which tokens of a history are not known yet at a prediction time, and what is left without them.

_PIECE_TOKENS = 1 << 22
"""Tokens looked at together."""

Known = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]
"""Examples ``[n]``, tokens of each that are known ``[n]``, places of those tokens in the split and their
visits ``[sum of the tokens]``."""


def known_where_hidden(
    part: Sequences,
    delays: CodeDelays,
    subjects: np.ndarray,
    times: np.ndarray,
    up_to: np.ndarray,
    max_tokens: int,
) -> Iterator[Known]:
    """The last known tokens of those examples from which a delay hides some token.

    Visits are numbered anew, in the order of their first known tokens: a number that is skipped would tell
    that there is something hidden.

    Args:
        part: the histories.
        delays: of the codes.
        subjects: int64 ``[examples]``, places in ``part``.
        times: prediction times, int64 ``[examples]``.
        up_to: one after the last token at or before that time, int64 ``[examples]``.
        max_tokens: most tokens of an example.
    """
    if not delays.delayed.any() or not len(subjects):
        return
    order = np.argsort(subjects, kind="stable")
    own, first = np.unique(subjects[order], return_index=True)
    first = np.append(first, len(order))
    for begin, end in _runs(np.cumsum(part.lengths[own]) // _PIECE_TOKENS):
        examples = order[first[begin] : first[end]]
        rank = np.repeat(np.arange(end - begin), np.diff(first[begin : end + 1]))  # [examples]
        yield from _known_of(
            part, delays, own[begin:end], examples, rank, times[examples], up_to[examples], max_tokens
        )


def _known_of(
    part: Sequences,
    delays: CodeDelays,
    own: np.ndarray,
    examples: np.ndarray,
    rank: np.ndarray,
    times: np.ndarray,
    up_to: np.ndarray,
    max_tokens: int,
) -> Iterator[Known]:
    """Those of some subjects, places ``own`` in the split; ``rank`` is an example's place in ``own``."""
    known_at = delays.known_at(part, own)  # [T], the tokens of these subjects
    tokens = ragged_indices(part.offsets[own], part.lengths[own])
    offsets = np.concatenate([[0], np.cumsum(part.lengths[own])])
    starts, stops = offsets[rank], offsets[rank + 1]
    up_to = starts + up_to - part.offsets[own[rank]]

    late = np.flatnonzero(known_at > part.times[tokens])
    owner = np.searchsorted(offsets, late, side="right")
    by_known = known_at[late][np.lexsort([known_at[late], owner])]
    begin = np.searchsorted(late, starts)
    recorded = np.searchsorted(late, up_to) - begin
    known = place_in(by_known, begin, np.searchsorted(late, stops), times, inclusive=True) - begin
    affected = np.flatnonzero(recorded > known)
    lengths = (up_to - starts)[affected]
    for first, last in _runs(np.cumsum(lengths) // _PIECE_TOKENS):
        chosen = affected[first:last]
        place = ragged_indices(starts[chosen], lengths[first:last])
        example = np.repeat(np.arange(len(chosen), dtype=np.int32), lengths[first:last])
        seen = known_at[place] <= times[chosen][example]
        place, example = tokens[place[seen]], example[seen]
        visits = _renumbered(example, part.times[place], part.visits[place])
        count = np.bincount(example, minlength=len(chosen))
        kept = np.minimum(count, max_tokens)
        recent = ragged_indices(np.cumsum(count) - kept, kept)
        yield examples[chosen], kept, place[recent], visits[recent]


def _renumbered(example: np.ndarray, times: np.ndarray, visits: np.ndarray) -> np.ndarray:
    """Visits of each example from 0, in the order of their first tokens: int32 ``[tokens]``."""
    if not len(example):
        return np.zeros(0, np.int32)
    number = number_visits(example, times, np.ones(len(example), bool), visits.astype(np.int64))
    leads = np.concatenate([[True], example[1:] != example[:-1]])
    return number - number[leads][np.cumsum(leads) - 1]


def _runs(values: np.ndarray) -> Iterator[tuple[int, int]]:
    """Where runs of equal values begin and end."""
    if len(values):
        yield from pairwise([0, *(np.flatnonzero(np.diff(values)) + 1).tolist(), len(values)])


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


# Batches of labelled examples: a pure function of (seed, step), as those of pretraining are.


class TaskBatch(NamedTuple):
    """Packed rows, each segment of which is one example."""

    rows: Batch
    examples: np.ndarray
    """Number of the example in each segment, -1 for none, int32 ``[rows, segments]``."""
    targets: np.ndarray
    """float32 ``[rows, segments, targets]``, 0 where there is no example."""
    weights: np.ndarray
    """1 where there is an example, else 0, float32 ``[rows, segments]``."""

    @property
    def segment_ids(self) -> np.ndarray:
        """Of the rows, int32 ``[rows, length]``."""
        return self.rows.segment_ids


@dataclass(frozen=True, eq=False)
class TaskBatches:
    """Batches of equal shapes; made by :func:`task_batches`. An epoch shows each example once."""

    examples: Examples
    targets: np.ndarray
    row_length: int
    rows_per_batch: int
    """Rows of a batch without the empty ones that fill it up."""
    batch_rows: int
    segments: int
    """Segments of a batch's rows, at least those of the fullest row."""
    rows: int
    """Rows of an epoch."""
    seed: int | None
    packed: bool
    cls_token: bool
    _drawn: dict[int, RowPlan] = field(default_factory=dict, init=False, repr=False)

    @property
    def steps_per_epoch(self) -> int:
        """Batches of an epoch."""
        return -(-self.rows // self.rows_per_batch)

    def of_rows(self, rows: int, multiple_of: int = 1) -> "TaskBatches":
        """The same rows in batches of a fixed number of rows."""
        return replace(self, rows_per_batch=rows, batch_rows=-(-rows // multiple_of) * multiple_of)

    def batch(self, step: int) -> TaskBatch:
        """Gather the batch of a step, counted from 0 over all epochs."""
        epoch, index = divmod(step, self.steps_per_epoch)
        plan = self._plan(epoch)
        rows = np.arange(index * self.rows_per_batch, min(self.rows, (index + 1) * self.rows_per_batch))
        rows = np.pad(rows, (0, self.batch_rows - len(rows)), constant_values=-1)
        found = gather_rows(
            self.examples.sequences, self.examples.windows, plan, rows, self.row_length, self.cls_token
        )
        first = plan.row_offsets[np.maximum(rows, 0)]
        count = np.where(rows < 0, 0, plan.row_offsets[rows + 1] - first)  # [B]
        places = first[:, None] + np.arange(self.segments)  # [B, S]
        filled = np.arange(self.segments) < count[:, None]
        examples = np.where(filled, plan.windows[np.where(filled, places, 0)], -1).astype(np.int32)
        targets = self.targets[np.maximum(examples, 0)] * filled[:, :, None]  # [B, S, T]
        return TaskBatch(found, examples, targets.astype(np.float32), filled.astype(np.float32))

    def _plan(self, epoch: int) -> RowPlan:
        if self.seed is None:
            epoch = 0
        if epoch not in self._drawn:
            rng = np.random.default_rng((self.seed or 0, epoch))
            lengths = self.examples.windows.lengths + self.cls_token
            packed = self.packed
            plan = plan_rows(lengths, self.row_length, rng) if packed else one_per_row(len(lengths), rng)
            self._drawn.clear()
            self._drawn[epoch] = plan
        return self._drawn[epoch]


def task_batches(
    examples: Examples,
    targets: np.ndarray,
    *,
    row_length: int,
    batch_size: int,
    seed: int | None,
    packed: bool = True,
    cls_token: bool = False,
    multiple_of: int = 1,
    least_segments: int = 1,
) -> TaskBatches:
    """Arrange batches.

    Args:
        examples: at least one.
        targets: float32 ``[examples, targets]``.
        row_length: tokens of a row.
        batch_size: examples a batch, on average.
        seed: each epoch draws anew from it; None for the same order in each.
        packed: several examples share a row.
        cls_token: each example starts with [CLS].
        multiple_of: the number of rows of a batch is brought to a multiple of this with empty rows.
        least_segments: segments that a batch has room for at least.

    Raises:
        InputError: no example, or a batch size below 1.
    """
    if batch_size < 1:
        raise InputError(f"train.batch_size is {batch_size}: give 1 or more.")
    if not len(examples):
        raise InputError("There is no example to make batches of.")
    rows, most = len(examples), 1
    if packed:
        packing = pack_lengths(examples.windows.lengths + cls_token, row_length)
        rows, most = packing.rows, int(np.diff(packing.offsets).max())
    rows_per_batch = -(-rows // -(-len(examples) // batch_size))
    return TaskBatches(
        examples=examples,
        targets=targets,
        row_length=row_length,
        rows_per_batch=rows_per_batch,
        batch_rows=-(-rows_per_batch // multiple_of) * multiple_of,
        segments=max(most, least_segments),
        rows=rows,
        seed=seed,
        packed=packed,
        cls_token=cls_token,
    )
