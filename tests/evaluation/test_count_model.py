"""The count model: what it keeps is what scikit-learn fitted, and what it chose is for unseen subjects."""

import json

import numpy as np
import pytest

from behrt_jax.evaluation import count_model
from behrt_jax.evaluation.count_model import CountModel, fit_count_model
from behrt_jax.evaluation.task_baselines import HistoryCounts

pytest.importorskip("sklearn")
sparse = pytest.importorskip("scipy.sparse")

CODES = 12


def histories(n, seed=0):
    rng = np.random.default_rng(seed)
    counts = rng.poisson(0.5, (n, CODES)).astype(np.float32)
    ages = rng.uniform(20, 80, n).astype(np.float32)
    ages[::17] = np.nan
    return HistoryCounts(sparse.csr_array(counts), sparse.csr_array(counts * 0), ages)


def outcome(found, odds, seed=1):
    return np.random.default_rng(seed).random(len(found)) < 1 / (1 + np.exp(-odds(found.counts.toarray())))


def one(counts):
    return 4.0 * counts[:, 3] - 2.0


def either(counts):
    """Yes where one of two codes is there and the other is not, which no sum of the two tells."""
    return 8.0 * ((counts[:, 2] > 0) ^ (counts[:, 5] > 0)) - 4.0


@pytest.fixture(scope="module")
def boosted():
    found = histories(400)
    targets = outcome(found, either)
    return found, targets, *fit_count_model(found, targets, np.arange(400), boosted=True)


def loss(outputs, targets):
    return np.logaddexp(0, np.where(targets, -outputs[:, 0], outputs[:, 0])).mean()


def test_the_trees_that_are_kept_are_those_that_were_fitted(boosted):
    found, targets, model, _ = boosted
    trees, fitted = count_model._boosting(found, targets, 30, model.mean_age, seed=3)
    new = histories(60, seed=4)
    features = count_model._dense(new, trees.codes, model.mean_age)
    known = fitted.decision_function(features)
    np.testing.assert_allclose(trees.outputs(new, model.mean_age), known, rtol=1e-12)
    assert np.ptp(known) > 1


def test_json_gives_the_model_again(boosted):
    found, _, model, _ = boosted
    stored = json.loads(json.dumps(model.to_json()))
    np.testing.assert_array_equal(CountModel.from_json(stored).outputs(found), model.outputs(found))
    alone = {name: value for name, value in stored.items() if name not in ("weight", "trees")}
    assert CountModel.from_json(alone).trees is None  # as they were written before there were trees


def test_trees_are_taken_where_no_sum_tells_and_not_where_one_does(boosted):
    model = boosted[2]
    assert model.weight > 0.7
    found = histories(400)
    targets = outcome(found, one)
    simple, _ = fit_count_model(found, targets, np.arange(400), boosted=True)
    assert simple.weight < 0.5
    new = histories(2000, seed=5)
    for fitted, odds in ((model, either), (simple, one)):
        truth = outcome(new, odds, seed=6)
        assert loss(fitted.outputs(new), truth) < loss(np.full((2000, 1), 0.0), truth) - 0.15


def test_unseen_outputs_are_of_models_that_did_not_see_the_subject():
    # Targets by chance, each subject twice with the same history: who sees one of the two knows the other.
    half = histories(60)
    twice = half.take(np.tile(np.arange(60), 2))
    targets = np.tile(np.random.default_rng(0).random(60) < 0.5, 2)
    subjects = np.tile(np.arange(60), 2)
    chance = loss(np.full((120, 1), np.log(targets.mean() / (1 - targets.mean()))), targets)
    _, unseen = fit_count_model(twice, targets, subjects, boosted=True)
    _, leaking = fit_count_model(twice, targets, np.arange(120), boosted=True)
    assert loss(unseen, targets) > chance - 0.01
    assert loss(leaking, targets) < chance - 0.05


def test_two_subjects_of_a_value_are_enough():
    found = histories(40)
    model, unseen = fit_count_model(found, np.arange(40) < 2, np.arange(40), boosted=False)
    assert np.isfinite(unseen).all() and unseen.shape == (40, 1) and model.trees is None
