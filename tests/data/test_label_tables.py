"""Several label tables side by side: every pair once, with each table's own labels."""

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from behrt_jax.data.labels import Labels
from behrt_jax.data.tasks import read_label_tables, side_by_side
from behrt_jax.errors import InputError

pairs = st.tuples(st.integers(-3, 3), st.integers(-3, 3))
tables = st.lists(st.dictionaries(pairs, st.booleans(), min_size=1, max_size=12), min_size=1, max_size=4)


def labels_of(table):
    subjects, times = np.array(list(table), np.int64).T
    return Labels(subjects, times, np.array(list(table.values())), "boolean")


@given(tables, st.randoms(use_true_random=False))
def test_each_pair_comes_once_with_the_labels_that_the_tables_have_of_it(drawn, random):
    names = [f"task {k}" for k in range(len(drawn))]
    found = side_by_side(names, [labels_of(table) for table in drawn])
    ours = list(zip(found.pairs.subject_ids.tolist(), found.pairs.times.tolist(), strict=True))
    assert ours == sorted(set().union(*drawn))
    assert found.targets.dtype == np.float32 and found.names == tuple(names)
    theirs = [[float(table.get(pair, np.nan)) for table in drawn] for pair in ours]
    np.testing.assert_array_equal(found.targets, np.array(theirs, np.float32))

    shuffled = [dict(random.sample(list(table.items()), len(table))) for table in drawn]
    again = side_by_side(names, [labels_of(table) for table in shuffled])
    np.testing.assert_array_equal(again.targets, found.targets)


def write(file, **columns):
    keys = {"subject_id": pa.array([1, 2]), "prediction_time": pa.array([5, 5], pa.timestamp("us"))}
    pq.write_table(pa.table({**keys, **columns}), file)
    return file


def test_tables_are_called_after_their_files_and_0_and_1_are_binary_too(tmp_path):
    found = read_label_tables(
        [
            write(tmp_path / "death.parquet", boolean_value=[True, False]),
            write(tmp_path / "stay.long.parquet", integer_value=[0, 1]),
        ]
    )
    assert found.names == ("death", "stay.long")
    assert found.targets.tolist() == [[1, 0], [0, 1]]


@pytest.mark.parametrize(
    ("columns", "what"),
    [
        ({"integer_value": [1, 2]}, "integers other than 0 and 1"),
        ({"float_value": [0.0, 1.0]}, "float labels"),
        ({"boolean_value": [True, False], "float_value": [0.0, 1.0]}, "survival labels"),
    ],
)
def test_another_kind_of_task_is_refused_by_the_name_of_its_file(tmp_path, columns, what):
    good, other = write(tmp_path / "a.parquet", boolean_value=[True, False]), tmp_path / "b.parquet"
    write(other, **columns)
    with pytest.raises(
        InputError, match=rf"population\.labels: .*b\.parquet has {what}, but tasks .* binary"
    ):
        read_label_tables([good, other])
