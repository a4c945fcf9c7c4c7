"""Baselines see the histories of the examples and the labels of train and tuning, and nothing else."""

from dataclasses import replace

import numpy as np
import pytest

from behrt_jax.data.examples import find_examples
from behrt_jax.data.labels import Labels
from behrt_jax.data.vocabulary import UNK
from behrt_jax.errors import InputError
from behrt_jax.evaluation.task_baselines import (
    BaselineData,
    HistoryCounts,
    boosting_baseline,
    code_regression_baseline,
    count_codes,
    curve_baseline,
    history_baseline,
    join_histories,
    regression_baseline,
    run_baselines,
    targets_of,
)
from tests.data.histories import Event, labels_at, sequence_set
from tests.data.test_facts import facts_data

sparse = pytest.importorskip("scipy.sparse")
pytest.importorskip("sklearn")
DAY = 86_400_000_000
YEAR = 365.25 * DAY


def histories_of(counts, last=None, ages=None):
    counts = np.asarray(counts, np.float32)
    last = counts if last is None else np.asarray(last, np.float32)
    ages = np.zeros(len(counts), np.float32) if ages is None else ages
    return HistoryCounts(sparse.csr_array(counts), sparse.csr_array(last), ages)


def data_of(kind, seed=0, count=400, tuning=100, classes=(), **more):
    """Code 0 decides, code 1 does not; code 2 is rare."""
    rng = np.random.default_rng(seed)
    counts = np.stack(
        [rng.integers(0, 5, count), rng.integers(0, 5, count), rng.random(count) < 0.02], axis=1
    )
    level = 1.5 * (counts[:, 0] - 2) + rng.logistic(size=count)
    targets = {"binary": level > 0, "regression": level, "multiclass": np.digitize(level, [-1, 1])}[kind]
    parts = np.split(np.arange(count), [count - tuning - 50, count - 50])
    train, tune, evaluated = (histories_of(counts[part], ages=rng.random(len(part)) * 90) for part in parts)
    return BaselineData(
        kind=kind, classes=classes, edges_days=np.zeros(0), class_ids=np.zeros(0, int), train=train,
        train_targets=targets[parts[0]], tuning=tune, tuning_targets=targets[parts[1]], evaluated=evaluated,
        boosting_codes=2, seed=0, **more,
    ), targets[parts[2]]  # fmt: skip


def test_facts_are_counted_once_and_in_no_visit():
    data = facts_data()  # subject 1 has one that is [UNK] and one that is not, 2 none, 4 one and no event
    found = find_examples(data, "train", labels_at([(1, 5 * DAY), (2, 9 * DAY), (4, 7 * DAY)]), max_tokens=9)
    rows, columns = len(data.vocabulary), [UNK, data.vocabulary.codes.index("SEX//F")]
    for chosen in ([0, 1, 2], [2, 0]):
        counted = count_codes(found, rows, np.array(chosen))
        of_facts = np.array([[1, 1], [0, 0], [1, 1]])[chosen]  # a history without an event is an [UNK]
        assert counted.counts.toarray()[:, columns].tolist() == of_facts.tolist()
        last = counted.last_visit.toarray()
        assert last[:, columns].tolist() == np.array([[0, 0], [0, 0], [1, 0]])[chosen].tolist()
        assert counted.counts.toarray().sum(axis=1).tolist() == np.array([7, 1, 2])[chosen].tolist()


def test_counts_are_of_what_is_known_at_the_prediction_time():
    events = {
        1: [
            Event(0, "A//1", 0),
            Event(5 * DAY, "A//1", 1),
            Event(5 * DAY, "B//1", 1),
            Event(9 * DAY, "B//2", 2),
        ],
        2: [Event(3 * DAY, "A//2", 0)],
    }
    data = sequence_set({"train": events})
    examples = find_examples(
        data, "train", labels_at([(1, 5 * DAY), (2, 2 * DAY), (1, 9 * DAY)]), max_tokens=3
    )
    found = count_codes(examples, len(data.vocabulary))
    ids = data.vocabulary.encode(["A//1", "A//2", "B//1", "B//2"])
    dense = found.counts.toarray()
    np.testing.assert_array_equal(dense[:, ids], [[2, 0, 1, 0], [0, 0, 0, 0], [1, 0, 1, 1]])
    np.testing.assert_array_equal(dense[:, UNK], [0, 1, 0])  # nothing was known yet
    assert dense.sum() == 7
    np.testing.assert_array_equal(found.last_visit.toarray()[:, ids], [[1, 0, 1, 0], [0] * 4, [0, 0, 0, 1]])
    np.testing.assert_allclose(found.ages, np.array([5, 2, 9]) * DAY / YEAR, rtol=1e-4)
    chosen = count_codes(examples, len(data.vocabulary), np.array([2, 0]))
    np.testing.assert_array_equal(chosen.counts.toarray(), dense[[2, 0]])
    back = join_histories(
        [chosen, count_codes(examples, len(data.vocabulary), np.array([1]))], np.array([1, 2, 0])
    )
    np.testing.assert_array_equal(back.counts.toarray(), dense)
    np.testing.assert_array_equal(back.ages, found.ages)


@pytest.mark.parametrize("kind", ["binary", "regression", "multiclass"])
def test_regression_and_boosting_find_the_code_that_decides(kind):
    data, truth = data_of(kind, classes=("a", "b", "c") if kind == "multiclass" else ())
    flat, *learned = run_baselines(data)
    assert [baseline.name.split()[0] for baseline in learned][1] == "gradient"
    for baseline in learned:
        predicted = baseline.predictions
        if kind == "regression":
            assert ((predicted - truth) ** 2).mean() < 0.6 * ((flat.predictions - truth) ** 2).mean()
        elif kind == "binary":
            assert np.mean((predicted > 0.5) == truth) > np.mean(truth == (truth.mean() > 0.5)) + 0.1
        else:
            assert np.mean(predicted.argmax(axis=1) == truth) > np.bincount(truth).max() / len(truth) + 0.1
            np.testing.assert_allclose(predicted.sum(axis=1), 1)


def test_unknown_ages_stand_at_the_mean():
    data, _ = data_of("binary")
    rng = np.random.default_rng(1)
    ages = [
        rng.uniform(20, 80, len(part)).astype(np.float32)
        for part in (data.train, data.tuning, data.evaluated)
    ]
    for part in ages:
        part[::3] = np.nan
    parts = dict(zip(("train", "tuning", "evaluated"), ages, strict=True))
    data = replace(data, **{name: replace(getattr(data, name), ages=part) for name, part in parts.items()})
    filled = np.nanmean(ages[0])
    same = {name: np.where(np.isnan(part), filled, part) for name, part in parts.items()}
    same = replace(data, **{name: replace(getattr(data, name), ages=part) for name, part in same.items()})
    spread = np.nanstd(ages[0]) / np.std(same.train.ages)  # of the known alone
    found = regression_baseline(data).predictions
    assert np.isfinite(found).all() and spread > 1
    np.testing.assert_allclose(found, regression_baseline(same).predictions, atol=0.02)
    assert np.isfinite(boosting_baseline(data).predictions).all()


def test_strength_is_chosen_on_tuning_and_boosting_sees_the_most_frequent_codes():
    data, _ = data_of("binary")
    assert "chosen on tuning" in regression_baseline(data).note
    reversed_tuning = replace(data, tuning_targets=~data.tuning_targets)
    assert regression_baseline(reversed_tuning).note.startswith("C = 0.001")
    without = replace(data, tuning=histories_of(np.zeros((0, 3))), tuning_targets=np.zeros(0, bool))
    assert "not tuned" in regression_baseline(without).note
    assert "not tuned" in boosting_baseline(without).note
    assert boosting_baseline(data).note.startswith("2 most frequent codes")
    # The third code is too rare to be among the two: it changes nothing for boosting, but for regression.
    other = data.evaluated.counts.toarray()
    other[:, 2] = 1 - other[:, 2]
    changed = replace(data, evaluated=histories_of(other, ages=data.evaluated.ages))
    np.testing.assert_array_equal(boosting_baseline(changed).predictions, boosting_baseline(data).predictions)
    assert (regression_baseline(changed).predictions != regression_baseline(data).predictions).all()


def test_one_class_in_train_is_told_not_fitted():
    data, _ = data_of("binary")
    same = replace(data, train_targets=np.ones_like(data.train_targets))
    flat, *others = run_baselines(same)
    np.testing.assert_array_equal(flat.predictions, np.ones(50))
    assert [baseline.predictions for baseline in others] == [None, None]
    assert all(baseline.note == "Not fitted: all train labels are the same." for baseline in others)


def test_a_class_that_train_lacks_gets_no_probability():
    data, _ = data_of("multiclass", classes=("a", "b", "c", "d"))
    for baseline in run_baselines(data):
        assert baseline.predictions.shape == (50, 4)
        np.testing.assert_array_equal(baseline.predictions[:, 3], np.zeros(50))


def multilabel_data(count=300, evaluated=40):
    rng = np.random.default_rng(0)
    counts = rng.integers(0, 6, (count, 3)) * (rng.random((count, 3)) < 0.6)
    last = np.minimum(counts, rng.integers(0, 2, (count, 3)))
    targets = rng.random((count, 2)) < 0.1 + 0.1 * counts[:, [2, 0]] + 0.2 * (last[:, [2, 0]] > 0)
    fitted, rest = np.arange(count - evaluated), np.arange(count - evaluated, count)
    return BaselineData(
        kind="multilabel", classes=("c", "a"), edges_days=np.zeros(0), class_ids=np.array([2, 0]),
        train=histories_of(counts[fitted], last[fitted]), train_targets=targets[fitted],
        tuning=histories_of(np.zeros((0, 3))), tuning_targets=np.zeros((0, 2), bool),
        evaluated=histories_of(counts[rest], last[rest]), boosting_codes=10, seed=0,
    )  # fmt: skip


def test_rates_of_codes_seen_before_are_counted_by_how_often_and_how_lately():
    data = multilabel_data()
    found = history_baseline(data).predictions

    def cell(histories, row, code):
        count, last = histories.counts.toarray()[row, code], histories.last_visit.toarray()[row, code]
        return None if not count else (min(int(count), 4) if count != 3 else 2, last > 0)

    cells = {
        (row, k): cell(data.train, row, code) for row in range(260) for k, code in enumerate(data.class_ids)
    }
    for row in range(40):
        for k, code in enumerate(data.class_ids):
            mine = cell(data.evaluated, row, code)
            alike = [place for place, other in cells.items() if other == mine]
            together = np.mean([data.train_targets[place] for place in alike])
            own = [data.train_targets[place] for place in alike if place[1] == k]
            np.testing.assert_allclose(found[row, k], (sum(own) + 10 * together) / (len(own) + 10), rtol=1e-6)


def test_multilabel_baselines_and_their_limit():
    data = multilabel_data()
    flat, seen, regression = run_baselines(data)
    np.testing.assert_allclose(flat.predictions[0], data.train_targets.mean(axis=0), rtol=1e-6)
    assert (seen.predictions.shape, regression.predictions.shape) == ((40, 2), (40, 2))
    many = replace(data, classes=tuple(map(str, range(51))))
    assert code_regression_baseline(many).predictions is None
    without = replace(data, class_ids=np.array([2, -1]))
    assert len(np.unique(history_baseline(without).predictions[:, 1])) == 1


def test_survival_has_the_curve_of_train():
    data, _ = data_of("binary")
    targets = np.array([[10.0, 1], [20, 0], [30, 1], [40, 0]])
    data = replace(data, kind="survival", train_targets=targets, edges_days=np.array([15.0, 30.0]))
    (only,) = run_baselines(data)
    np.testing.assert_allclose(only.predictions, [[0.75, 0.375]] * 50)
    assert curve_baseline(data).name == "Kaplan-Meier"


def test_targets_are_those_of_the_classes_that_the_model_knows():
    def table(values, kind):
        return Labels(np.arange(3), np.arange(3), np.array(values, object if kind == "codes" else None), kind)

    rows = np.array([2, 0])
    found, kept = targets_of("multiclass", ("7", "8"), table([8, 7, 9], "integer"), rows)
    assert (found.tolist(), kept.tolist()) == ([1], [1])
    sets = np.empty(3, object)
    sets[:] = [("a",), (), ("b", "x")]
    found, kept = targets_of(
        "multilabel", ("a", "b"), replace(table([1, 2, 3], "integer"), values=sets, kind="codes"), rows
    )
    assert (found.tolist(), kept.tolist()) == ([[False, True], [True, False]], [0, 1])
    assert targets_of("binary", (), table([0, 1, 1], "integer"), rows)[0].tolist() == [True, False]
    with pytest.raises(InputError, match="are of the kind float, but the predictions are binary"):
        targets_of("binary", (), table([0.5, 1, 1], "float"), rows)
