"""Temperature and threshold against simulations, brute force and scikit-learn."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.special import expit, softmax
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import f1_score, log_loss

from behrt_jax.data.tasks import KINDS
from behrt_jax.evaluation.calibration import fit_platt, fit_temperature, fit_threshold

# Few distinct scores, so that many are equal.
SCORED = st.lists(st.tuples(st.integers(0, 8), st.booleans()), min_size=2, max_size=40)


def arrays(scored):
    scores, labels = zip(*scored, strict=True)
    return np.array(scores) / 8, np.array(labels, bool)


@given(SCORED)
def test_the_threshold_is_the_best_of_all_candidates(scored):
    probabilities, labels = arrays(scored)
    if labels.all() or not labels.any():
        assert fit_threshold(probabilities, labels, "f1") == 0.5
        assert fit_threshold(probabilities, labels, "youden") == 0.5
        return

    def youden(positive):
        return positive[labels].mean() - positive[~labels].mean()

    candidates = np.unique(probabilities)
    for how, value in (("f1", lambda positive: f1_score(labels, positive)), ("youden", youden)):
        found = fit_threshold(probabilities, labels, how)
        assert found in candidates
        best = max(value(probabilities >= candidate) for candidate in candidates)
        assert value(probabilities >= found) == pytest.approx(best, abs=1e-12)


def test_a_threshold_that_is_given_is_taken():
    assert fit_threshold(np.array([0.1, 0.9]), np.array([False, True]), 0.3) == 0.3


@pytest.mark.parametrize("true", [0.4, 1.0, 3.0])
def test_a_known_temperature_is_found_again(true):
    rng = np.random.default_rng(0)
    outputs = rng.normal(scale=2, size=(20_000, 1))
    yes = rng.random(outputs.shape) < expit(outputs)
    assert fit_temperature("binary", true * outputs[None], yes) == pytest.approx(true, rel=0.05)
    outputs = rng.normal(scale=2, size=(20_000, 3))
    yes = rng.random(outputs.shape) < expit(outputs)
    assert fit_temperature("multilabel", true * outputs[None], yes) == pytest.approx(true, rel=0.05)
    shares = softmax(outputs, axis=1).cumsum(axis=1)
    chosen = (rng.random((20_000, 1)) > shares).sum(axis=1)
    assert fit_temperature("multiclass", true * outputs[None], chosen[:, None]) == pytest.approx(
        true, rel=0.05
    )


@given(st.integers(0, 2**32 - 1))
def test_the_temperature_makes_the_log_loss_least(seed):
    rng = np.random.default_rng(seed)
    outputs, yes = rng.normal(size=(50, 1)), rng.integers(0, 2, 50)
    found = fit_temperature("binary", outputs[None], yes[:, None])

    def loss(temperature):
        return log_loss(yes, expit(outputs[:, 0] / temperature), labels=[0, 1])

    for other in (*np.geomspace(0.06, 19, 20), found * 1.1, found / 1.1):
        if 0.05 < other < 20:
            assert loss(found) <= loss(other) + 1e-6


def test_outputs_that_make_no_error_are_left_as_they_are():
    """Sharper were always better there, and no temperature could be learnt."""
    outputs = np.array([[-2.0], [-1.0], [0.5], [3.0]])
    assert fit_temperature("binary", outputs[None], outputs > 0) == 1.0
    logits = np.eye(3) * 0.2
    assert fit_temperature("multiclass", logits[None], np.arange(3)[:, None]) == 1.0


@pytest.mark.parametrize("kind", ["regression", "survival"])
def test_some_kinds_have_no_temperature(kind):
    outputs = np.random.default_rng(0).normal(size=(20, 2)).astype(np.float32)
    assert fit_temperature(kind, outputs[None], np.zeros((20, 2))) == 1.0


def test_predictions_of_each_kind():
    outputs = np.array([[0.0, 2.0], [-1.0, 1.0]], np.float32)
    np.testing.assert_allclose(KINDS["binary"].predictions(outputs[:, :1], 2.0), expit(outputs[:, :1] / 2))
    np.testing.assert_allclose(KINDS["multilabel"].predictions(outputs, 2.0), expit(outputs / 2))
    np.testing.assert_allclose(KINDS["multiclass"].predictions(outputs, 2.0), softmax(outputs / 2, axis=1))
    np.testing.assert_array_equal(KINDS["regression"].predictions(outputs[:, :1], 2.0), outputs[:, :1])
    hazards = expit(outputs)
    alive = np.stack([1 - hazards[:, 0], (1 - hazards[:, 0]) * (1 - hazards[:, 1])], axis=1)
    np.testing.assert_allclose(KINDS["survival"].predictions(outputs), alive, rtol=1e-6)
    for kind in ("binary", "multiclass", "multilabel", "regression", "survival"):
        assert KINDS[kind].predictions(outputs).dtype == np.float64


def test_platt_equals_a_logistic_regression():
    rng = np.random.default_rng(3)
    odds = rng.normal(-2.0, 1.5, 800)
    labels = rng.random(800) < 1 / (1 + np.exp(-(0.6 * odds + 0.4)))
    slope, intercept = fit_platt(odds, labels)
    model = LogisticRegression(C=1e10, tol=1e-10, max_iter=1000).fit(odds[:, None], labels)
    assert slope == pytest.approx(model.coef_[0, 0], rel=1e-4)
    assert intercept == pytest.approx(model.intercept_[0], rel=1e-3)
    shifted = fit_platt(-odds, labels)
    np.testing.assert_allclose(shifted, (-slope, intercept), rtol=1e-6)
    for wrong in ((odds, np.ones(800, bool)), (np.zeros(800), labels), (odds, odds > 0)):
        assert np.isnan(fit_platt(*wrong)).all()
