"""Batches of labelled examples: a pure function of (seed, step), as those of pretraining are."""

from dataclasses import dataclass, field, replace
from typing import NamedTuple

import numpy as np

from behrt_jax.data.examples import Examples
from behrt_jax.data.packing import RowPlan, one_per_row, pack_lengths, plan_rows
from behrt_jax.data.rows import Batch, gather_rows
from behrt_jax.errors import InputError


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
