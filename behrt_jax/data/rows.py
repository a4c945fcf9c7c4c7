"""Rows of a batch: several subjects' events side by side, as numpy arrays."""

from typing import NamedTuple

import numpy as np

from behrt_jax.data.packing import RowPlan
from behrt_jax.data.sequences import Sequences
from behrt_jax.data.vocabulary import CLS, PAD
from behrt_jax.data.windows import Windows, ragged_indices


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
