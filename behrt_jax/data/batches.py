"""Batches of rows as numpy arrays: a pure function of (seed, step), so a run resumes from two integers.

Those of training show the windows of a split, each epoch in other rows; those of validation are one pass in a
fixed order; those of tasks show labelled examples. :func:`reading_ahead` makes them in the background.
"""

from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Generic, NamedTuple, Self, TypeVar

import numpy as np

from behrt_jax.data import packing
from behrt_jax.data.events import DAY
from behrt_jax.data.examples import Examples
from behrt_jax.data.facts import FACT_VISIT
from behrt_jax.data.sequences import Sequences
from behrt_jax.data.sorting import ragged_indices, run_offsets
from behrt_jax.data.vocabulary import CLS, PAD
from behrt_jax.errors import InputError

T = TypeVar("T")
Array = TypeVar("Array")  # of the host or of a device

# Rows of a batch: several subjects' events side by side.


class Batch(NamedTuple):
    """Rows of packed segments; a segment is one window of one subject. Padding is 0 everywhere."""

    codes: np.ndarray
    """Vocabulary ids, int32 ``[rows, length]``."""
    ages: np.ndarray
    """Age at the event in years, float32 ``[rows, length]``."""
    visits: np.ndarray
    """Ordinal of the visit in the subject's whole history, int32 ``[rows, length]``; -1 of a static fact."""
    days: np.ndarray
    """Whole days from 1970-01-01 to the event, int32 ``[rows, length]``."""
    positions: np.ndarray
    """Place within the segment, from 0, int32 ``[rows, length]``."""
    segment_ids: np.ndarray
    """1, 2, ... within a row, 0 where there is padding, int32 ``[rows, length]``."""
    row_ids: np.ndarray
    """Index of the row in its plan, -1 for an empty row that only fills the batch, int32 ``[rows]``."""


def gather_rows(
    sequences: Sequences,
    windows: packing.Windows,
    plan: packing.RowPlan,
    rows: np.ndarray,
    row_length: int,
    cls_token: bool,
) -> Batch:
    """Copy the tokens of some rows of a plan of windows into a batch ``[rows, row_length]``.

    ``rows`` are integers ``[rows]``, row indices of the plan; -1 gives an empty row. With ``cls_token``,
    [CLS] stands before each segment, with the age and visit of its first event. Static facts come next, where
    the windows have any: with that age too, and the visit `FACT_VISIT`.

    Raises:
        ValueError: if the segments of a row are longer than ``row_length``.
    """
    rows = np.asarray(rows)
    segments = plan.counts(rows)  # [B]
    first = np.cumsum(segments) - segments  # [B]
    windows = windows.take(plan.take(rows))  # [S]
    lengths = windows.segment_lengths(cls_token).astype(np.int64)  # [S]
    ends = run_offsets(lengths)  # [S + 1]
    if (ends[first + segments] - ends[first]).max(initial=0) > row_length:
        raise ValueError(
            f"the segments of a row do not fit in {row_length} tokens: plan with [CLS] and facts counted"
        )

    # Below, T is all tokens of the batch that are not padding.
    columns = ends[:-1] - np.repeat(ends[first], segments)  # [S]
    cells = ragged_indices(np.repeat(np.arange(len(rows)) * row_length, segments) + columns, lengths)  # [T]
    positions = ragged_indices(np.zeros_like(lengths), lengths)  # [T]
    segment_ids = np.repeat(ragged_indices(np.ones_like(segments), segments), lengths)  # [T]
    before = np.int64(cls_token)  # tokens before the first event, [T] where there are facts
    if windows.facts is not None:
        before = np.repeat(windows.facts.lengths + before, lengths)
    tokens = np.repeat(windows.starts, lengths) + np.maximum(positions - before, 0)  # [T]
    codes, visits = sequences.codes[tokens], sequences.visits[tokens]  # [T]
    if windows.facts is not None and sequences.facts is not None:
        facts = np.flatnonzero((positions >= cls_token) & (positions < before))
        runs = np.repeat(windows.facts.starts, lengths)[facts]
        codes[facts], visits[facts] = sequences.facts.codes[runs + positions[facts] - cls_token], FACT_VISIT
    if cls_token:
        codes = np.where(positions == 0, CLS, codes)

    def scattered(values: np.ndarray, dtype: type, padding: int = 0) -> np.ndarray:
        flat = np.full(len(rows) * row_length, padding, dtype)
        flat[cells] = values
        return flat.reshape(len(rows), row_length)  # [B, L]

    return Batch(
        codes=scattered(codes, np.int32, PAD),
        ages=scattered(sequences.ages[tokens], np.float32),
        visits=scattered(visits, np.int32),
        days=scattered(sequences.times[tokens] // DAY, np.int32),
        positions=scattered(positions, np.int32),
        segment_ids=scattered(segment_ids, np.int32),
        row_ids=rows.astype(np.int32),
    )


# What all batches have in common: equal shapes, and rows that are planned epoch by epoch.


@dataclass(frozen=True)
class RowShape:
    """The way in which segments become the rows of a batch.

    Raises:
        InputError: ``multiple_of`` is below 1.
    """

    row_length: int
    """Tokens of a row, and so of the longest segment; a longer history is cut."""
    packed: bool = True
    """Several segments share a row; otherwise one segment a row."""
    cls_token: bool = False
    """Each segment starts with [CLS], which has the age and visit of its first event."""
    multiple_of: int = 1
    """The number of rows of a batch is brought to a multiple of this with empty rows."""

    def __post_init__(self):
        if self.multiple_of < 1:
            raise InputError(
                f"multiple_of is {self.multiple_of}: give the number of equal parts of a batch, 1 or more"
            )

    def count_rows(self, windows: packing.Windows) -> tuple[int, int]:
        """Rows that windows fill, the same in each plan, and segments of the fullest one."""
        if not self.packed:
            return len(windows), 1
        found = packing.pack_lengths(windows.segment_lengths(self.cls_token), self.row_length)
        return found.rows, int(np.diff(found.offsets).max())

    def plan(self, windows: packing.Windows, rng: np.random.Generator) -> packing.RowPlan:
        """Put windows into rows."""
        if not self.packed:
            return packing.one_per_row(len(windows), rng)
        return packing.plan_rows(windows.segment_lengths(self.cls_token), self.row_length, rng)


@dataclass(frozen=True, eq=False)
class Epoch:
    """The rows of an epoch."""

    windows: packing.Windows
    plan: packing.RowPlan
    order: np.ndarray
    """Rows of the plan as batches take them, int64 ``[rows]``."""


@dataclass(frozen=True, eq=False, kw_only=True)
class RowBatches(ABC):
    """Batches of equal shapes. An epoch shows each row once; its last batch is filled up with empty rows.

    What is in a row does not depend on the others of its batch: processes that share a batch plan the same
    epochs, which is cheap, and gather the rows that are their own.
    """

    sequences: Sequences
    shape: RowShape
    rows: int
    """Rows of an epoch, the same in each."""
    rows_per_batch: int
    """Rows of a batch, without the empty ones that fill it up."""
    # The epoch last asked for: saves time, changes no result.
    _drawn: dict[int, Epoch] = field(default_factory=dict, init=False, repr=False)

    @property
    def row_length(self) -> int:
        """Tokens that a row holds."""
        return self.shape.row_length

    @property
    def cls_token(self) -> bool:
        """Each segment starts with [CLS]."""
        return self.shape.cls_token

    @property
    def batch_rows(self) -> int:
        """Rows of a batch with the empty ones: the first axis of its arrays."""
        return -(-self.rows_per_batch // self.shape.multiple_of) * self.shape.multiple_of

    @property
    def steps_per_epoch(self) -> int:
        """Batches of an epoch."""
        return -(-self.rows // self.rows_per_batch)

    def of_rows(self, rows: int, multiple_of: int = 1) -> Self:
        """The same rows in batches of a fixed number of rows."""
        return replace(self, rows_per_batch=rows, shape=replace(self.shape, multiple_of=multiple_of))

    def with_rows_a_multiple_of(self, multiple_of: int) -> Self:
        """The same batches, with as many empty rows as bring the number of rows to a multiple.

        Raises:
            InputError: the number is below 1.
        """
        return self.of_rows(self.rows_per_batch, multiple_of)

    @abstractmethod
    def batch(self, step: int, places: np.ndarray | None = None) -> tuple:
        """Gather the batch of a step, or some of its rows: a named tuple of arrays ``[rows, ...]``.

        Args:
            step: counted from 0 over all epochs.
            places: of the rows in the batch, integers ``[rows]`` from 0 to ``batch_rows - 1``; all of them
                where not given.

        Raises:
            ValueError: the step is below 0.
        """

    def tokens(self, step: int) -> int:
        """Tokens of a step's whole batch without padding, [CLS] and facts included; none of them is read."""
        epoch, rows = self._planned(step)
        windows = epoch.windows.take(epoch.plan.take(rows))
        return int(windows.segment_lengths(self.cls_token).sum(dtype=np.int64))

    @abstractmethod
    def _draw(self, epoch: int) -> Epoch:
        """The rows of an epoch, a pure function of its number."""

    def _find(self, step: int) -> tuple[int, int]:
        """Number of the epoch that a step is in, and place of its batch there."""
        if step < 0:
            raise ValueError(f"steps are counted from 0, not {step}")
        return divmod(step, self.steps_per_epoch)

    def _planned(self, step: int) -> tuple[Epoch, np.ndarray]:
        """The epoch of a step, and the rows of its batch, as :meth:`_rows_of` gives them."""
        number, index = self._find(step)
        epoch = self._epoch(number)
        return epoch, self._rows_of(epoch.order, index)

    def _epoch(self, epoch: int) -> Epoch:
        drawn = self._drawn.get(epoch)
        if drawn is None:
            drawn = self._draw(epoch)
            self._drawn.clear()  # an epoch's rows are large: hold one at a time
            self._drawn[epoch] = drawn
        return drawn

    def _rows_of(self, order: np.ndarray, index: int) -> np.ndarray:
        """Rows of one batch of an epoch, int64 ``[batch_rows]``: its share of ``order``, then -1."""
        share = order[index * self.rows_per_batch : (index + 1) * self.rows_per_batch]
        return np.pad(share, (0, self.batch_rows - len(share)), constant_values=-1)

    def _gather(self, step: int, places: np.ndarray | None) -> Batch:
        epoch, rows = self._planned(step)
        rows = rows if places is None else rows[places]
        return gather_rows(self.sequences, epoch.windows, epoch.plan, rows, self.row_length, self.cls_token)


# Batches of pretraining and of its validation.


class EpochRows(NamedTuple, Generic[Array]):
    """The rows of an epoch and the order in which its steps take them, as host or device arrays."""

    starts: Array
    """First token of each segment in the flat arrays, one row after the other, int32 ``[segments]``."""
    lengths: Array
    """Tokens of each segment without [CLS] and facts, int32 ``[segments]``."""
    offsets: Array
    """Row ``i`` holds the segments from ``offsets[i]`` up to ``offsets[i + 1]``, int32 ``[rows + 1]``."""
    rows: Array
    """Rows of each step, -1 for an empty one, int32 ``[steps, batch_rows]``."""
    first_step: Array
    """Step of the run with which the epoch begins, int32 scalar."""
    fact_starts: Array | None = None
    """First fact of each segment in the flat array of facts, int32 ``[segments]``; None without facts."""
    fact_lengths: Array | None = None
    """Facts of each segment, int32 ``[segments]``."""


@dataclass(frozen=True, eq=False, kw_only=True)
class TrainingBatches(RowBatches):
    """Endless training batches; made by :func:`training_batches`. An epoch shows each window once."""

    windows_per_epoch: int
    """Windows of an epoch: one a subject, or more where ``window`` is ``all``."""
    most_segments: int
    """Segments of the fullest row, the same in each epoch."""
    tokens_per_epoch: int
    """Tokens of an epoch without padding, [CLS] and facts included."""
    window: packing.WindowChoice
    seed: int
    static: bool

    @property
    def windows_per_step(self) -> float:
        """Windows of a batch, on average."""
        return self.windows_per_epoch / self.steps_per_epoch

    @property
    def fill(self) -> float:
        """Share of tokens that are not padding, in all batches of an epoch, empty rows included."""
        return self.tokens_per_epoch / (self.steps_per_epoch * self.batch_rows * self.row_length)

    def batch(self, step: int, places: np.ndarray | None = None) -> Batch:
        """Gather the batch of a step, or some of its rows: see :meth:`RowBatches.batch`."""
        return self._gather(step, places)

    def epoch_rows(self, epoch: int) -> tuple[EpochRows[np.ndarray], np.ndarray]:
        """All rows of an epoch, from which its batches can be gathered elsewhere.

        Its arrays have the same shapes in each epoch.

        Returns:
            The rows as numpy arrays, and the tokens of each step's batch without padding, int64 ``[steps]``.
        """
        drawn = self._epoch(epoch)
        windows, plan, order = drawn.windows, drawn.plan, drawn.order
        rows = np.stack([self._rows_of(order, index) for index in range(self.steps_per_epoch)])
        windows = windows.take(plan.windows)
        facts = windows.facts
        ends = run_offsets(windows.segment_lengths(self.cls_token))
        row_tokens = np.append(np.diff(ends[plan.row_offsets]), 0)  # an empty row, -1, has none
        found = EpochRows(
            starts=windows.starts.astype(np.int32),
            lengths=windows.lengths.astype(np.int32),
            offsets=plan.row_offsets.astype(np.int32),
            rows=rows.astype(np.int32),
            first_step=np.array(epoch * self.steps_per_epoch, np.int32),
            fact_starts=None if facts is None else facts.starts.astype(np.int32),
            fact_lengths=None if facts is None else facts.lengths,
        )
        return found, row_tokens[rows].sum(axis=1)

    def _draw(self, epoch: int) -> Epoch:
        rng = np.random.default_rng((self.seed, 0 if self.static else epoch))
        windows = packing.choose_windows(self.sequences, self.row_length - self.cls_token, self.window, rng)
        plan = self.shape.plan(windows, rng)
        order = np.arange(self.rows)
        if self.static:
            order = np.random.default_rng((self.seed, epoch)).permutation(self.rows)
        return Epoch(windows, plan, order)


@dataclass(frozen=True, eq=False, kw_only=True)
class ValidationBatches(RowBatches):
    """The batches of one pass, in a fixed order, each gathered when asked for."""

    windows: packing.Windows
    plan: packing.RowPlan

    def __len__(self) -> int:
        return self.steps_per_epoch

    def __getitem__(self, index: int) -> Batch:
        return self.batch(index)

    def batch(self, step: int, places: np.ndarray | None = None) -> Batch:
        """Gather one batch of the pass, or some of its rows: see :meth:`RowBatches.batch`.

        Raises:
            IndexError: the pass has no such batch.
        """
        if not 0 <= step < len(self):
            raise IndexError(f"there is no batch {step} among {len(self)}")
        return self._gather(step, places)

    def __iter__(self) -> Iterator[Batch]:
        return map(self.__getitem__, range(len(self)))

    def _draw(self, epoch: int) -> Epoch:
        return Epoch(self.windows, self.plan, np.arange(self.rows))


def training_batches(
    sequences: Sequences,
    shape: RowShape,
    *,
    batch_size: int,
    batch_tokens: int | None = None,
    window: packing.WindowChoice = "all",
    seed: int = 0,
    static: bool = False,
) -> TrainingBatches:
    """Arrange training batches, each epoch drawn anew from (seed, epoch).

    Args:
        sequences: histories of the train split.
        shape: of the rows.
        batch_size: windows a batch, on average: subjects, but that a history longer than a row is
            several windows where ``window`` is ``all``. Packing turns it into rows.
        batch_tokens: tokens a batch (padding included), in place of ``batch_size``.
        window: which part of a longer history is read, see `packing.choose_windows`.
        seed: with the step, decides all of a batch.
        static: every epoch has the rows of the first one, in another order; ``row_ids`` name them, so
            that masks can be drawn once per row.

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
    rng = np.random.default_rng(seed)
    windows = packing.choose_windows(sequences, shape.row_length - shape.cls_token, window, rng)
    rows, most_segments = shape.count_rows(windows)
    if batch_tokens is None:
        rows_per_batch = rows_of_batch(rows, len(windows), batch_size)
    else:
        rows_per_batch = min(rows, max(1, round(batch_tokens / shape.row_length)))
    return TrainingBatches(
        sequences=sequences,
        shape=shape,
        rows=rows,
        rows_per_batch=rows_per_batch,
        windows_per_epoch=len(windows),
        most_segments=most_segments,
        tokens_per_epoch=int(windows.segment_lengths(shape.cls_token).sum(dtype=np.int64)),
        window=window,
        seed=seed,
        static=static,
    )


def validation_batches(
    sequences: Sequences, shape: RowShape, *, rows_per_batch: int, window: packing.WindowChoice = "all"
) -> ValidationBatches:
    """Arrange the batches of one pass over all subjects, always the same.

    The window ``random`` reads every history whole, as ``all`` does; it is no harm if a batch has more rows
    than there are.

    Raises:
        InputError: an option is out of its range, or there is nothing to evaluate on.
    """
    _check_subjects(sequences)
    if rows_per_batch < 1:
        raise InputError(f"rows_per_batch is {rows_per_batch}: give 1 or more")
    how = "all" if window == "random" else window
    windows = packing.choose_windows(sequences, shape.row_length - shape.cls_token, how)
    plan = shape.plan(windows, np.random.default_rng(0))  # any seed, but always it
    return ValidationBatches(
        sequences=sequences,
        shape=shape,
        rows=len(plan),
        rows_per_batch=rows_per_batch,
        windows=windows,
        plan=plan,
    )


def rows_of_batch(rows: int, windows: int, batch_size: int) -> int:
    """Rows of a batch, so that all have as many, of about ``batch_size`` windows."""
    return -(-rows // -(-windows // batch_size))


def _check_subjects(sequences: Sequences) -> None:
    empty = int(np.count_nonzero(sequences.lengths == 0))
    if empty:
        raise InputError(f"{empty} subjects have no events: leave them out of the sequences")
    if not len(sequences):
        raise InputError("there are no subjects to make batches of: put some into this split of the data")


# Batches of labelled examples.


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


@dataclass(frozen=True, eq=False, kw_only=True)
class ExampleBatches(RowBatches):
    """Batches in which each segment is an example, known by its number."""

    segments: int
    """Segments of a batch's rows, at least those of the fullest row."""

    def examples_of(self, step: int, places: np.ndarray | None = None) -> np.ndarray:
        """Number of the example in each segment of a step's batch, -1 for none; no token is read.

        Arguments as of :meth:`RowBatches.batch`; int32 ``[rows, segments]``.
        """
        epoch, rows = self._planned(step)
        rows = rows if places is None else rows[places]
        return epoch.plan.table(rows, self.segments).astype(np.int32)


@dataclass(frozen=True, eq=False, kw_only=True)
class TaskBatches(ExampleBatches):
    """Endless batches of examples; made by :func:`task_batches`. An epoch shows each example once."""

    examples: Examples
    targets: np.ndarray
    seed: int | None

    def batch(self, step: int, places: np.ndarray | None = None) -> TaskBatch:
        """Gather the batch of a step, or some of its rows: see :meth:`RowBatches.batch`."""
        examples = self.examples_of(step, places)  # [B, S]
        filled = examples >= 0
        targets = self.targets[np.maximum(examples, 0)] * filled[:, :, None]  # [B, S, T]
        found = self._gather(step, places)
        return TaskBatch(found, examples, targets.astype(np.float32), filled.astype(np.float32))

    def _find(self, step: int) -> tuple[int, int]:
        number, index = super()._find(step)
        return (0 if self.seed is None else number), index

    def _draw(self, epoch: int) -> Epoch:
        windows = self.examples.windows
        plan = self.shape.plan(windows, np.random.default_rng((self.seed or 0, epoch)))
        return Epoch(windows, plan, np.arange(self.rows))


def task_batches(
    examples: Examples,
    targets: np.ndarray,
    shape: RowShape,
    *,
    batch_size: int,
    seed: int | None,
    least_segments: int = 1,
) -> TaskBatches:
    """Arrange batches of labelled examples.

    Args:
        examples: at least one.
        targets: float32 ``[examples, targets]``.
        shape: of the rows.
        batch_size: examples a batch, on average.
        seed: each epoch draws anew from it; None for the same order in each.
        least_segments: segments that a batch has room for at least.

    Raises:
        InputError: no example, or a batch size below 1.
    """
    if batch_size < 1:
        raise InputError(f"train.batch_size is {batch_size}: give 1 or more.")
    if not len(examples):
        raise InputError("There is no example to make batches of.")
    rows, most = shape.count_rows(examples.windows)
    return TaskBatches(
        sequences=examples.sequences,
        shape=shape,
        rows=rows,
        rows_per_batch=rows_of_batch(rows, len(examples), batch_size),
        examples=examples,
        targets=targets,
        segments=max(most, least_segments),
        seed=seed,
    )


# The next items are made in the background, while the caller works with the present one.

_END = object()


@contextmanager
def reading_ahead(items: Iterable[T], depth: int) -> Iterator[Iterator[T]]:
    """Make the items of an iterable in one background thread, up to `depth` ahead of the caller.

    Order and content are those of the iterable. An error that it raises comes to the caller in the place
    of the item. However the block is left, the thread ends with it, at the latest after the item that it
    is at.

    Args:
        items: iterated in the thread alone; an endless one is fine.
        depth: most items that wait for the caller, 1 or more.
    """
    iterator = iter(items)
    with ThreadPoolExecutor(1, thread_name_prefix="read-ahead") as thread:

        def ahead() -> Iterator[T]:
            waiting = deque(thread.submit(next, iterator, _END) for _ in range(depth))
            while (item := waiting.popleft().result()) is not _END:
                waiting.append(thread.submit(next, iterator, _END))
                yield item  # pyright: ignore[reportReturnType]

        try:
            yield ahead()
        finally:
            thread.shutdown(wait=False, cancel_futures=True)
