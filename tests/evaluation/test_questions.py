"""Figures of answers: beside slow loops, and the predictor that knows how common each code is."""

import numpy as np
import pytest
from sklearn.metrics import log_loss, roc_auc_score

from behrt_jax.config.data import DataConfig
from behrt_jax.config.training import QueriesConfig
from behrt_jax.data.batches import RowShape
from behrt_jax.data.questions import Catalogue, QuestionBatches, Questions, prediction_times, question_batches
from behrt_jax.evaluation.forecasts import (
    chances_of_visits_left,
    occurrence_probability,
    stage_posteriors,
)
from behrt_jax.evaluation.oracle import oracle_of
from behrt_jax.evaluation.questions import auroc_within, predict_prevalence, question_metrics
from behrt_jax.records.load import load_sequences


def drawn(seed, n=400):
    rng = np.random.default_rng(seed)
    scores = np.round(rng.normal(size=n), 1)  # with ties
    labels = rng.random(n) < 1 / (1 + np.exp(-scores))
    return rng.integers(0, 6, n), scores, labels, rng.integers(1, 4, n).astype(np.float64)


def test_the_auroc_within_groups_counts_pairs():
    groups, scores, labels, weights = drawn(0)
    won = pairs = 0.0
    for p in np.flatnonzero(labels):
        for n in np.flatnonzero(~labels & (groups == groups[p])):
            weight = weights[p] * weights[n]
            won += weight * ((scores[p] > scores[n]) + 0.5 * (scores[p] == scores[n]))
            pairs += weight
    assert auroc_within(groups, scores, labels, weights) == pytest.approx(won / pairs)
    one = auroc_within(np.zeros(len(groups)), scores, labels, weights)
    assert one == pytest.approx(roc_auc_score(labels, scores, sample_weight=weights))
    shifted = auroc_within(groups, scores + 10 * groups, labels, weights)
    assert shifted == pytest.approx(won / pairs)  # how common a code is earns nothing
    assert auroc_within(groups, scores, np.zeros(len(groups), bool), weights) is None


def test_the_loss_is_that_of_the_catalogue():
    groups, scores, labels, weights = (values.reshape(40, 10) for values in drawn(1))
    horizons = np.where(groups % 2, 30.0, 365.0).astype(np.float32)
    weights[:, -1] = 0  # no question there
    questions = Questions(groups.astype(np.int32), horizons, labels.astype(np.float32), weights)
    found = question_metrics(questions, scores)
    expected = log_loss(labels.ravel(), 1 / (1 + np.exp(-scores.ravel())), sample_weight=weights.ravel())
    assert found["loss"] == pytest.approx(expected)
    assert found["targets"] == 360
    own = (horizons == 365) & (weights > 0)
    columns = groups[own], scores[own], labels[own], weights[own]
    assert found["auroc_365_days"] == pytest.approx(auroc_within(*columns))
    assert set(found) == {"loss", "targets", "auroc_30_days", "auroc_365_days"}


DATA = DataConfig(source="latent", subjects=2500, vocabulary_size=80, tuning_fraction=0.4)


@pytest.fixture(scope="module")
def records():
    return load_sequences(DATA, sep_token=False)


def test_prevalence_is_a_calibrated_predictor_without_skill_within_codes(records, monkeypatch):
    config = QueriesConfig(times=4, questions=40, horizon_days=(60.0, 365.0))
    catalogue = Catalogue.of(records.vocabulary, config)
    options = catalogue, config, RowShape(50)
    train = question_batches(records, "train", *options, batch_size=64)
    tuning = question_batches(records, "tuning", *options, batch_size=64, endless=False)
    found = predict_prevalence(train, tuning)
    assert found["auroc_60_days"] == found["auroc_365_days"] == pytest.approx(0.5)
    low, high = found["interval"]
    assert low < found["loss"] < high
    questions = tuning.all_questions()
    same = float(np.average(questions.answers, weights=questions.weights))
    constant = question_metrics(questions, np.full(questions.answers.shape, np.log(same / (1 - same))))
    assert found["loss"] < 0.9 * constant["loss"]  # codes and horizons differ
    scaled = questions._replace(weights=3 * questions.weights)
    monkeypatch.setattr(QuestionBatches, "all_questions", lambda self: scaled)
    again = predict_prevalence(train, tuning)
    assert again["interval"] == pytest.approx(found["interval"]) and again["loss"] == pytest.approx(
        found["loss"]
    )


def test_the_best_answers_of_followed_records_are_calibrated(records):
    """Those that know of the follow-up, and no others, are right on average where follow-up is long."""
    oracle, part = oracle_of(DATA, records.vocabulary.codes), records.splits["train"]
    assert oracle is not None
    posteriors = stage_posteriors(oracle, part)
    days = 365
    times = prediction_times(records, "train", days).drawn(1, np.random.default_rng(0))
    visits = posteriors.visits
    chosen = visits.firsts[times.subjects] + part.visits[times.up_to - 1]
    codes = np.argsort(-records.vocabulary.counts)[:3]
    sets = [[code] for code in codes.tolist()]
    so_far = chosen - visits.firsts[times.subjects] + 1
    left = chances_of_visits_left(oracle.model, DATA, so_far)
    truth = np.zeros((len(times), len(sets)), bool)
    for n in range(len(times)):
        later = slice(times.up_to[n], part.offsets[times.subjects[n] + 1])
        within = part.times[later] <= times.times[n] + days * 86_400_000_000
        truth[n] = np.isin(codes, part.codes[later][within])

    def away(probabilities):
        """Standard errors between mean probability and share of positive answers."""
        spread = np.sqrt((probabilities * (1 - probabilities)).sum(axis=0))
        return (truth - probabilities).sum(axis=0) / spread

    followed = occurrence_probability(oracle, posteriors, chosen, sets, days, left, followed=True)
    assert np.abs(away(followed)).max() < 4
    early = occurrence_probability(oracle, posteriors, chosen, sets, days, left)
    assert away(early).min() < -4  # counts positive answers of short records, which are not asked
    order = [roc_auc_score(truth[:, k], followed[:, k]) for k in range(len(sets))]
    free = occurrence_probability(oracle, posteriors, chosen, sets, days)
    others = [roc_auc_score(truth[:, k], free[:, k]) for k in range(len(sets))]
    np.testing.assert_allclose(order, others, atol=0.02)
