import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from behrt_jax.data.events import EventCounts
from behrt_jax.data.labels import Labels
from behrt_jax.data.sequences import Sequences, SequenceSet
from behrt_jax.data.vocabulary import SPECIAL_TOKENS, Vocabulary
from behrt_jax.diagnosis import leakage_codes
from behrt_jax.diagnosis.leakage_codes import count_codes, revealing_codes, suspected_codes
from behrt_jax.diagnosis.leakage_labels import place_labels

CODES = 4
ROWS = len(SPECIAL_TOKENS) + CODES


@st.composite
def histories(draw):
    """Up to six subjects with events at small times, and labels of them, some unknown."""
    times = [sorted(draw(st.lists(st.integers(0, 9), min_size=1, max_size=8))) for _ in range(6)]
    codes = [draw(st.lists(st.integers(5, ROWS - 1), min_size=len(own), max_size=len(own))) for own in times]
    labels = draw(st.lists(st.tuples(st.integers(0, 7), st.integers(-1, 10), st.booleans()), max_size=20))
    return times, codes, labels


def sequence_set(times, codes):
    def part(rows):
        lengths = [len(times[row]) for row in rows]
        flat = np.array([at for row in rows for at in times[row]], np.int64)
        return Sequences(
            subject_ids=np.array(rows, np.int64),
            offsets=np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
            codes=np.array([code for row in rows for code in codes[row]], np.int32),
            ages=np.zeros(len(flat), np.float32),
            visits=np.zeros(len(flat), np.int32),
            times=flat,
        )

    names = (*SPECIAL_TOKENS, *"ABCD")
    vocabulary = Vocabulary(names, np.zeros(ROWS, np.int64), (None,) * ROWS)
    splits = {"train": part([0, 1, 2, 3]), "tuning": part([4, 5]), "held_out": part([])}
    return SequenceSet(vocabulary, splits, EventCounts(), "")


def as_labels(rows):
    columns = list(zip(*rows, strict=True)) or [(), (), ()]
    ids, times, values = (
        np.array(column, kind) for column, kind in zip(columns, (np.int64, np.int64, bool), strict=True)
    )
    return Labels(ids, times, values, "boolean")


@given(histories(), st.sampled_from([1, 3, 1 << 22]))
def test_counts_are_those_of_brute_force(drawn, piece):
    times, codes, rows = drawn
    data = sequence_set(times, codes)
    parts = list(place_labels(as_labels(rows), data).values())
    assert sum(len(part) for part in parts) == sum(subject < 6 for subject, _, _ in rows)
    saved, leakage_codes._PIECE_TOKENS = leakage_codes._PIECE_TOKENS, piece
    try:
        counts = count_codes(parts, [part.starts for part in parts], [part.up_to() for part in parts], ROWS)
        last = count_codes(
            parts, [part.up_to(-2, inclusive=False) for part in parts], [part.up_to() for part in parts], ROWS
        )
    finally:
        leakage_codes._PIECE_TOKENS = saved
    for value, own, total, recent in (
        (True, counts.positive, counts.positives, last.positive),
        (False, counts.negative, counts.negatives, last.negative),
    ):
        expected = np.zeros(ROWS, np.int64)
        expected_recent = np.zeros(ROWS, np.int64)
        subjects = {subject for subject, _, label in rows if label == value and subject < 6}
        for subject in subjects:
            at = [time for other, time, label in rows if other == subject and label == value]
            events = list(zip(times[subject], codes[subject], strict=True))
            for code in {code for when, code in events if any(when <= time for time in at)}:
                expected[code] += 1
            for code in {code for when, code in events if any(time - 2 <= when <= time for time in at)}:
                expected_recent[code] += 1
        assert total == len(subjects)
        np.testing.assert_array_equal(own, expected)
        np.testing.assert_array_equal(recent, expected_recent)


def counts(positive, negative, positives, negatives):
    """Of one code, among a thousand others without any event."""
    columns = np.zeros((2, 1000), np.int64)
    columns[:, 10] = positive, negative
    return leakage_codes.CodeCounts(*columns, positives, negatives)


def test_which_codes_tell_the_outcome():
    assert revealing_codes(counts(20, 0, 100, 900))[10]
    assert revealing_codes(counts(95, 5, 100, 900))[10]
    assert revealing_codes(counts(14, 0, 100, 900))[10]
    assert not revealing_codes(counts(13, 0, 100, 900))[10]  # four of five may be all there is to it
    assert suspected_codes(counts(13, 0, 100, 900))[10]
    assert not suspected_codes(counts(90, 10, 100, 900))[10]  # not precise enough
    assert not suspected_codes(counts(4, 0, 100, 900))[10]  # too few
    assert not suspected_codes(counts(8, 0, 500, 500))[10]  # one of 1000 codes does that by chance
    assert not suspected_codes(counts(96, 4, 900, 100))[10]  # most are positive anyway
    assert not suspected_codes(counts(191, 9, 700, 300))[10]  # odds not ten times those of all
    assert not suspected_codes(counts(20, 0, 100, 0)).any()
    assert revealing_codes(counts(20, 0, 100, 900)).sum() == 1


@given(st.integers(0, 2**32 - 1))
def test_no_code_tells_labels_drawn_at_random(seed):
    rng = np.random.default_rng(seed)
    share = rng.uniform(0.05, 0.6)
    seen = rng.integers(0, 60, 1000)
    positive = rng.binomial(seen, share)
    found = suspected_codes(
        leakage_codes.CodeCounts(positive, seen - positive, int(10_000 * share), 10_000 - int(10_000 * share))
    )
    assert found.sum() == 0
