import time

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from behrt_jax.data.packing import one_per_row, pack_lengths, plan_rows


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
