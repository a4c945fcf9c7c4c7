import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from behrt_jax.data.sorting import distinct, find_ids, place_in, sort_rows

LIMITS = {"<i8": (-(2**63), 2**63 - 1), "<i4": (-(2**31), 2**31 - 1), "?": (0, 1)}


@st.composite
def tables(draw):
    """Columns of few distinct values, so that there are ties, of narrow and of full width."""
    rows = draw(st.integers(1, 60))
    columns = []
    for _ in range(draw(st.integers(1, 5))):
        kind = draw(st.sampled_from(list(LIMITS)))
        low, high = LIMITS[kind]
        step = draw(st.sampled_from([1, 1, 1000, 60_000_000])) if kind == "<i8" else 1
        least = draw(st.integers(-(-low // step), high // step)) * step  # no less than low
        width = draw(st.integers(0, (high - least) // step))
        pool = [least + step * draw(st.integers(0, width)) for _ in range(draw(st.integers(1, 6)))]
        columns.append(np.array([draw(st.sampled_from(pool)) for _ in range(rows)], kind))
    return columns


@given(tables(), st.booleans())
def test_rows_are_in_the_order_of_lexsort(columns, sorted_before):
    order = np.lexsort(columns[::-1])
    expected = [column[order] for column in columns]
    given_columns = expected if sorted_before else columns
    copies = [column.copy() for column in given_columns]
    for column, right in zip(sort_rows(given_columns), expected, strict=True):
        assert column.dtype == right.dtype
        assert column.tolist() == right.tolist()
    for column, copy in zip(given_columns, copies, strict=True):
        assert np.array_equal(column, copy)


@pytest.mark.parametrize("bits", [(16, 40), (16, 60), (40, 40, 40)])
def test_many_rows(bits):
    draw = np.random.default_rng(0)
    columns = [draw.integers(0, 2**count, 20_000) for count in bits]
    columns[0] %= 50  # ties
    order = np.lexsort(columns[::-1])
    for column, given_column in zip(sort_rows(columns), columns, strict=True):
        assert np.array_equal(column, given_column[order])


def test_no_rows():
    assert [len(column) for column in sort_rows([np.empty(0, np.int64), np.empty(0, bool)])] == [0, 0]


@given(st.lists(st.integers(-(2**63), 2**63 - 1) | st.integers(0, 5)))
def test_distinct(numbers):
    assert distinct(np.array(numbers, np.int64)).tolist() == sorted(set(numbers))


@pytest.mark.parametrize("sorted_before", [False, True])
def test_rows_that_the_highest_bits_do_not_tell_apart(sorted_before):
    """Rows equal in all that one word holds, for other columns or for a last digit that has no room."""
    random = np.random.default_rng(0)
    high = random.integers(0, 3, 5000) << 60
    last = random.integers(0, 9, 5000)
    columns = [high + random.integers(0, 4, 5000), random.integers(0, 2, 5000) << 50, last.astype(np.int32)]
    order = np.lexsort(columns[::-1])
    if sorted_before:  # by the first column alone
        columns = [column[np.argsort(columns[0], kind="stable")] for column in columns]
        order = np.lexsort(columns[::-1])
    for column, found in zip(columns, sort_rows(columns), strict=True):
        assert np.array_equal(found, column[order])


runs = st.lists(st.lists(st.integers(0, 9), max_size=8).map(sorted), min_size=1, max_size=6)
ids = st.integers(-(2**63), 2**63 - 1)


@given(runs, st.data(), st.booleans())
def test_places_are_those_of_searchsorted(runs, data, inclusive):
    at = [data.draw(st.integers(-2, 11)) for _ in runs]
    offsets = np.concatenate([[0], np.cumsum([len(run) for run in runs])])
    flat = np.array([value for run in runs for value in run], np.int64)
    found = place_in(flat, offsets[:-1], offsets[1:], np.array(at), inclusive)
    side = "right" if inclusive else "left"
    expected = [
        start + np.searchsorted(run, to, side) for start, run, to in zip(offsets, runs, at, strict=False)
    ]
    assert found.tolist() == expected


@given(st.lists(ids, unique=True, max_size=8), st.lists(ids, max_size=8), st.data())
def test_subjects_are_found_whatever_their_order(subjects, others, data):
    wanted = data.draw(st.permutations(subjects + others))
    found = find_ids(np.array(subjects, np.int64), np.array(wanted, np.int64))
    assert found.tolist() == [subjects.index(one) if one in subjects else -1 for one in wanted]
