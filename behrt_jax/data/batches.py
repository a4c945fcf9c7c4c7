"""Batches of rows as numpy arrays: a pure function of (seed, step), so a run resumes from two integers."""

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import numpy as np

from behrt_jax.data.packing import (
    RowPlan,
    WindowChoice,
    Windows,
    choose_windows,
    one_per_row,
    pack_lengths,
    plan_rows,
)
from behrt_jax.data.ragged import ragged_indices
from behrt_jax.data.sequences import Sequences
from behrt_jax.data.vocabulary import CLS, PAD
from behrt_jax.errors import InputError

# Rows of a batch: several subjects' events side by side, as numpy arrays.


class Batch(NamedTuple):
    """Rows of packed segments; a segment is one window of one subject. Padding is 0 everywhere."""

    codes: np.ndarray
    """Vocabulary ids, int32 ``[rows, length]``."""
    ages: np.ndarray
    """Age at the event in years, float32 ``[rows, length]``."""
    visits: np.ndarray
    """Ordinal of the visit in the subject's whole history, int32 ``[rows, length]``."""
    positions: np.ndarray
    """Place within the segment, from 0, int32 ``[rows, length]``."""
    segment_ids: np.ndarray
    """1, 2, ... within a row, 0 where there is padding, int32 ``[rows, length]``."""
    row_ids: np.ndarray
    """Index of the row in its plan, -1 for an empty row that only fills the batch, int32 ``[rows]``."""


def gather_rows(
    sequences: Sequences,
    windows: Windows,
    plan: RowPlan,
    rows: np.ndarray,
    row_length: int,
    cls_token: bool,
) -> Batch:
    """Copy the tokens of some rows of a plan into a batch ``[rows, row_length]``.

    Args:
        sequences: the histories that ``windows`` are cut from.
        windows: the windows that ``plan`` arranges.
        plan: which windows are in which row.
        rows: integers ``[rows]``, row indices of the plan; -1 gives an empty row.
        row_length: tokens of a row.
        cls_token: put [CLS] before each segment, with the age and visit of its first event.

    Raises:
        ValueError: if the segments of a row are longer than ``row_length``.
    """
    rows = np.asarray(rows)
    segments = np.where(rows < 0, 0, plan.row_offsets[rows + 1] - plan.row_offsets[rows])  # [B]
    first = np.cumsum(segments) - segments  # [B]
    chosen = plan.windows[ragged_indices(plan.row_offsets[rows], segments)]  # [S]
    lengths = windows.lengths[chosen].astype(np.int64) + cls_token  # [S]
    ends = np.concatenate([[0], np.cumsum(lengths)])  # [S + 1]
    if (ends[first + segments] - ends[first]).max(initial=0) > row_length:
        raise ValueError(f"the segments of a row do not fit in {row_length} tokens: plan with [CLS] counted")

    # Below, T is all tokens of the batch that are not padding.
    columns = ends[:-1] - np.repeat(ends[first], segments)  # [S]
    cells = ragged_indices(np.repeat(np.arange(len(rows)) * row_length, segments) + columns, lengths)  # [T]
    positions = ragged_indices(np.zeros_like(lengths), lengths)  # [T]
    segment_ids = np.repeat(ragged_indices(np.ones_like(segments), segments), lengths)  # [T]
    tokens = np.repeat(windows.starts[chosen], lengths) + np.maximum(positions - cls_token, 0)  # [T]
    codes = sequences.codes[tokens]  # [T]
    if cls_token:
        codes = np.where(positions == 0, CLS, codes)

    def scattered(values: np.ndarray, dtype: type, padding: int = 0) -> np.ndarray:
        flat = np.full(len(rows) * row_length, padding, dtype)
        flat[cells] = values
        return flat.reshape(len(rows), row_length)  # [B, L]

    return Batch(
        codes=scattered(codes, np.int32, PAD),
        ages=scattered(sequences.ages[tokens], np.float32),
        visits=scattered(sequences.visits[tokens], np.int32),
        positions=scattered(positions, np.int32),
        segment_ids=scattered(segment_ids, np.int32),
        row_ids=rows.astype(np.int32),
    )


class EpochRows(NamedTuple):
    """The rows of an epoch and the order in which its steps take them, as host or device arrays."""

    starts: Any
    """First token of each segment in the flat arrays, one row after the other, int32 ``[segments]``."""
    lengths: Any
    """Tokens of each segment without [CLS], int32 ``[segments]``."""
    offsets: Any
    """Row ``i`` holds the segments from ``offsets[i]`` up to ``offsets[i + 1]``, int32 ``[rows + 1]``."""
    rows: Any
    """Rows of each step, -1 for an empty one, int32 ``[steps, batch_rows]``."""
    first_step: Any
    """Step of the run with which the epoch begins, int32 scalar."""


@dataclass(frozen=True, eq=False)
class TrainingBatches:
    """Endless training batches; made by :func:`training_batches`.

    Every batch has the same shape. An epoch shows each window once: none is dropped, and the last
    batch of an epoch is filled up with empty rows.
    """

    sequences: Sequences
    row_length: int
    """Tokens that a row holds."""
    rows: int
    """Rows of an epoch, the same in each."""
    rows_per_batch: int
    """Rows of a batch, without the empty ones that ``multiple_of`` asks for."""
    batch_rows: int
    """Rows of a batch with those: the first axis of its arrays."""
    windows_per_epoch: int
    """Windows of an epoch: one a subject, or more where ``window`` is ``all``."""
    most_segments: int
    """Segments of the fullest row, the same in each epoch."""
    tokens_per_epoch: int
    """Tokens of an epoch without padding, [CLS] included."""
    window: WindowChoice
    packed: bool
    cls_token: bool
    seed: int
    static: bool
    # What the epoch last asked for was drawn: saves time, changes no result.
    _drawn: dict[int, tuple[Windows, RowPlan, np.ndarray]] = field(
        default_factory=dict, init=False, repr=False
    )

    @property
    def steps_per_epoch(self) -> int:
        """Batches of an epoch."""
        return -(-self.rows // self.rows_per_batch)

    @property
    def windows_per_step(self) -> float:
        """Windows of a batch, on average."""
        return self.windows_per_epoch / self.steps_per_epoch

    @property
    def fill(self) -> float:
        """Share of tokens that are not padding, in all batches of an epoch, empty rows included."""
        return self.tokens_per_epoch / (self.steps_per_epoch * self.batch_rows * self.row_length)

    def batch(self, step: int) -> Batch:
        """Gather the batch of a step, counted from 0 over all epochs: ``[batch_rows, row_length]``."""
        if step < 0:
            raise ValueError(f"steps are counted from 0, not {step}")
        epoch, index = divmod(step, self.steps_per_epoch)
        windows, plan, order = self._epoch(epoch)
        rows = _padded(order, index, self.rows_per_batch, self.batch_rows)
        return gather_rows(self.sequences, windows, plan, rows, self.row_length, self.cls_token)

    def epoch_rows(self, epoch: int) -> tuple[EpochRows, np.ndarray]:
        """All rows of an epoch, from which its batches can be gathered elsewhere.

        Its arrays have the same shapes in each epoch.

        Returns:
            The rows as numpy arrays, and the tokens of each step's batch without padding, int64 ``[steps]``.
        """
        windows, plan, order = self._epoch(epoch)
        steps = range(self.steps_per_epoch)
        rows = np.stack([_padded(order, i, self.rows_per_batch, self.batch_rows) for i in steps])
        lengths = windows.lengths[plan.windows]
        ends = np.concatenate([[0], np.cumsum(lengths + self.cls_token, dtype=np.int64)])
        row_tokens = np.append(np.diff(ends[plan.row_offsets]), 0)  # an empty row, -1, has none
        found = EpochRows(
            starts=windows.starts[plan.windows].astype(np.int32),
            lengths=lengths.astype(np.int32),
            offsets=plan.row_offsets.astype(np.int32),
            rows=rows.astype(np.int32),
            first_step=np.int32(epoch * self.steps_per_epoch),
        )
        return found, row_tokens[rows].sum(axis=1)

    def _epoch(self, epoch: int) -> tuple[Windows, RowPlan, np.ndarray]:
        """Windows and plan of an epoch, and the order in which its batches take the rows."""
        drawn = self._drawn.get(epoch)
        if drawn is None:
            rng = np.random.default_rng((self.seed, 0 if self.static else epoch))
            windows = choose_windows(self.sequences, self.row_length - self.cls_token, self.window, rng)
            plan = _plan(windows, self.row_length, self.packed, self.cls_token, rng)
            order = np.arange(self.rows)
            if self.static:
                order = np.random.default_rng((self.seed, epoch)).permutation(self.rows)
            drawn = windows, plan, order
            self._drawn.clear()  # an epoch's rows are large: hold one at a time
            self._drawn[epoch] = drawn
        return drawn


@dataclass(frozen=True, eq=False)
class ValidationBatches:
    """The batches of one pass, in a fixed order, each gathered when asked for."""

    sequences: Sequences
    row_length: int
    rows_per_batch: int
    """Rows of a batch, without the empty ones that ``multiple_of`` asks for."""
    batch_rows: int
    """Rows of a batch with those: the first axis of its arrays."""
    cls_token: bool
    windows: Windows
    plan: RowPlan

    def __len__(self) -> int:
        return -(-len(self.plan) // self.rows_per_batch)

    def __getitem__(self, index: int) -> Batch:
        if not 0 <= index < len(self):
            raise IndexError(f"there is no batch {index} among {len(self)}")
        rows = _padded(np.arange(len(self.plan)), index, self.rows_per_batch, self.batch_rows)
        return gather_rows(self.sequences, self.windows, self.plan, rows, self.row_length, self.cls_token)

    def __iter__(self) -> Iterator[Batch]:
        return (self[index] for index in range(len(self)))


def training_batches(
    sequences: Sequences,
    *,
    row_length: int,
    batch_size: int,
    batch_tokens: int | None = None,
    window: WindowChoice = "all",
    packed: bool = True,
    cls_token: bool = False,
    seed: int = 0,
    static: bool = False,
    multiple_of: int = 1,
) -> TrainingBatches:
    """Arrange training batches, each epoch drawn anew from (seed, epoch).

    Args:
        sequences: histories of the train split.
        row_length: tokens of a row, and so of the longest segment; a longer history is cut.
        batch_size: windows a batch, on average: subjects, but that a history longer than a row is
            several windows where ``window`` is ``all``. Packing turns it into rows.
        batch_tokens: tokens a batch (padding included), in place of ``batch_size``.
        window: which part of a longer history is read, see `windows.choose_windows`.
        packed: several subjects share a row; otherwise one subject a row.
        cls_token: each segment starts with [CLS], which has the age and visit of its first event.
        seed: with the step, decides all of a batch.
        static: every epoch has the rows of the first one, in another order; ``row_ids`` name them, so
            that masks can be drawn once per row.
        multiple_of: the number of rows of a batch is brought to a multiple of this with empty rows.

    Raises:
        InputError: an option is out of its range, or there is nothing to train on.
    """
    _check_subjects(sequences)
    for name, value in [("train.batch_size", batch_size), ("train.batch_tokens", batch_tokens)]:
        if value is not None and value < 1:
            raise InputError(f"{name} is {value}: give 1 or more")
    if seed < 0:
        raise InputError(f"train.seed is {seed}: give 0 or more")
    # Only the lengths count here, and those are the same in every draw.
    windows = choose_windows(sequences, row_length - cls_token, window, np.random.default_rng(seed))
    lengths = windows.lengths + cls_token
    rows, most_segments = len(lengths), 1
    if packed:
        packing = pack_lengths(lengths, row_length)
        rows, most_segments = packing.rows, int(np.diff(packing.offsets).max())
    if batch_tokens is None:
        rows_per_batch = -(-rows // -(-len(windows) // batch_size))
    else:
        rows_per_batch = min(rows, max(1, round(batch_tokens / row_length)))
    return TrainingBatches(
        sequences=sequences,
        row_length=row_length,
        rows=rows,
        rows_per_batch=rows_per_batch,
        batch_rows=_rounded_up(rows_per_batch, multiple_of),
        windows_per_epoch=len(windows),
        most_segments=most_segments,
        tokens_per_epoch=int(lengths.sum(dtype=np.int64)),
        window=window,
        packed=packed,
        cls_token=cls_token,
        seed=seed,
        static=static,
    )


def with_rows_a_multiple_of(batches: TrainingBatches, multiple_of: int) -> TrainingBatches:
    """The same batches, with as many empty rows as bring the number of rows to a multiple.

    Raises:
        InputError: the number is below 1.
    """
    return replace(batches, batch_rows=_rounded_up(batches.rows_per_batch, multiple_of))


def validation_batches(
    sequences: Sequences,
    *,
    row_length: int,
    rows_per_batch: int,
    window: WindowChoice = "all",
    packed: bool = True,
    cls_token: bool = False,
    multiple_of: int = 1,
) -> ValidationBatches:
    """Arrange the batches of one pass over all subjects, always the same.

    Args:
        sequences: histories to evaluate on.
        row_length: tokens of a row, and so of the longest segment.
        rows_per_batch: rows of a batch; more than there are is no harm.
        window: as in training, but that ``random`` reads every history whole, as ``all`` does.
        packed: several windows share a row; otherwise one window a row.
        cls_token: each segment starts with [CLS], which has the age and visit of its first event.
        multiple_of: the number of rows of a batch is brought to a multiple of this with empty rows.

    Raises:
        InputError: an option is out of its range, or there is nothing to evaluate on.
    """
    _check_subjects(sequences)
    if rows_per_batch < 1:
        raise InputError(f"rows_per_batch is {rows_per_batch}: give 1 or more")
    windows = choose_windows(sequences, row_length - cls_token, "all" if window == "random" else window)
    plan = _plan(windows, row_length, packed, cls_token, np.random.default_rng(0))  # any seed, but always it
    return ValidationBatches(
        sequences=sequences,
        row_length=row_length,
        rows_per_batch=rows_per_batch,
        batch_rows=_rounded_up(rows_per_batch, multiple_of),
        cls_token=cls_token,
        windows=windows,
        plan=plan,
    )


def _plan(
    windows: Windows, row_length: int, packed: bool, cls_token: bool, rng: np.random.Generator
) -> RowPlan:
    if not packed:
        return one_per_row(len(windows), rng)
    return plan_rows(windows.lengths + cls_token, row_length, rng)


def _padded(order: np.ndarray, index: int, rows_per_batch: int, batch_rows: int) -> np.ndarray:
    """Rows of one batch, int64 ``[batch_rows]``: its share of ``order``, then -1."""
    share = order[index * rows_per_batch : (index + 1) * rows_per_batch]
    return np.pad(share, (0, batch_rows - len(share)), constant_values=-1)


def _rounded_up(rows: int, multiple_of: int) -> int:
    if multiple_of < 1:
        raise InputError(
            f"multiple_of is {multiple_of}: give the number of equal parts of a batch, 1 or more"
        )
    return -(-rows // multiple_of) * multiple_of


def _check_subjects(sequences: Sequences) -> None:
    empty = int(np.count_nonzero(sequences.lengths == 0))
    if empty:
        raise InputError(f"{empty} subjects have no events: leave them out of the sequences")
    if not len(sequences):
        raise InputError("there are no subjects to make batches of: put some into this split of the data")
