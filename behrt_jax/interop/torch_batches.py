"""Batches for the PyTorch reference, one subject a row or rows full of tokens."""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch  # pyright: ignore[reportMissingImports]

from behrt_jax.data.packing import one_per_row
from behrt_jax.data.rows import gather_rows
from behrt_jax.data.sequences import Sequences
from behrt_jax.data.windows import subject_windows
from behrt_jax.errors import InputError


class TorchBatch(NamedTuple):
    """Rows of events, one sequence each, and where they are padded."""

    codes: torch.Tensor
    """Vocabulary ids, int64 ``[rows, length]``."""
    ages: torch.Tensor
    """Age at the event in years, float32 ``[rows, length]``."""
    visits: torch.Tensor
    """Ordinal of the visit, int64 ``[rows, length]``."""
    padding: torch.Tensor | None
    """bool ``[rows, length]``, True at padding; None where there is none."""

    def to(self, device: str) -> "TorchBatch":
        """Copy to a device."""
        codes, ages, visits = (x.to(device, non_blocking=True) for x in self[:3])
        padding = self.padding
        return TorchBatch(
            codes, ages, visits, None if padding is None else padding.to(device, non_blocking=True)
        )


def padded_batches(sequences: Sequences, length: int, batch_size: int, seed: int = 0) -> Iterator[TorchBatch]:
    """One pass over the subjects in random order, each a row of its own: its last `length` events, then
    padding. Subjects that do not fill a batch at the end are left out, so that all shapes are the same.

    Args:
        sequences: histories, each of one event at least.
        length: tokens of a row.
        batch_size: rows of a batch.
        seed: decides the order.

    Raises:
        InputError: there are fewer subjects than `batch_size`.
    """
    windows = subject_windows(sequences, length, "recent")
    plan = one_per_row(len(windows), np.random.default_rng(seed))
    for rows in _whole_batches(len(plan), batch_size):
        batch = gather_rows(sequences, windows, plan, rows, length, cls_token=False)
        yield _tensors(batch.codes, batch.ages, batch.visits, batch.segment_ids == 0)


def full_batches(sequences: Sequences, length: int, batch_size: int, seed: int = 0) -> Iterator[TorchBatch]:
    """One pass over the tokens in rows without padding, for timing: all histories end to end, cut every
    `length` tokens whoever's they are, in random order. What is left over at the end is left out.

    Arguments and errors as in :func:`padded_batches`, with rows in place of subjects.
    """
    count = len(sequences.codes) // length

    def cut(values: np.ndarray) -> np.ndarray:
        return values[: count * length].reshape(count, length)

    fields = [cut(values) for values in (sequences.codes, sequences.ages, sequences.visits)]
    order = np.random.default_rng(seed).permutation(count)
    for rows in _whole_batches(count, batch_size):
        yield _tensors(*(values[order[rows]] for values in fields), padding=None)


def _whole_batches(count: int, batch_size: int) -> Iterator[np.ndarray]:
    if not 1 <= batch_size <= count:
        raise InputError(f"batch_size is {batch_size} and there are {count} rows: give 1 to {count}.")
    for start in range(0, count - batch_size + 1, batch_size):
        yield np.arange(start, start + batch_size)


def _tensors(
    codes: np.ndarray, ages: np.ndarray, visits: np.ndarray, padding: np.ndarray | None
) -> TorchBatch:
    return TorchBatch(
        torch.from_numpy(codes).long(),
        torch.from_numpy(ages),
        torch.from_numpy(visits).long(),
        None if padding is None else torch.from_numpy(padding),
    )
