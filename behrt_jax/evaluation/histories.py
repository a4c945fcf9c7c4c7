"""Histories as counts of codes: what simple baselines see of the examples that a model reads."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from behrt_jax.data.examples import Examples
from behrt_jax.data.vocabulary import CLS, MASK, PAD, SEP
from behrt_jax.data.windows import ragged_indices

if TYPE_CHECKING:
    from scipy.sparse import csr_array


@dataclass(frozen=True, eq=False)
class Histories:
    """Counts of codes in the histories of n examples; V rows of the vocabulary."""

    counts: "csr_array"
    """float32 ``[n, V]``: how often each code occurs, padding and other marks left out."""
    last_visit: "csr_array"
    """float32 ``[n, V]``: the same for the last visit that is known."""
    ages: np.ndarray
    """float32 ``[n]``, years at the prediction time."""

    def __len__(self) -> int:
        return len(self.ages)


def count_codes(examples: Examples, vocabulary_rows: int, chosen: np.ndarray | None = None) -> Histories:
    """Counts of the examples, or of those at some places, int ``[n]``."""
    from scipy.sparse import csr_array

    chosen = np.arange(len(examples)) if chosen is None else chosen
    starts, lengths = examples.windows.starts[chosen], examples.windows.lengths[chosen]
    places = ragged_indices(starts, lengths)
    codes, visits = examples.sequences.codes[places], examples.sequences.visits[places]
    rows = np.repeat(np.arange(len(chosen)), lengths)
    last = np.repeat(examples.sequences.visits[starts + lengths - 1], lengths) == visits
    kept = ~np.isin(codes, (PAD, MASK, CLS, SEP))

    def counted(which: np.ndarray) -> "csr_array":
        ones = np.ones(np.count_nonzero(which), np.float32)
        return csr_array((ones, (rows[which], codes[which])), shape=(len(chosen), vocabulary_rows))

    return Histories(counted(kept), counted(kept & last), examples.ages[chosen])


def join_histories(parts: Sequence[Histories], order: np.ndarray) -> Histories:
    """All parts end to end, then taken in an order: int ``[n]``."""
    from scipy.sparse import csr_array, vstack

    counts, last_visit = (
        csr_array(vstack([getattr(part, name) for part in parts], format="csr"))[order]
        for name in ("counts", "last_visit")
    )
    return Histories(counts, last_visit, np.concatenate([part.ages for part in parts])[order])
