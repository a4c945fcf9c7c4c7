import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from behrt_jax.data.packing import WindowChoice, consecutive_windows, subject_windows
from behrt_jax.data.ragged import ragged_indices
from behrt_jax.data.sequences import Sequences
from behrt_jax.errors import InputError

history_lengths = st.lists(st.integers(0, 30), max_size=20)
choices = st.sampled_from(["random", "recent", "first"])


def histories(lengths: list[int]) -> Sequences:
    tokens = sum(lengths)
    return Sequences(
        subject_ids=np.arange(len(lengths), dtype=np.int64),
        offsets=np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)]),
        codes=np.arange(tokens, dtype=np.int32),
        ages=np.zeros(tokens, np.float32),
        visits=np.zeros(tokens, np.int32),
        times=np.zeros(tokens, np.int64),
    )


@given(st.lists(st.tuples(st.integers(0, 100), st.integers(0, 9))))
def test_ragged_indices_concatenates_ranges(ranges: list[tuple[int, int]]):
    starts, lengths = np.array(ranges, np.int64).reshape(-1, 2).T
    indices = ragged_indices(starts, lengths)
    assert indices.dtype == np.int64
    assert indices.tolist() == [start + i for start, length in ranges for i in range(length)]


@given(history_lengths, st.integers(1, 40), choices, st.integers(0, 9))
def test_a_window_lies_in_its_subject(lengths: list[int], max_tokens: int, how: WindowChoice, seed: int):
    sequences = histories(lengths)
    windows = subject_windows(sequences, max_tokens, how, np.random.default_rng(seed))
    assert (windows.starts.dtype, windows.lengths.dtype) == (np.int64, np.int32)
    assert windows.lengths.tolist() == [min(n, max_tokens) for n in lengths]
    assert (windows.starts >= sequences.offsets[:-1]).all()
    assert (windows.starts + windows.lengths <= sequences.offsets[1:]).all()
    if how == "first":
        assert (windows.starts == sequences.offsets[:-1]).all()
    if how == "recent":
        assert (windows.starts + windows.lengths == sequences.offsets[1:]).all()


def test_random_windows_start_anywhere_with_equal_chance():
    sequences = histories([5] * 30_000)
    windows = subject_windows(sequences, 3, "random", np.random.default_rng(0))
    starts, counts = np.unique(windows.starts - sequences.offsets[:-1], return_counts=True)
    assert starts.tolist() == [0, 1, 2]
    np.testing.assert_allclose(counts, 10_000, rtol=0.05)


def test_random_windows_follow_the_generator():
    sequences = histories([50] * 20)
    starts = [subject_windows(sequences, 5, "random", np.random.default_rng(s)).starts for s in (0, 0, 1)]
    np.testing.assert_array_equal(starts[0], starts[1])
    assert (starts[0] != starts[2]).any()


@given(history_lengths, st.integers(1, 40))
def test_consecutive_windows_hold_every_token_once(lengths: list[int], max_tokens: int):
    sequences = histories(lengths)
    windows = consecutive_windows(sequences, max_tokens)
    assert (windows.starts.dtype, windows.lengths.dtype) == (np.int64, np.int32)
    assert len(windows) == sum(-(-n // max_tokens) for n in lengths)
    assert windows.lengths.max(initial=0) <= max_tokens
    tokens = ragged_indices(windows.starts, windows.lengths)
    np.testing.assert_array_equal(tokens, np.arange(sum(lengths)))
    # No window goes past the end of its subject: the first and last token have the same one.
    subject = np.repeat(np.arange(len(lengths)), lengths)
    np.testing.assert_array_equal(subject[windows.starts], subject[windows.starts + windows.lengths - 1])


def test_mistakes_name_the_option():
    sequences = histories([3])
    with pytest.raises(InputError, match=r"data\.max_length"):
        subject_windows(sequences, 0, "first")
    with pytest.raises(InputError, match=r"data\.max_length"):
        consecutive_windows(sequences, 0)
    with pytest.raises(InputError, match=r"data\.window is 'last': choose one of all, random, recent, first"):
        subject_windows(sequences, 2, "last")  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="generator"):
        subject_windows(sequences, 2, "random")
