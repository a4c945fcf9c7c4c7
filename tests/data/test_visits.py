from collections import Counter

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from behrt_jax.data.event_rules import first_in_visit


def check(visit, code):
    visit, code = np.array(visit, np.int32), np.array(code, np.int32)
    times = Counter(zip(visit.tolist(), code.tolist(), strict=True))
    firsts = list(dict.fromkeys(zip(visit.tolist(), code.tolist(), strict=True)))
    first, repeated, seen = first_in_visit(visit, code)
    assert [(int(visit[at]), int(code[at])) for at in np.flatnonzero(first)] == firsts
    assert first[repeated].all()
    found = {
        (int(visit[at]), int(code[at])): count for at, count in zip(repeated, seen.tolist(), strict=True)
    }
    assert found == {key: count for key, count in times.items() if count > 1}


@given(st.lists(st.tuples(st.integers(0, 30), st.integers(0, 12)), max_size=80), st.booleans())
def test_first_of_each_code_in_each_visit(events, interrupted):
    """Visits shorter and longer than those compared one by one, in a row or interrupted by others."""
    if not interrupted:
        events = sorted(events, key=lambda event: event[0])
    check([visit // 6 if visit < 18 else visit for visit, _ in events], [code for _, code in events])


def test_repeats_at_every_distance():
    for distance in range(1, 30):
        codes = [*range(distance), 0]  # the first code comes again at the end
        check([0, *[1] * len(codes), 2], [0, *codes, 0])


def test_no_repeat_leaves_all():
    first, repeated, seen = first_in_visit(np.array([0, 0, 1], np.int32), np.array([1, 2, 1], np.int32))
    assert first.tolist() == [True, True, True]
    assert len(repeated) == len(seen) == 0


def test_a_visit_interrupted_by_another():
    check([0, 1, 0, 1], [5, 5, 5, 6])
