"""What a label table asks for, and its labels as numbers."""

import json

import numpy as np
import pytest

from behrt_jax.data.labels import Labels
from behrt_jax.data.tasks import Task, fit_task
from behrt_jax.errors import InputError


def labels_of(kind, values):
    """Labels of these values, of subjects 0, 1, ..."""
    if kind == "codes":
        array = np.empty(len(values), object)
        array[:] = values
    else:
        dtype = {"boolean": bool, "integer": np.int64, "categorical": object, "none": object}.get(
            kind, np.float64
        )
        array = np.array(values, dtype)
    ids = np.arange(len(values), dtype=np.int64)
    return Labels(ids, ids, array, kind)


def fitted(kind, values, **options):
    """The task of labels that are all of the train split."""
    return fit_task(labels_of(kind, values), np.arange(len(values)), **options)


EXAMPLES = {
    "binary": ("boolean", [True, False, True]),
    "multiclass": ("categorical", ["b", "a", "b", "a"]),
    "multilabel": ("codes", [("X", "Y"), (), ("Y",)]),
    "regression": ("float", [1.0, 2.0, 6.0]),
    "survival": ("survival", [(10, 1), (20, 0), (30, 1)]),
}


def test_no_task_fits_labels_without_values():
    for kind, values in EXAMPLES.values():
        task = fitted(kind, values)
        assert task.fits(labels_of(kind, values)) and not task.fits(labels_of("none", [None]))


@pytest.mark.parametrize("kind", EXAMPLES)
def test_the_kind_of_task_comes_from_the_labels_and_goes_through_json(kind):
    task = fitted(*EXAMPLES[kind])
    assert task.kind == kind
    assert Task.from_json(json.loads(json.dumps(task.to_json()))) == task
    for other, (label_kind, values) in EXAMPLES.items():
        assert task.fits(labels_of(label_kind, values)) == (other == kind)


def test_integers_are_binary_where_they_are_0_and_1_and_classes_otherwise():
    task = fitted("integer", [0, 1, 1, 0])
    assert task == Task("binary")
    targets = task.targets(labels_of("integer", [1, 0]), np.array([0, 1]))
    assert targets.tolist() == [[1], [0]] and targets.dtype == np.float32
    task = fitted("integer", [10, -3, 2, 2, 10, -3])
    assert task == Task("multiclass", ("-3", "2", "10"), of_integers=True)  # as numbers, not as text
    assert task.targets(labels_of("integer", [2, 10, -3]), np.arange(3)).tolist() == [[1], [2], [0]]


def test_integer_labels_do_not_fit_classes_that_are_no_integers():
    assert fitted("integer", [3, 4, 3, 4]).fits(labels_of("integer", [0, 1]))
    assert not fitted("categorical", ["b", "a", "b", "a"]).fits(labels_of("integer", [3, 4]))


def test_text_that_is_digits_stays_text():
    assert fitted("categorical", ["1", "001", "1", "001"]) == Task("multiclass", ("001", "1"))


def test_classes_codes_and_scale_come_from_the_train_labels_alone():
    train = np.array([0, 1, 2, 3])
    task = fit_task(labels_of("categorical", ["b", "a", "b", "a", "c"]), train)
    assert task.classes == ("a", "b") and task.outputs == 2
    with pytest.raises(InputError, match="1 of 2 labels have a class that no label of the train split has"):
        task.targets(labels_of("categorical", ["b", "c"]), np.array([0, 1]))

    task = fit_task(labels_of("codes", [("Y",), ("X", "Y"), (), ("Y",), ("Z",)]), train)
    assert task.classes == ("X", "Y")
    found = task.targets(labels_of("codes", [("X", "Z"), ("Z",), (), ("X", "Y")]), np.array([3, 0, 1, 2]))
    assert found.tolist() == [[1, 1], [1, 0], [0, 0], [0, 0]]

    task = fit_task(labels_of("float", [1.0, 3.0, 1.0, 3.0, 1000.0]), train)
    assert (task.mean, task.deviation) == (2.0, 1.0)
    assert task.targets(labels_of("float", [4.0, 2.0]), np.array([1, 0])).tolist() == [[0.0], [2.0]]


@pytest.mark.parametrize(
    ("kind", "values", "message"),
    [
        ("categorical", ["a", "a"], "same class"),
        ("integer", [7, 7, 7], "same class"),
        ("float", [2.0, 2.0], "same value"),
        ("float", [2.0, np.inf], "1 train labels are not finite"),
        ("codes", [(), ()], "names a code"),
        ("survival", [(10, 0), (20, 0)], "has an event"),
        ("integer", list(range(20)), "20 classes in 20 train labels are too many"),
    ],
)
def test_labels_with_nothing_to_learn_are_refused(kind, values, message):
    with pytest.raises(InputError, match=message):
        fitted(kind, values)


def test_a_binary_task_of_one_class_is_a_task():
    """Its figures say that there is one class; it is no crash."""
    assert fitted("boolean", [True, True]) == Task("binary")


def test_survival_intervals_hold_about_as_many_events_each():
    rng = np.random.default_rng(0)
    days, event = rng.exponential(300, 1000), rng.random(1000) < 0.5
    task = fitted("survival", np.stack([days, event], axis=1), intervals=8)
    assert len(task.edges_days) == task.outputs == 8
    assert task.edges_days[-1] == days[event].max()
    targets = task.targets(labels_of("survival", np.stack([days, event], axis=1)), np.arange(1000))
    counts = np.bincount(targets[targets[:, 1] == 1, 0].astype(int), minlength=8)
    assert counts.sum() == event.sum() and np.ptp(counts) <= 2
    # Few distinct times: fewer intervals.
    assert fitted("survival", [(5, 1), (5, 1), (9, 1), (100, 0)]).edges_days == (5.0, 9.0)


def test_survival_targets_at_the_edges():
    task = Task("survival", edges_days=(10.0, 20.0))
    cases = {
        (0, 1): (0, 1),
        (10, 1): (0, 1),  # an edge belongs to the interval that it ends
        (10.5, 1): (1, 1),
        (20, 1): (1, 1),
        (21, 1): (2, 0),  # later than all edges: survived them
        (0, 0): (0, 0),
        (9.5, 0): (0, 0),
        (10, 0): (1, 0),  # seen to its end, without the event
        (19, 0): (1, 0),
        (20, 0): (2, 0),
        (500, 0): (2, 0),
    }
    targets = task.targets(labels_of("survival", list(cases)), np.arange(len(cases)))
    assert [tuple(row) for row in targets.tolist()] == list(cases.values())


def test_the_base_rate_of_survival_is_that_of_kaplan_and_meier():
    """Where every distinct time of an event ends an interval, and but for half a count of each kind."""
    rng = np.random.default_rng(1)
    days, event = rng.integers(1, 6, 100_000), rng.random(100_000) < 0.3
    values = np.stack([days, event], axis=1)
    task = fitted("survival", values)
    assert task.edges_days == (1.0, 2.0, 3.0, 4.0, 5.0)
    outputs = task.of.base_outputs(
        task.targets(labels_of("survival", values), np.arange(100_000)), task.outputs
    )
    hazards = [(event & (days == day)).sum() / (days >= day).sum() for day in range(1, 6)]
    np.testing.assert_allclose(1 / (1 + np.exp(-outputs)), hazards, rtol=1e-3)


def test_labels_of_another_kind_are_refused():
    with pytest.raises(InputError, match="labels are of the kind float, which is no binary task"):
        Task("binary").targets(labels_of("float", [1.0]), np.array([0]))
