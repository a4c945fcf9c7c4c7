"""Small masked splits."""

from collections.abc import Iterable

import numpy as np

from behrt_jax.data.sequences import Sequences
from behrt_jax.evaluation.masked_codes import MaskedSplit

MASK = 1


def sequences_of(histories: Iterable[Iterable[int]]) -> Sequences:
    """Histories of codes, each event a year and a visit after the one before."""
    codes = [np.array(list(history), np.int32) for history in histories]
    lengths = np.array([len(history) for history in codes])
    place = np.concatenate([np.arange(length) for length in lengths])
    return Sequences(
        subject_ids=np.arange(len(codes), dtype=np.int64),
        offsets=np.concatenate([[0], np.cumsum(lengths)]),
        codes=np.concatenate(codes),
        ages=place.astype(np.float32),
        visits=place.astype(np.int32),
        times=place.astype(np.int64),
    )


def masked_split(histories: Iterable[Iterable[int]], targets: Iterable[int]) -> MaskedSplit:
    """Whole histories with the given tokens masked."""
    sequences = sequences_of(histories)
    targets = np.array(list(targets), np.int64)
    shown = sequences.codes.copy()
    shown[targets] = MASK
    owner = np.repeat(np.arange(len(sequences)), sequences.lengths)
    return MaskedSplit(sequences, shown, owner.astype(np.int64), targets)
