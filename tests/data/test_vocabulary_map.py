"""Data prepared with one vocabulary, read by another."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from behrt_jax.data.sequences import Sequences, map_vocabulary
from behrt_jax.data.vocabulary import SPECIAL_TOKENS, UNK, Vocabulary


def vocabulary(codes, counts=None):
    counts = range(1, len(codes) + 1) if counts is None else counts
    return Vocabulary(
        (*SPECIAL_TOKENS, *codes),
        np.array([0] * len(SPECIAL_TOKENS) + list(counts), np.int64),
        (None,) * len(SPECIAL_TOKENS) + tuple(f"text of {code}" for code in codes),
    )


def sequences(codes):
    codes = np.asarray(codes, np.int32)
    tokens = len(codes)
    return Sequences(
        np.array([7]), np.array([0, tokens]), codes, np.zeros(tokens, np.float32),
        np.zeros(tokens, np.int32), np.arange(tokens),
    )  # fmt: skip


names = st.lists(st.text("abcd", min_size=1, max_size=2), unique=True, max_size=8)


@given(of_data=names, of_base=names, extend=st.booleans(), data=st.data())
def test_every_code_keeps_its_name_or_becomes_unknown(of_data, of_base, extend, data):
    counts = data.draw(st.lists(st.integers(0, 9), min_size=len(of_data), max_size=len(of_data)))
    ours, theirs = vocabulary(of_data, counts), vocabulary(of_base)
    found = map_vocabulary(ours, theirs, extend)
    codes = np.arange(len(ours), dtype=np.int32)
    given_sequences = sequences(codes)
    after = found.apply(given_sequences)
    seen = {code for code, count in zip(of_data, counts, strict=True) if count}
    for before, now in zip(ours.codes, after.codes, strict=True):
        name = found.vocabulary.codes[now]
        known = before in theirs.codes or (extend and before in seen)
        assert name == (before if known else "[UNK]")
    assert after.codes.dtype == np.int32
    assert after.times is given_sequences.times
    np.testing.assert_array_equal(given_sequences.codes, codes)
    # The base's own ids stay; new ones come after, each with its count and text.
    assert found.vocabulary.codes[: len(theirs)] == theirs.codes
    unknown = set(of_data) - set(of_base)
    assert set(found.new_codes) == (unknown & seen if extend else unknown)
    assert found.new_events == sum(
        count for code, count in zip(of_data, counts, strict=True) if code in unknown
    )
    if extend:
        assert found.vocabulary.codes[len(theirs) :] == found.new_codes
        for row in range(len(theirs), len(found.vocabulary)):
            code = found.vocabulary.codes[row]
            assert found.vocabulary.counts[row] == counts[of_data.index(code)]
            assert found.vocabulary.descriptions[row] == f"text of {code}"
    else:
        assert found.vocabulary is theirs


def test_new_codes_come_most_frequent_first():
    found = map_vocabulary(vocabulary(["A", "B", "C", "D"], [1, 5, 3, 0]), vocabulary(["B"]), extend=True)
    assert found.new_codes == ("C", "A")
    first = len(SPECIAL_TOKENS)
    assert found.ids[first:].tolist() == [first + 2, first, first + 1, UNK]
    assert found.new_events == 4


def test_equal_ids_are_not_copied():
    ours, theirs = vocabulary(["A", "B"]), vocabulary(["A", "B", "C"])
    for extend in (False, True):
        found = map_vocabulary(ours, theirs, extend)
        assert found.identical and found.vocabulary is theirs and found.new_codes == ()
        given_sequences = sequences([5, 6, 5])
        assert found.apply(given_sequences) is given_sequences
        assert found.apply_to({"train": given_sequences})["train"] is given_sequences
    other = map_vocabulary(vocabulary(["B", "A"]), theirs, extend=False)
    assert not other.identical
    assert other.apply(sequences([5, 6, 5])).codes.tolist() == [6, 5, 6]
