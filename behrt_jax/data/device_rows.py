"""Rows gathered on the device from tokens that lie there, equal to those of `rows.gather_rows`.

Beside `batches`, the one module of `data` that imports jax: the gathering is part of the compiled step.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from behrt_jax.data.batches import EpochRows, TrainingBatches
from behrt_jax.data.rows import Batch
from behrt_jax.data.sequences import Sequences
from behrt_jax.data.vocabulary import CLS

MOST_TOKENS = np.iinfo(np.int32).max
"""More cannot be numbered in int32, the widest integer of a device by default."""


class Tokens(NamedTuple):
    """What is read of each token of a split."""

    codes: Any
    """int32 ``[tokens]``."""
    ages: Any
    """float32 ``[tokens]``."""
    visits: Any
    """int32 ``[tokens]``."""


def tokens_of(sequences: Sequences) -> Tokens:
    """Flat host arrays, ready to be put on a device; not copied where they have their dtype."""
    return Tokens(
        np.asarray(sequences.codes, np.int32),
        np.asarray(sequences.ages, np.float32),
        np.asarray(sequences.visits, np.int32),
    )


def device_bytes(batches: TrainingBatches) -> int:
    """Bytes of the tokens and of the rows of two epochs, the one that is trained on and the next."""
    segments = 8 * batches.windows_per_epoch
    rows = 4 * (batches.rows + 1 + batches.steps_per_epoch * batches.batch_rows)
    return 12 * len(batches.sequences.codes) + 2 * (segments + rows)


def gather_on_device(
    tokens: Tokens, epoch: EpochRows, rows: jax.Array, *, row_length: int, cls_token: bool, most_segments: int
) -> Batch:
    """Copy the tokens of some rows of an epoch into a batch ``[rows, row_length]``, inside a jitted function.

    Args:
        tokens: of the split, on the device.
        epoch: what is in its rows, on the device; `epoch.rows` and `epoch.first_step` are not read.
        rows: int32 ``[rows]``, row indices of the epoch; -1 gives an empty row.
        row_length: tokens of a row; no row of the epoch holds more.
        cls_token: put [CLS] before each segment, with the age and visit of its first event.
        most_segments: segments of the fullest row, or more.
    """
    row = jnp.maximum(rows, 0)  # [B]
    first = epoch.offsets[row]  # [B]
    count = jnp.where(rows < 0, 0, epoch.offsets[row + 1] - first)  # [B]
    slots = jnp.arange(most_segments, dtype=jnp.int32)[None]  # [1, S]
    held = slots < count[:, None]  # [B, S]
    segment = jnp.where(held, first[:, None] + slots, 0)  # [B, S]
    lengths = jnp.where(held, epoch.lengths[segment] + int(cls_token), 0)  # [B, S]
    starts = epoch.starts[segment]  # [B, S]

    ends = jnp.cumsum(lengths, axis=1)  # [B, S]
    cells = jnp.arange(row_length, dtype=jnp.int32)  # [L]
    # A cell is in the slot that follows all those that end before or at it.
    slot = jax.vmap(lambda e: jnp.searchsorted(e, cells, side="right", method="scan_unrolled"))(
        ends
    )  # [B, L]
    used = cells[None] < ends[:, -1:]  # [B, L]
    at = jnp.minimum(slot, most_segments - 1)  # [B, L]
    position = cells[None] - jnp.take_along_axis(ends - lengths, at, axis=1)  # [B, L]
    token = jnp.take_along_axis(starts, at, axis=1) + jnp.maximum(position - int(cls_token), 0)
    token = jnp.where(used, token, 0)  # [B, L]

    codes = tokens.codes[token]
    if cls_token:
        codes = jnp.where(position == 0, CLS, codes)

    def or_padding(values: jax.Array) -> Any:
        return jnp.where(used, values, jnp.zeros_like(values))  # [B, L]; PAD is 0

    return Batch(
        codes=or_padding(codes),
        ages=or_padding(tokens.ages[token]),
        visits=or_padding(tokens.visits[token]),
        positions=or_padding(position),
        segment_ids=or_padding(slot + 1),
        row_ids=rows,  # pyright: ignore[reportArgumentType]
    )
