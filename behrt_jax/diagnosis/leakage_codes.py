"""Checks of codes against labels: single codes that tell the outcome."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from behrt_jax.data.events import DAY, SPLITS
from behrt_jax.data.labels import Labels
from behrt_jax.data.sequences import Sequences, SequenceSet
from behrt_jax.data.sorting import find_ids, place_in, ragged_indices, runs
from behrt_jax.data.vocabulary import Vocabulary
from behrt_jax.diagnosis.finding import Finding
from behrt_jax.diagnosis.leakage_data import FIRST_CODE

# Labels beside the histories they are predicted from: which tokens lie before and after each of them.

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
        place = find_ids(part.subject_ids, labels.subject_ids)
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
    for start, stop in runs(piece):
        tokens = ragged_indices(begin[start:stop], length[start:stop])
        owner = np.repeat(subject[start:stop], length[start:stop])
        pairs = np.unique(owner * rows + labels.part.codes[tokens])
        counts += np.bincount(pairs % rows, minlength=rows)
    return counts


PRECISION = 0.95
"""Share of positives among the subjects with a code from which on it tells the outcome."""
LEAST_PRECISION = 0.8
"""What that share must surely exceed; strong predictors that are no leakage come near it."""
LEAST_SUBJECTS = 5
"""Fewest positive subjects with the code."""
_ODDS = 10.0
_CHANCE = 0.01  # that any code of the vocabulary seems to tell the outcome though none does
_DOUBT = 0.05  # that a code's true share of positives is below LEAST_PRECISION
_NAMED = 5  # codes in a message


def suspected_codes(counts: CodeCounts) -> np.ndarray:
    """Codes whose presence alone seems to predict a positive label almost perfectly: bool ``[V]``.

    Of the subjects with such a code at least ``PRECISION`` are positive, their odds are ten times those
    of all, and by Chernoff's bound, corrected for the number of codes, it is not by chance.
    """
    seen = counts.positive + counts.negative  # [V]
    base = counts.positives / max(counts.positives + counts.negatives, 1)
    if not 0 < base < 1:
        return np.zeros(len(seen), bool)
    share = counts.positive / np.maximum(seen, 1)
    odds = (counts.positive + 0.5) / (counts.negative + 0.5)
    found = (share >= PRECISION) & (counts.positive >= LEAST_SUBJECTS)
    found &= odds >= _ODDS * base / (1 - base)
    found &= _evidence(share, seen, base) > np.log(len(seen) / _CHANCE)
    found[:FIRST_CODE] = False
    return found


def revealing_codes(counts: CodeCounts) -> np.ndarray:
    """Those of :func:`suspected_codes` that enough subjects have for their precision to be sure.

    By Chernoff's bound, the share of positives exceeds ``LEAST_PRECISION``: 14 positive subjects and no
    negative one will do.
    """
    seen = counts.positive + counts.negative  # [V]
    share = counts.positive / np.maximum(seen, 1)
    return suspected_codes(counts) & (_evidence(share, seen, LEAST_PRECISION) > np.log(1 / _DOUBT))


def _evidence(share: np.ndarray, seen: np.ndarray, expected: float) -> np.ndarray:
    """Nats by which ``share`` of ``seen``, ``[V]`` each, speaks for more than the expected share."""
    with np.errstate(divide="ignore", invalid="ignore"):
        other = np.where(share < 1, (1 - share) * np.log((1 - share) / (1 - expected)), 0)
        divergence = np.where(share > expected, share * np.log(share / expected) + other, 0)
    return seen * divergence


def check_codes(placed: Mapping[str, PlacedLabels], vocabulary: Vocabulary) -> Iterator[Finding]:
    """Single codes that tell the label: anywhere in the input, at its very end, and just after it."""
    parts = list(placed.values())
    names, rows = vocabulary.codes, len(vocabulary)
    inputs = [labels.up_to() for labels in parts]
    before = [labels.up_to(inclusive=False) for labels in parts]
    day_before = [labels.up_to(-DAY, inclusive=False) for labels in parts]
    day_after = [labels.up_to(DAY) for labels in parts]
    everywhere = count_codes(parts, [labels.starts for labels in parts], inputs, rows)
    if (found := revealing_codes(everywhere)).any():
        yield Finding(
            "outcome-code-in-input",
            "error",
            f"The presence of one of {found.sum():,} codes in the input alone predicts a positive label: "
            f"{_named(found, everywhere, names)}.",
            "It is the outcome under another name, or only written once the outcome is known.",
            "Leave these codes out with exclude_codes, or predict only for subjects without them.",
        )
    at = count_codes(parts, before, inputs, rows)
    if (found := revealing_codes(at)).any():
        yield Finding(
            "label-revealed-at-prediction-time",
            "error",
            f"{found.sum():,} codes at exactly the prediction time predict a positive label: "
            f"{_named(found, at, names)}.",
            "The prediction time is inclusive, so the input holds the event that the label was made from.",
            "Set the prediction time before that event, a microsecond at least.",
        )
    ahead = count_codes(parts, day_before, before, rows)
    if (found := revealing_codes(ahead)).any():
        yield Finding(
            "label-revealed-just-before",
            "error",
            f"{found.sum():,} codes in the day before the prediction time predict a positive label: "
            f"{_named(found, ahead, names)}.",
            "The outcome is already under way, or was recorded, when it is to be predicted.",
            "Predict earlier: put a gap between the input and the outcome.",
        )
    weak = suspected_codes(everywhere) & ~revealing_codes(everywhere)
    if weak.any():
        yield Finding(
            "outcome-code-suspected",
            "info",
            f"{weak.sum():,} codes in the input go with a positive label, but few subjects have them: "
            f"{_named(weak, everywhere, names)}.",
            "They may be strong predictors, or the outcome under another name.",
            "Look at what these codes mean.",
        )
    after = count_codes(parts, inputs, day_after, rows)
    if (found := revealing_codes(after)).any():
        yield Finding(
            "outcome-just-after-prediction",
            "info",
            f"{found.sum():,} codes in the day after the prediction time go with a positive label: "
            f"{_named(found, after, names)}.",
            "They are not in the input; but where clocks differ by hours or hold dates alone, such events "
            "slip into it.",
            "See that all times have the same clock, or predict earlier.",
        )


def _named(found: np.ndarray, counts: CodeCounts, names: tuple[str, ...]) -> str:
    """The codes with most positive subjects, with their figures."""
    rows = np.flatnonzero(found)
    rows = rows[np.argsort(-counts.positive[rows], kind="stable")]
    listed = [
        f"{names[row]} ({counts.positive[row]:,} positive and {counts.negative[row]:,} negative subjects "
        f"of {counts.positives:,} and {counts.negatives:,})"
        for row in rows[:_NAMED]
    ]
    return ", ".join(listed) + (f" and {len(rows) - _NAMED:,} more" if len(rows) > _NAMED else "")
