"""Predictions as rows of a file."""

import numpy as np
import pytest

from behrt_jax.data.event_rules import DAY
from behrt_jax.data.examples import find_examples
from behrt_jax.data.labels import VALUE_COLUMNS
from behrt_jax.data.predictions import codes_seen, prediction_rows, schema_of
from behrt_jax.data.tasks import Task
from tests.data.histories import Event, labels_at, sequence_set
from tests.data.test_tasks import labels_of


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
