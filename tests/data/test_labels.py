import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from behrt_jax.data.labels import Labels, read_label_tables, read_labels, side_by_side
from behrt_jax.errors import InputError

IDS = pa.array([-(2**63), 2**53 + 1, 7], pa.int64())
TIMES = pa.array([-5, 0, 10**15], pa.timestamp("us"))
VALUES = {
    "boolean": pa.array([True, False, True]),
    "integer": pa.array([2**53 + 1, 0, 1], pa.int64()),
    "float": pa.array([0.5, -1.0, 2.0], pa.float32()),
    "categorical": pa.array(["a", "b", "a"]),
}


def write(file, **columns):
    file.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns), file)
    return file


def labels(**changes):
    return {"subject_id": IDS, "prediction_time": TIMES, "boolean_value": VALUES["boolean"]} | changes


@pytest.mark.parametrize("kind", VALUES)
def test_each_kind_is_read_exactly(tmp_path, kind):
    others = {f"{other}_value": pa.nulls(3, values.type) for other, values in VALUES.items()}
    file = write(
        tmp_path / "labels.parquet",
        subject_id=IDS,
        prediction_time=TIMES,
        **(others | {f"{kind}_value": VALUES[kind]}),
    )
    read = read_labels(file)
    assert read.kind == kind
    assert read.subject_ids.dtype == read.times.dtype == np.int64
    assert read.subject_ids.tolist() == IDS.to_pylist()
    assert read.times.tolist() == TIMES.cast(pa.int64()).to_pylist()
    assert read.values.tolist() == VALUES[kind].to_pylist()
    assert len(read) == 3


def test_which_labels_are_positive(tmp_path):
    boolean = read_labels(write(tmp_path / "a.parquet", **labels())).positive()
    assert boolean is not None
    assert boolean.tolist() == [True, False, True]
    columns = labels(integer_value=pa.array([1, 0, 0], pa.int64()))
    del columns["boolean_value"]
    whole = read_labels(write(tmp_path / "b.parquet", **columns)).positive()
    assert whole is not None
    assert whole.tolist() == [True, False, False]
    counts = columns | {"integer_value": pa.array([1, 0, 2])}
    assert read_labels(write(tmp_path / "c.parquet", **counts)).positive() is None
    text = {**columns, "categorical_value": VALUES["categorical"]}
    del text["integer_value"]
    assert read_labels(write(tmp_path / "d.parquet", **text)).positive() is None


def test_a_folder_is_read_as_one_table(tmp_path):
    write(tmp_path / "task" / "train" / "0.parquet", **labels())
    others = pa.array([1, 2, 3], pa.int64())
    write(tmp_path / "task" / "tuning" / "0.parquet", **labels(subject_id=others))
    write(tmp_path / "task" / ".hidden.parquet", **labels())
    write(tmp_path / "task" / "train" / ".ipynb_checkpoints" / "0.parquet", **labels())
    write(tmp_path / "task" / "_temporary" / "0.parquet", **labels())
    assert read_labels(tmp_path / "task").subject_ids.tolist() == [*IDS.to_pylist(), 1, 2, 3]
    (tmp_path / "task" / "train").rename(tmp_path / "disk")
    (tmp_path / "task" / "train").symlink_to(tmp_path / "disk")
    assert read_labels(tmp_path / "task").subject_ids.tolist() == [*IDS.to_pylist(), 1, 2, 3]
    (tmp_path / "task" / "_delta_log").mkdir()
    with pytest.raises(InputError, match="task is a table of Delta Lake"):
        read_labels(tmp_path / "task")


@pytest.mark.parametrize(
    "columns", [{}, {"subject_id": pa.nulls(0), "prediction_time": pa.array([], pa.string())}], ids=len
)
def test_files_without_rows_add_nothing(tmp_path, columns):
    write(tmp_path / "0.parquet", **labels())
    write(tmp_path / "1.parquet", **columns)
    assert read_labels(tmp_path).subject_ids.tolist() == IDS.to_pylist()


def test_whole_numbers_in_floating_point_are_integers(tmp_path):
    columns = WITHOUT | {"subject_id": pa.array([7.0, 8.0, -9.0]), "integer_value": pa.array([0.0, 2.0, 1.0])}
    read = read_labels(write(tmp_path / "l.parquet", **columns))
    assert (read.subject_ids.tolist(), read.values.tolist()) == ([7, 8, -9], [0, 2, 1])
    assert read.values.dtype == np.int64


@given(shift=st.integers(-(10**9), 10**9), unit=st.sampled_from(["s", "ms", "us", "ns"]))
def test_times_of_any_unit_are_microseconds(tmp_path_factory, shift, unit):
    per_second = {"s": 1, "ms": 10**3, "us": 10**6, "ns": 10**9}[unit]
    times = pa.array([shift * per_second] * 3, pa.int64()).cast(pa.timestamp(unit))
    file = write(tmp_path_factory.mktemp("times") / "labels.parquet", **labels(prediction_time=times))
    assert set(read_labels(file).times.tolist()) == {shift * 10**6}


WITHOUT = {"subject_id": IDS, "prediction_time": TIMES}
SETS = pa.array([["b", "a", "b"], [], ["c"]], pa.list_(pa.string()))


@pytest.mark.parametrize("kind", [pa.list_(pa.string()), pa.large_list(pa.large_string())])
def test_sets_of_codes(tmp_path, kind):
    file = write(tmp_path / "labels.parquet", **WITHOUT, categorical_values=SETS.cast(kind))
    read = read_labels(file)
    assert (read.kind, read.values.dtype, read.positive()) == ("codes", object, None)
    assert read.values.tolist() == [("a", "b"), (), ("c",)]
    none = pa.array([[], [], []], pa.list_(pa.null()))
    read = read_labels(write(tmp_path / "none.parquet", **WITHOUT, categorical_values=none))
    assert read.values.tolist() == [(), (), ()]


def test_survival_has_an_event_and_days_in_every_row(tmp_path):
    read = read_labels(write(tmp_path / "labels.parquet", **labels(float_value=pa.array([3.5, 0.0, 10.0]))))
    assert (read.kind, read.values.dtype, read.positive()) == ("survival", np.float64, None)
    assert read.values.tolist() == [[3.5, 1.0], [0.0, 0.0], [10.0, 1.0]]


@pytest.mark.parametrize(
    "columns", [{}, {"boolean_value": pa.nulls(3, pa.bool_()), "float_value": pa.nulls(3)}]
)
def test_a_table_without_values_is_read_where_none_are_needed(tmp_path, columns):
    file = write(tmp_path / "keys" / "0.parquet", **WITHOUT, **columns)
    read = read_labels(file, without_values=True)
    assert (read.kind, read.values.tolist(), read.positive()) == ("none", [None] * 3, None)
    assert (read.subject_ids.tolist(), read.times.tolist()) == (IDS.to_pylist(), [-5, 0, 10**15])
    write(tmp_path / "keys" / "1.parquet", **WITHOUT)
    read = read_labels(tmp_path / "keys", without_values=True)
    assert (len(read), read.duplicates) == (3, 3)
    assert len(read_labels(tmp_path / "keys", without_values=True, as_written=True)) == 6
    # Outcomes that are known of some alone would be judged on those alone.
    write(tmp_path / "keys" / "2.parquet", **labels(subject_id=pa.array([1, 2, 3])))
    with pytest.raises(InputError, match="has no value in 6 of 9 rows: fill in boolean_value"):
        read_labels(tmp_path / "keys", without_values=True)


def test_values_are_read_where_none_are_needed(tmp_path):
    file = write(tmp_path / "labels.parquet", **labels())
    assert read_labels(file, without_values=True).values.tolist() == VALUES["boolean"].to_pylist()


REPEATED = {
    "boolean_value": ([True, False, True, True, False], [True, False, True, False, False]),
    "integer_value": ([1, 2, 1, 1, 2], [1, 2, 1, 3, 2]),
    "float_value": ([0.5, 2.0, 0.5, 0.5, 2.0], [0.5, 2.0, 0.5, 0.25, 2.0]),
    "categorical_value": (["a", "b", "a", "a", "b"], ["a", "b", "a", "c", "b"]),
    "categorical_values": ([["a", "b"], [], ["b", "a"], ["a", "b"], []], [["a"], [], ["a"], [], []]),
}


@pytest.mark.parametrize("column", REPEATED)
def test_repeats_are_left_out_and_contradictions_refused(tmp_path, column):
    keys = {
        "subject_id": pa.array([7, 1, 7, 7, 1]),
        "prediction_time": pa.array([5, 5, 5, 5, 6], pa.timestamp("us")),
    }
    equal, contradictory = REPEATED[column]
    file = write(tmp_path / "equal.parquet", **keys, **{column: pa.array(equal)})
    read = read_labels(file)
    assert (read.subject_ids.tolist(), read.times.tolist()) == ([7, 1, 1], [5, 5, 6])
    assert read.duplicates == 2
    whole = read_labels(file, as_written=True)
    assert (len(whole), whole.duplicates) == (5, 0)
    assert read.value_ids().tolist() == whole.value_ids()[[0, 1, 4]].tolist()
    file = write(tmp_path / "differ.parquet", **keys, **{column: pa.array(contradictory)})
    with pytest.raises(InputError, match=r"differ\.parquet has 1 pairs of subject and prediction time"):
        read_labels(file)
    assert len(read_labels(file, as_written=True)) == 5


def test_repeats_of_survival(tmp_path):
    keys = {"subject_id": pa.array([7, 7, 8]), "prediction_time": pa.array([5, 5, 5], pa.timestamp("us"))}
    seen = {"boolean_value": pa.array([True, True, False])}
    read = read_labels(write(tmp_path / "a.parquet", **keys, **seen, float_value=pa.array([2.0, 2.0, 2.0])))
    assert (read.values.tolist(), read.duplicates) == ([[2.0, 1.0], [2.0, 0.0]], 1)
    with pytest.raises(InputError, match="1 pairs of subject"):
        read_labels(write(tmp_path / "b.parquet", **keys, **seen, float_value=pa.array([2.0, 3.0, 2.0])))


def test_some_rows_of_labels(tmp_path):
    read = read_labels(write(tmp_path / "labels.parquet", **labels()))
    assert read.take([2, 0]).subject_ids.tolist() == [7, -(2**63)]
    assert read.take(read.values).times.tolist() == [-5, 10**15]


MISTAKES = {
    "no subject": (dict(list(labels().items())[1:]), "has no column subject_id"),
    "no time": ({"subject_id": IDS, "boolean_value": VALUES["boolean"]}, "has no column prediction_time"),
    "no value column": (WITHOUT, "has no value in any of its 3 rows: fill in one of boolean_value, integer"),
    "ids as parts": (
        labels(subject_id=pa.array([1.0, 2.5, 3.0])),
        "values in the column subject_id that do not",
    ),
    "ids as text": (labels(subject_id=pa.array(["1", "2", "3"])), "has string in the column subject_id"),
    "broken codes": (
        WITHOUT
        | {
            "categorical_values": pa.ListArray.from_arrays(
                [0, 1, 2, 4], pa.array([b"a", b"caf\xe9", b"b", None]).view(pa.string())
            )
        },
        "column categorical_values, row 2 .* not UTF-8",
    ),
    "broken text": (
        WITHOUT | {"categorical_value": pa.array([b"a", b"caf\xe9", b"b"]).view(pa.string())},
        "column categorical_value, row 2 .* not UTF-8",
    ),
    "times as text": (labels(prediction_time=pa.array(["x", "y", "z"])), "string in the column prediction_t"),
    "values as text": (labels(boolean_value=pa.array(["1", "0", "1"])), r"boolean_value \(3 rows\)"),
    "null times": (
        labels(prediction_time=pa.array([0, None, None], pa.timestamp("us"))),
        "has no prediction_time in 2 of 3 rows",
    ),
    "null ids": (labels(subject_id=pa.array([1, None, 3])), "has no subject_id in 1 of 3 rows"),
    "null values": (labels(boolean_value=pa.array([True, None, False])), "has no value in 1 of 3 rows"),
    "no values": (labels(boolean_value=pa.nulls(3, pa.bool_())), "has no value in any of its 3 rows"),
    "mixed": (
        labels(
            boolean_value=pa.array([True, None, None]), float_value=pa.array([None, 1.0, 2.0], pa.float32())
        ),
        r"1 in boolean_value and 2 in float_value \(of 3 rows\)",
    ),
    "days in some rows": (
        labels(float_value=pa.array([None, 1.0, 2.0])),
        r"3 in boolean_value and 2 in float_value \(of 3 rows\)",
    ),
    "no number": (
        {**WITHOUT, "float_value": pa.array([1.0, float("nan"), float("inf")])},
        "float_value that is not a finite number in 2 of 3 rows",
    ),
    "negative days": (labels(float_value=pa.array([1.0, 0.0, -1.0])), "of days, 0 or more, in 1 of 3 rows"),
    "sets of numbers": ({**WITHOUT, "categorical_values": pa.array([[1], [], []])}, "write it as list<"),
    "null codes": (
        {**WITHOUT, "categorical_values": pa.array([["a", None], [], [None]])},
        "has 2 null codes within categorical_values",
    ),
    "null sets": (
        {**WITHOUT, "categorical_values": pa.array([["a"], None, []])},
        "has no value in 1 of 3 rows: fill in categorical_values",
    ),
    "empty": ({name: column[:0] for name, column in labels().items()}, r"has no labels \(0 rows\)"),
    "ids too large": (labels(subject_id=pa.array([2**63, 1, 2], pa.uint64())), "do not fit into int64"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_one_clear_error(tmp_path, mistake):
    columns, message = MISTAKES[mistake]
    file = write(tmp_path / "labels.parquet", **columns)
    with pytest.raises(InputError, match=message) as error:
        read_labels(file)
    assert "labels.parquet" in str(error.value)
    assert "\n" not in str(error.value)


def test_types_that_differ_between_files(tmp_path):
    write(tmp_path / "a.parquet", **labels())
    columns = {**WITHOUT, "categorical_value": VALUES["categorical"]}
    write(tmp_path / "b.parquet", **columns)
    with pytest.raises(InputError, match=r"3 in boolean_value and 3 in categorical_value \(of 6 rows\)"):
        read_labels(tmp_path)


def test_files_that_are_none(tmp_path):
    with pytest.raises(InputError, match="nowhere does not exist"):
        read_labels(tmp_path / "nowhere")
    with pytest.raises(InputError, match=r"holds no \.parquet file"):
        read_labels(tmp_path)
    file = write(tmp_path / "cut.parquet", **labels())
    file.write_bytes(file.read_bytes()[:-20])
    with pytest.raises(InputError, match=r"cut\.parquet is no readable Parquet file \(cut short"):
        read_labels(file)


# Several label tables side by side: every pair once, with each table's own labels.


pairs = st.tuples(st.integers(-3, 3), st.integers(-3, 3))
tables = st.lists(st.dictionaries(pairs, st.booleans(), min_size=1, max_size=12), min_size=1, max_size=4)


def labels_of_label_tables(table):
    subjects, times = np.array(list(table), np.int64).T
    return Labels(subjects, times, np.array(list(table.values())), "boolean")


@given(tables, st.randoms(use_true_random=False))
def test_each_pair_comes_once_with_the_labels_that_the_tables_have_of_it(drawn, random):
    names = [f"task {k}" for k in range(len(drawn))]
    found = side_by_side(names, [labels_of_label_tables(table) for table in drawn])
    ours = list(zip(found.pairs.subject_ids.tolist(), found.pairs.times.tolist(), strict=True))
    assert ours == sorted(set().union(*drawn))
    assert found.targets.dtype == np.float32 and found.names == tuple(names)
    theirs = [[float(table.get(pair, np.nan)) for table in drawn] for pair in ours]
    np.testing.assert_array_equal(found.targets, np.array(theirs, np.float32))

    shuffled = [dict(random.sample(list(table.items()), len(table))) for table in drawn]
    again = side_by_side(names, [labels_of_label_tables(table) for table in shuffled])
    np.testing.assert_array_equal(again.targets, found.targets)


def write_table(file, **columns):
    keys = {"subject_id": pa.array([1, 2]), "prediction_time": pa.array([5, 5], pa.timestamp("us"))}
    pq.write_table(pa.table({**keys, **columns}), file)
    return file


def test_tables_are_called_after_their_files_and_0_and_1_are_binary_too(tmp_path):
    found = read_label_tables(
        [
            write_table(tmp_path / "death.parquet", boolean_value=[True, False]),
            write_table(tmp_path / "stay.long.parquet", integer_value=[0, 1]),
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
    good, other = write_table(tmp_path / "a.parquet", boolean_value=[True, False]), tmp_path / "b.parquet"
    write_table(other, **columns)
    with pytest.raises(
        InputError, match=rf"population\.labels: .*b\.parquet has {what}, but tasks .* binary"
    ):
        read_label_tables([good, other])
