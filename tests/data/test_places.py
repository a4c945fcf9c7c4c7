import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from behrt_jax.data.sorting import find_subjects, place_in

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
    found = find_subjects(np.array(subjects, np.int64), np.array(wanted, np.int64))
    assert found.tolist() == [subjects.index(one) if one in subjects else -1 for one in wanted]
