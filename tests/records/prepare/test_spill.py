import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from behrt_jax.records.prepare import spill as routing

LOW, HIGH = -(2**63), 2**63 - 1
NUMBERS = st.one_of(st.integers(0, 300), st.integers(-(10**6), 10**6), st.integers(LOW, HIGH))


@given(st.lists(NUMBERS, min_size=1, max_size=60), st.lists(NUMBERS, max_size=20), st.integers(1, 9))
def test_each_subject_goes_to_the_bucket_of_its_range(ids, cuts, cells):
    boundaries = np.unique(np.array(cuts, np.int64))
    batch = pa.RecordBatch.from_pydict({"subject_id": pa.array(ids, pa.int64()), "row": range(len(ids))})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(routing, "_CELLS", cells)
        found = routing.Buckets(boundaries).cut(batch)
    expected = np.searchsorted(boundaries, np.array(ids, np.int64), side="right").tolist()
    rows = {bucket: part["row"].to_pylist() for bucket, part in found}
    assert rows == {
        bucket: [row for row, own in enumerate(expected) if own == bucket] for bucket in sorted(set(expected))
    }


@given(st.lists(st.lists(NUMBERS, min_size=1, max_size=20), max_size=8), st.sampled_from([4, 500, 1 << 16]))
def test_subjects_are_listed_once_however_far_apart(chunks, marks):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(routing, "_MARKS", marks)
        patch.setattr(routing, "_MANY_SUBJECTS", 16)
        subjects = routing.SubjectSet()
        for chunk in chunks:
            subjects.add(np.array(chunk, np.int64))
        found = subjects.all()
    assert found.dtype == np.int64
    assert found.tolist() == sorted({number for chunk in chunks for number in chunk})
