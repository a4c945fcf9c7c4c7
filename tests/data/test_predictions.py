"""Predictions come back as they were written, whole or not at all; damaged files are named."""

from datetime import datetime

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from behrt_jax.data.events import DAY
from behrt_jax.data.examples import find_examples
from behrt_jax.data.labels import VALUE_COLUMNS
from behrt_jax.data.predictions import (
    PredictionWriter,
    codes_seen,
    members_path,
    prediction_rows,
    prediction_schema,
    read_predictions,
    schema_of,
)
from behrt_jax.data.tasks import Task
from behrt_jax.errors import InputError
from tests.data.histories import Event, labels_at, sequence_set
from tests.data.test_tasks import labels_of

TIMES = [datetime(2020, 1, 1), datetime(2021, 6, 1), datetime(2020, 1, 1)]
KEYS = {"subject_id": [1, 1, 2], "prediction_time": TIMES}
COLUMNS = {
    "binary": {
        "boolean_value": [True, False, False],
        "predicted_boolean_value": [True, True, False],
        "predicted_boolean_probability": [0.9, 0.5, 1e-12],
    },
    "multiclass": {
        "categorical_value": ["b", "a", "c"],
        "predicted_categorical_value": ["a", "a", "b"],
        "predicted_probabilities": [[0.75, 0.25], [1.0, 0.0], [0.5, 0.5]],
    },
    "multilabel": {
        "categorical_values": [["x", "z"], [], ["other"]],
        "predicted_probabilities": [[0.5, 0.25, 0.0], [1.0, 0.0, 0.0], [0.0, 0.5, 0.5]],
        "seen_before": [[True, False, False], [True, True, False], [False, False, False]],
    },
    "regression": {"float_value": [1.0, -2.0, 0.5], "predicted_float_value": [1.5, -1.0, 0.0]},
    "survival": {
        "boolean_value": [True, False, True],
        "float_value": [10.0, 400.0, 0.0],
        "predicted_survival": [[0.9, 0.5], [1.0, 1.0], [0.5, 0.25]],
    },
}
METADATA = {
    "multiclass": {"classes": ["a", "b"]},
    "multilabel": {"classes": ["x", "y", "z"]},
    "survival": {"edges_days": [30, 365]},
}


def write(path, kind, **changes):
    schema = prediction_schema(kind, "categorical")
    table = pa.table({**KEYS, **COLUMNS[kind], **changes}, schema=schema)
    with PredictionWriter(path, schema, {"kind": kind, **METADATA.get(kind, {})}) as writer:
        writer.write(table.slice(0, 2))
        writer.write(table.slice(2).to_batches()[0])
    return path


@pytest.mark.parametrize("kind", COLUMNS)
def test_what_was_written_is_read(tmp_path, kind):
    read = read_predictions(write(tmp_path / "deep" / "p.parquet", kind))
    assert read.kind == kind
    np.testing.assert_array_equal(read.subject_ids, [1, 1, 2])
    np.testing.assert_array_equal(read.times, np.array(TIMES, "datetime64[us]").astype(np.int64))
    labels = {
        "binary": [True, False, False],
        "multiclass": [1, 0, 2],
        "multilabel": [[True, False, True], [False] * 3, [False] * 3],
        "regression": [1.0, -2.0, 0.5],
        "survival": [[10.0, 1.0], [400.0, 0.0], [0.0, 1.0]],
    }
    np.testing.assert_array_equal(read.labels, labels[kind])
    predicted = {
        "binary": COLUMNS["binary"]["predicted_boolean_probability"],
        "multiclass": [[0.75, 0.25, 0.0], [1.0, 0.0, 0.0], [0.5, 0.5, 0.0]],
        "multilabel": COLUMNS["multilabel"]["predicted_probabilities"],
        "regression": [1.5, -1.0, 0.0],
        "survival": COLUMNS["survival"]["predicted_survival"],
    }
    np.testing.assert_array_equal(read.predictions, predicted[kind])
    assert (read.decisions is None, read.seen_before is None) == (kind != "binary", kind != "multilabel")
    if read.decisions is not None:
        np.testing.assert_array_equal(read.decisions, [True, True, False])
    if read.seen_before is not None:
        np.testing.assert_array_equal(read.seen_before, COLUMNS["multilabel"]["seen_before"])
    assert read.members is None
    np.testing.assert_array_equal(read.edges_days, METADATA.get(kind, {}).get("edges_days", []))


def test_classes_that_labels_alone_have_come_last(tmp_path):
    assert read_predictions(write(tmp_path / "p.parquet", "multiclass")).classes == ("a", "b", "c")


def test_a_file_that_was_not_finished_does_not_appear_and_none_is_overwritten(tmp_path):
    path = tmp_path / "p.parquet"
    schema = prediction_schema("regression")
    with pytest.raises(KeyboardInterrupt), PredictionWriter(path, schema, {"kind": "regression"}) as writer:
        writer.write(pa.table({**KEYS, **COLUMNS["regression"]}, schema=schema))
        raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == []
    write(path, "regression")
    with pytest.raises(InputError, match="is there already"):
        PredictionWriter(path, schema, {"kind": "regression"})
    assert list(tmp_path.iterdir()) == [path]


def test_metadata_has_what_was_counted_while_rows_were_written(tmp_path):
    schema, counts = prediction_schema("regression"), {"empty": 0}
    with PredictionWriter(tmp_path / "p.parquet", schema, {"kind": "regression", "counts": counts}) as writer:
        writer.write(pa.table({**KEYS, **COLUMNS["regression"]}, schema=schema))
        counts["empty"] += 2
    metadata = {"kind": "regression", "counts": {"empty": 2}}
    assert read_predictions(tmp_path / "p.parquet").metadata == metadata


@pytest.mark.parametrize("kind", COLUMNS)
def test_predictions_without_labels_have_nothing_to_be_compared_with(tmp_path, kind):
    columns = {name: [None] * 3 for name in COLUMNS[kind] if name in VALUE_COLUMNS}
    write(tmp_path / "p.parquet", kind, **columns)
    with pytest.raises(InputError, match="no label in any of its 3 rows, so there is nothing to compare"):
        read_predictions(tmp_path / "p.parquet")


def test_binary_predictions_of_other_tools_are_read(tmp_path):
    path = tmp_path / "p.parquet"
    columns = {name: COLUMNS["binary"][name] for name in ("boolean_value", "predicted_boolean_probability")}
    pq.write_table(pa.table({**KEYS, **columns}), path)
    read = read_predictions(path)
    assert (read.kind, read.decisions, read.metadata) == ("binary", None, {"kind": "binary"})
    for nulls in (pa.nulls(3), pa.nulls(3, pa.bool_())):  # decisions that the tool has not made
        pq.write_table(pa.table({**KEYS, **columns, "predicted_boolean_value": nulls}), path)
        assert read_predictions(path).decisions is None
    pq.write_table(pa.table({**KEYS, **columns, "predicted_boolean_value": [True, None, False]}), path)
    with pytest.raises(InputError, match="no predicted_boolean_value in 1 of 3 rows"):
        read_predictions(path)
    with pytest.raises(InputError, match="is a folder: give one file of predictions"):
        read_predictions(tmp_path)


def test_members_are_those_of_the_same_examples(tmp_path):
    path = write(tmp_path / "p.parquet", "binary")
    assert members_path(path) == tmp_path / "p.members.parquet"
    members = {"member_0": [0.1, 0.2, 0.3], "member_1": [0.4, 0.5, 0.6]}
    pq.write_table(pa.table({**KEYS, **members}), members_path(path))
    np.testing.assert_array_equal(read_predictions(path).members, np.array(list(members.values())).T)
    pq.write_table(pa.table({**KEYS, "subject_id": [1, 2, 2], **members}), members_path(path))
    with pytest.raises(InputError, match="the examples of the predictions beside it"):
        read_predictions(path)


@pytest.mark.parametrize(
    ("kind", "changes", "message"),
    [
        (
            "binary",
            {"predicted_boolean_probability": [0.5, 1.5, float("nan")]},
            "2 values .* no probabilities",
        ),
        ("binary", {"boolean_value": [None, None, True]}, "no boolean_value in 2 of 3"),
        ("regression", {"predicted_float_value": [float("inf"), 0.0, 0.0]}, "not finite"),
        (
            "multilabel",
            {"seen_before": [[True], [True], [True]]},
            "needs 3 values in each row of seen_before",
        ),
        ("survival", {"float_value": [-1.0, 0.0, 1.0]}, "negative days"),
        ("multiclass", {"predicted_probabilities": [[0.5, 0.5], None, [0.5, 0.5]]}, "needs 2 values"),
    ],
)
def test_values_that_cannot_be_are_refused(tmp_path, kind, changes, message):
    with pytest.raises(InputError, match=message):
        read_predictions(write(tmp_path / "p.parquet", kind, **changes))


def test_files_that_hold_no_predictions_are_refused(tmp_path):
    path = tmp_path / "p.parquet"
    with pytest.raises(InputError, match="does not exist"):
        read_predictions(path)
    path.write_bytes(b"PAR1")
    with pytest.raises(InputError, match="no readable Parquet"):
        read_predictions(path)
    pq.write_table(pa.table(KEYS), path)
    with pytest.raises(InputError, match="holds no predictions"):
        read_predictions(path)
    schema = pa.schema([*prediction_schema("binary")][:2], metadata={b"behrt_jax": b'{"kind": "other"}'})
    pq.write_table(pa.table(KEYS, schema=schema), path)
    with pytest.raises(InputError, match="of kind 'other'"):
        read_predictions(path)
    schema = schema.with_metadata({b"behrt_jax": b'{"kind": "survival"}'})
    pq.write_table(pa.table(KEYS, schema=schema), path)
    with pytest.raises(InputError, match=r"no labels \(boolean_value with float_value"):
        read_predictions(path)
    path.unlink()
    none = {name: [] for name in (*KEYS, *COLUMNS["binary"])}
    with PredictionWriter(path, prediction_schema("binary"), {"kind": "binary"}) as writer:
        writer.write(pa.table(none, schema=prediction_schema("binary")))
    with pytest.raises(InputError, match="0 rows"):
        read_predictions(path)


# Predictions as rows of a file.


def rows_of(task, labels, predicted, threshold=None, seen=None):
    schema = schema_of(task, labels)
    table = prediction_rows(schema, task, labels, np.array(predicted, np.float64), threshold, seen)
    assert table.schema == schema
    assert table["subject_id"].to_pylist() == labels.subject_ids.tolist()
    assert table["prediction_time"].cast("int64").to_pylist() == labels.times.tolist()
    return table


def test_binary_predictions_are_positive_from_the_threshold_on():
    for labels in (labels_of("boolean", [True, False, True]), labels_of("integer", [1, 0, 1])):
        table = rows_of(Task("binary"), labels, [[0.2], [0.3], [0.9]], threshold=0.3)
        assert table["boolean_value"].to_pylist() == [True, False, True]
        assert table["predicted_boolean_value"].to_pylist() == [False, True, True]
        assert table["predicted_boolean_probability"].to_pylist() == [0.2, 0.3, 0.9]


def test_the_likeliest_class_is_predicted_in_the_type_of_the_labels():
    shares = [[0.1, 0.7, 0.2], [0.5, 0.2, 0.3]]
    table = rows_of(Task("multiclass", ("-3", "2", "10")), labels_of("integer", [10, 2]), shares)
    assert table["predicted_integer_value"].to_pylist() == [2, -3]
    assert table["predicted_probabilities"].to_pylist() == shares
    table = rows_of(Task("multiclass", ("a", "b", "c")), labels_of("categorical", ["c", "d"]), shares)
    assert table["categorical_value"].to_pylist() == ["c", "d"]
    assert table["predicted_categorical_value"].to_pylist() == ["b", "a"]


def test_regression_is_told_in_the_units_of_the_labels():
    task = Task("regression", mean=100.0, deviation=5.0)
    table = rows_of(task, labels_of("float", [99.0, 101.0]), [[0.0], [-2.0]])
    assert table["predicted_float_value"].to_pylist() == [100.0, 90.0]


def test_survival_and_multilabel_have_lists():
    task = Task("survival", edges_days=(5.0, 9.0))
    table = rows_of(task, labels_of("survival", [(3.0, 1), (8.0, 0)]), [[0.9, 0.5], [0.8, 0.8]])
    assert table["boolean_value"].to_pylist() == [True, False]
    assert table["float_value"].to_pylist() == [3.0, 8.0]
    assert table["predicted_survival"].to_pylist() == [[0.9, 0.5], [0.8, 0.8]]
    task = Task("multilabel", classes=("A//1", "B//1"))
    seen = np.array([[True, False], [False, False]])
    table = rows_of(task, labels_of("codes", [("A//1", "Z"), ()]), [[0.5, 0.25], [0.0, 1.0]], seen=seen)
    assert table["categorical_values"].to_pylist() == [["A//1", "Z"], []]
    assert table["predicted_probabilities"].to_pylist() == [[0.5, 0.25], [0.0, 1.0]]
    assert table["seen_before"].to_pylist() == seen.tolist()


def test_labels_that_nobody_knows_are_null_and_all_else_is_the_same():
    shares, unknown = [[0.25, 0.75], [0.5, 0.5]], labels_of("none", [None, None])
    tasks = [
        (Task("binary"), labels_of("boolean", [True, False])),
        (Task("multiclass", ("a", "b")), labels_of("categorical", ["a", "b"])),
        (Task("multiclass", ("-1", "2"), of_integers=True), labels_of("integer", [2, -1])),
        (Task("multiclass", ("1", "001")), labels_of("categorical", ["1", "001"])),
        (Task("multilabel", ("A//1", "B//1")), labels_of("codes", [("A//1",), ()])),
        (Task("regression", mean=2.0), labels_of("float", [1.0, 2.0])),
        (Task("survival", edges_days=(5.0, 9.0)), labels_of("survival", [(3.0, 1), (8.0, 0)])),
    ]
    for task, labels in tasks:
        schema = schema_of(task, labels)
        known, without = (
            prediction_rows(schema_of(task, table), task, table, np.array(shares), 0.5, np.ones((2, 2), bool))
            for table in (labels, unknown)
        )
        assert without.schema == schema
        of_labels = [name for name in schema.names if name in VALUE_COLUMNS]
        assert [without[name].to_pylist() for name in of_labels] == [[None, None]] * len(of_labels)
        assert of_labels and without.drop_columns(of_labels).equals(known.drop_columns(of_labels))


@pytest.mark.parametrize("day", [1, 2, 9])
def test_codes_are_seen_up_to_the_prediction_time(day):
    events = [Event(DAY, "A//1", 0), Event(2 * DAY, "[UNK]", 1), Event(3 * DAY, "B//1", 2)]
    data = sequence_set({"train": {1: events}})
    whole = find_examples(data, "train", labels_at([(1, day * DAY), (1, 0)]), max_tokens=2**31 - 1)
    ids = data.vocabulary.encode(["A//1", "not in it", "B//1", "B//2"])
    found = codes_seen(whole, ids, len(data.vocabulary))
    # Of a code that is no row of the vocabulary nothing can be told, whatever else is read as [UNK].
    assert found.tolist() == [[True, False, day >= 3, False], [False] * 4]
