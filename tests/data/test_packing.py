import time

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from behrt_jax.data.packing import (
    WindowChoice,
    choose_windows,
    one_per_row,
    pack_lengths,
    plan_rows,
)
from behrt_jax.data.sequences import Sequences
from behrt_jax.data.sorting import ragged_indices
from behrt_jax.errors import InputError


@st.composite
def packable(draw: st.DrawFn) -> tuple[np.ndarray, int]:
    row_length = draw(st.integers(1, 60))
    lengths = draw(st.lists(st.integers(1, row_length), max_size=120))
    return np.array(lengths, np.int32), row_length


def long_tailed(subjects: int, longest: int, mean: float = 15.0, spread: float = 0.9) -> np.ndarray:
    rng = np.random.default_rng(0)
    lengths = rng.lognormal(np.log(mean) - spread**2 / 2, spread, subjects)
    return np.clip(np.round(lengths), 1, longest).astype(np.int32)


def row_tokens(lengths: np.ndarray, windows: np.ndarray, row_offsets: np.ndarray) -> np.ndarray:
    return np.diff(np.concatenate([[0], np.cumsum(lengths[windows])])[row_offsets])


@given(packable(), st.integers(0, 9))
def test_every_window_is_in_one_row_and_no_row_overflows(case: tuple[np.ndarray, int], seed: int):
    lengths, row_length = case
    plan = plan_rows(lengths, row_length, np.random.default_rng(seed))
    assert (plan.windows.dtype, plan.row_offsets.dtype) == (np.int64, np.int64)
    np.testing.assert_array_equal(np.sort(plan.windows), np.arange(len(lengths)))
    assert (plan.row_offsets[0], plan.row_offsets[-1]) == (0, len(lengths))
    assert (np.diff(plan.row_offsets) > 0).all()
    assert row_tokens(lengths, plan.windows, plan.row_offsets).max(initial=0) <= row_length
    assert len(plan) >= -(-lengths.sum() // row_length)


@given(packable(), st.integers(0, 9))
def test_rows_depend_on_the_multiset_of_lengths_only(case: tuple[np.ndarray, int], seed: int):
    lengths, row_length = case
    rng = np.random.default_rng(seed)
    packing = pack_lengths(lengths, row_length)
    shuffled = pack_lengths(rng.permutation(lengths), row_length)
    for name in ("lengths", "offsets", "uses"):
        np.testing.assert_array_equal(getattr(packing, name), getattr(shuffled, name))
    assert packing.rows == len(plan_rows(rng.permutation(lengths), row_length, rng))


@given(packable())
def test_packing_is_best_fit_decreasing(case: tuple[np.ndarray, int]):
    lengths, row_length = case
    spaces: list[int] = []  # one window at a time, no histogram
    for length in sorted(lengths.tolist(), reverse=True):
        fits = [space for space in spaces if space >= length]
        if fits:
            spaces.remove(min(fits))
        spaces.append((min(fits) if fits else row_length) - length)
    packing = pack_lengths(lengths, row_length)
    composition_tokens = [
        packing.lengths[a:b].sum() for a, b in zip(packing.offsets, packing.offsets[1:], strict=False)
    ]
    filled = np.repeat(np.array(composition_tokens, int), packing.uses)
    assert sorted((row_length - filled).tolist()) == sorted(spaces)


@pytest.mark.parametrize("row_length", [50, 100, 200])
@pytest.mark.parametrize("subjects", [4_000, 100_000])
def test_long_tailed_histories_fill_the_rows(subjects: int, row_length: int):
    lengths = long_tailed(subjects, row_length)
    assert lengths.sum() / (pack_lengths(lengths, row_length).rows * row_length) >= 0.99


def test_planning_is_quick_at_scale():
    rng = np.random.default_rng(0)
    short = long_tailed(300_000, 200)
    many_lengths = rng.integers(1, 8193, 300_000)  # the worst case: thousands of distinct lengths
    started = time.perf_counter()
    plan_rows(short, 200, rng)
    plan_rows(many_lengths, 8192, rng)
    assert time.perf_counter() - started < 2


def test_a_plan_follows_the_generator():
    lengths = long_tailed(500, 50)
    plans = [plan_rows(lengths, 50, np.random.default_rng(seed)) for seed in (0, 0, 1)]
    np.testing.assert_array_equal(plans[0].windows, plans[1].windows)
    np.testing.assert_array_equal(plans[0].row_offsets, plans[1].row_offsets)
    assert (plans[0].windows != plans[2].windows).any()
    assert (np.diff(plans[0].row_offsets) != np.diff(plans[2].row_offsets)).any()  # rows in another order


def test_windows_of_one_length_meet_by_chance():
    lengths = np.array([7, 7, 7, 3, 3, 3])
    meetings = np.zeros((3, 3), int)
    for seed in range(900):
        plan = plan_rows(lengths, 10, np.random.default_rng(seed))
        for row in plan.windows.reshape(3, 2):
            meetings[row.min(), row.max() - 3] += 1
    np.testing.assert_allclose(meetings, 300, rtol=0.2)


def test_windows_that_cannot_be_packed():
    with pytest.raises(ValueError, match="51 tokens does not fit in a row of 50"):
        plan_rows(np.array([3, 51]), 50, np.random.default_rng(0))
    with pytest.raises(ValueError, match="0 tokens"):
        pack_lengths(np.array([3, 0]), 50)


def test_one_per_row():
    plan = one_per_row(4)
    assert plan.windows.tolist() == [0, 1, 2, 3]
    assert plan.row_offsets.tolist() == [0, 1, 2, 3, 4]
    shuffled = one_per_row(100, np.random.default_rng(0))
    assert sorted(shuffled.windows) == list(range(100)) != shuffled.windows.tolist()


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
    windows = choose_windows(sequences, max_tokens, how, np.random.default_rng(seed))
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
    windows = choose_windows(sequences, 3, "random", np.random.default_rng(0))
    starts, counts = np.unique(windows.starts - sequences.offsets[:-1], return_counts=True)
    assert starts.tolist() == [0, 1, 2]
    np.testing.assert_allclose(counts, 10_000, rtol=0.05)


def test_random_windows_follow_the_generator():
    sequences = histories([50] * 20)
    starts = [choose_windows(sequences, 5, "random", np.random.default_rng(s)).starts for s in (0, 0, 1)]
    np.testing.assert_array_equal(starts[0], starts[1])
    assert (starts[0] != starts[2]).any()


@given(history_lengths, st.integers(1, 40))
def test_consecutive_windows_hold_every_token_once(lengths: list[int], max_tokens: int):
    sequences = histories(lengths)
    windows = choose_windows(sequences, max_tokens, "all")
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
        choose_windows(sequences, 0, "first")
    with pytest.raises(InputError, match=r"data\.max_length"):
        choose_windows(sequences, 0, "all")
    with pytest.raises(InputError, match=r"data\.window is 'last': choose one of all, random, recent, first"):
        choose_windows(sequences, 2, "last")  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="generator"):
        choose_windows(sequences, 2, "random")
