"""Labels beside the histories they are predicted from: which tokens lie before and after each of them."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from behrt_jax.data.events import SPLITS
from behrt_jax.data.labels import Labels
from behrt_jax.data.places import find_subjects, place_in
from behrt_jax.data.sequences import Sequences, SequenceSet
from behrt_jax.data.windows import ragged_indices

_PIECE_TOKENS = 1 << 22
"""Tokens looked at together."""


@dataclass(frozen=True, eq=False)
class PlacedLabels:
    """The labels of one split's subjects, sorted by subject and prediction time."""

    part: Sequences
    """The split."""
    subjects: np.ndarray
    """int64 ``[labels]``, places in ``part``."""
    times: np.ndarray
    """int64 ``[labels]``, prediction times in microseconds since 1970."""
    values: np.ndarray
    """int64 ``[labels]``: 0 and 1 where the labels are binary, else a number of the value."""

    def __len__(self) -> int:
        return len(self.subjects)

    @property
    def starts(self) -> np.ndarray:
        """First token of each label's subject, int64 ``[labels]``."""
        return self.part.offsets[self.subjects]

    @property
    def stops(self) -> np.ndarray:
        """One after the last token of each label's subject, int64 ``[labels]``."""
        return self.part.offsets[self.subjects + 1]

    def up_to(self, shift: int = 0, inclusive: bool = True) -> np.ndarray:
        """One after the last token at or before (or just before) prediction time + shift, ``[labels]``.

        From ``starts`` to ``up_to()`` is the input: the prediction time is inclusive. ``shift`` is in
        microseconds.
        """
        return place_in(self.part.times, self.starts, self.stops, self.times + shift, inclusive)


def place_labels(labels: Labels, data: SequenceSet) -> dict[str, PlacedLabels]:
    """Split name -> its labels; those of subjects without a sequence are left out."""
    positive = labels.positive()
    ids = labels.value_ids() if positive is None else positive
    placed = {}
    for name in SPLITS:
        part = data.splits[name]
        place = find_subjects(part.subject_ids, labels.subject_ids)
        known = place >= 0
        subjects = place[known]
        times, values = labels.times[known], ids[known].astype(np.int64)
        by_time = np.lexsort([values, times, subjects])
        placed[name] = PlacedLabels(part, subjects[by_time], times[by_time], values[by_time])
    return placed


@dataclass(frozen=True, eq=False)
class CodeCounts:
    """By how many subjects with positive and with negative labels each code was seen in some window."""

    positive: np.ndarray
    """int64 ``[V]``: subjects with the code in the window of one of their positive labels."""
    negative: np.ndarray
    """int64 ``[V]``: the same for negative labels. A subject may be in both."""
    positives: int
    """Subjects with a positive label."""
    negatives: int
    """Subjects with a negative label."""


def count_codes(
    placed: Sequence[PlacedLabels],
    begins: Sequence[np.ndarray],
    ends: Sequence[np.ndarray],
    rows: int,
) -> CodeCounts:
    """Count subjects, not labels, so that one subject with many labels weighs no more than another.

    Args:
        placed: binary labels of each split.
        begins: first token of each label's window, int64 ``[labels]`` for each split; later labels of a
            subject have later windows.
        ends: one after its last token, likewise.
        rows: of the vocabulary (V).
    """
    counts, subjects = np.zeros((2, rows), np.int64), [0, 0]
    for labels, begin, end in zip(placed, begins, ends, strict=True):
        for value in (0, 1):
            own = labels.values == value
            subjects[value] += len(np.unique(labels.subjects[own]))
            counts[value] += _subjects_by_code(labels, own, begin, end, rows)
    return CodeCounts(counts[1], counts[0], subjects[1], subjects[0])


def _subjects_by_code(
    labels: PlacedLabels, own: np.ndarray, begin: np.ndarray, end: np.ndarray, rows: int
) -> np.ndarray:
    subject, begin, end = labels.subjects[own], begin[own], end[own]
    # Windows of one subject may overlap: each token is looked at once.
    begin = np.maximum(begin, np.concatenate([[0], np.maximum.accumulate(end)[:-1]])) if len(end) else begin
    length = np.maximum(end - begin, 0)
    counts = np.zeros(rows, np.int64)
    if not length.sum():
        return counts
    # A piece ends where a subject does.
    last = np.searchsorted(subject, subject, side="right") - 1
    piece = np.cumsum(length)[last] // _PIECE_TOKENS  # [labels]
    for start, stop in _runs(piece):
        tokens = ragged_indices(begin[start:stop], length[start:stop])
        owner = np.repeat(subject[start:stop], length[start:stop])
        pairs = np.unique(owner * rows + labels.part.codes[tokens])
        counts += np.bincount(pairs % rows, minlength=rows)
    return counts


def _runs(values: np.ndarray) -> list[tuple[int, int]]:
    """Where runs of equal values begin and end."""
    cuts = np.flatnonzero(np.diff(values)) + 1
    edges = [0, *cuts.tolist(), len(values)]
    return list(pairwise(edges))
