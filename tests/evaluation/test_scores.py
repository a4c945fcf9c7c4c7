"""Figures are those of scikit-learn, or worked out from their definitions, under any weights."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import roc_auc_score

from behrt_jax.evaluation.calibration import (
    calibration_line,
    quantile_bins,
    regression_bins,
    reliability_bins,
)
from behrt_jax.evaluation.scores import (
    auroc,
    binary_scorer,
    brier_over_time,
    curves,
    cut_follow_up,
    decision_curve,
    kaplan_meier,
    multiclass_scorer,
    multilabel_scorer,
    over_codes,
    regression_scorer,
    survival_by_edge,
    survival_scorer,
)
from tests.evaluation.test_calibration import SCORED, arrays


@given(SCORED)
def test_auroc_equals_that_of_scikit_learn_with_equal_scores_too(scored):
    scores, labels = arrays(scored)
    if labels.all() or not labels.any():
        assert auroc(scores, labels) is None
    else:
        assert auroc(scores, labels) == pytest.approx(roc_auc_score(labels, scores), abs=1e-12)


@pytest.mark.parametrize("place", range(4))
def test_a_score_that_is_no_number_leaves_auroc_undefined(place):
    scores, labels = np.array([0.1, 0.7, 0.4, 0.2], np.float32), np.array([True, True, False, False])
    assert auroc(scores, labels) == 0.5
    scores[place] = np.nan
    assert auroc(scores, labels) is None


# Figures of probabilities, classes, codes and numbers.


metrics = pytest.importorskip("sklearn.metrics")
seeds = st.integers(0, 10_000)


def weights_of(rng, sets, examples):
    weights = rng.integers(0, 4, (sets, examples)).astype(np.float64)
    weights[0] = 1.0
    weights[:, -1] += weights.sum(axis=1) == 0  # some subject is always drawn
    return weights


def repeated(values, weights):
    return np.repeat(values, weights.astype(int), axis=0)


@given(seeds, st.integers(2, 40), st.booleans())
def test_binary_figures_are_those_of_scikit_learn(seed, examples, tied):
    rng = np.random.default_rng(seed)
    labels = rng.random(examples) < 0.4
    probabilities = rng.integers(0, 5, examples) / 4 if tied else rng.random(examples)
    decisions = probabilities >= 0.5
    weights = weights_of(rng, 4, examples)
    found = binary_scorer(labels, probabilities, decisions)(weights)
    for row, weight in enumerate(weights):
        of = {"sample_weight": weight}
        both = 0 < weight @ labels < weight.sum()
        if both:
            expected = {
                "auroc": metrics.roc_auc_score(labels, probabilities, **of),
                "average_precision": metrics.average_precision_score(labels, probabilities, **of),
            }
        else:
            expected = {"auroc": np.nan, "average_precision": np.nan}
        expected |= {
            "brier": metrics.brier_score_loss(labels, probabilities, pos_label=True, **of),
            "log_loss": metrics.log_loss(labels, probabilities, labels=[False, True], **of),
            "prevalence": np.average(labels, weights=weight),
            "mean_prediction": np.average(probabilities, weights=weight),
            "f1": metrics.f1_score(labels, decisions, zero_division=np.nan, **of),
            "precision": metrics.precision_score(labels, decisions, zero_division=np.nan, **of),
            "recall": metrics.recall_score(labels, decisions, zero_division=np.nan, **of),
            "specificity": metrics.recall_score(~labels, ~decisions, zero_division=np.nan, **of),
        }
        for name, value in expected.items():
            np.testing.assert_allclose(found[name][row], value, rtol=1e-12, atol=1e-12, err_msg=name)


@given(seeds, st.integers(30, 80))
def test_calibration_is_that_of_a_logistic_regression(seed, examples):
    from sklearn.linear_model import LogisticRegression

    rng = np.random.default_rng(seed)
    odds = rng.normal(size=examples)
    labels = rng.random(examples) < 1 / (1 + np.exp(-0.5 * odds - 0.3))
    labels[:4] = [True, False, True, False]
    odds[:4] = [-3, 3, 3, -3]  # never separable
    probabilities = 1 / (1 + np.exp(-odds))
    weights = weights_of(rng, 3, examples) + 1
    slopes, intercepts = calibration_line(labels, probabilities, weights)
    for slope, intercept, weight in zip(slopes, intercepts, weights, strict=True):
        model = LogisticRegression(C=np.inf, tol=1e-10, max_iter=1000)
        model.fit(odds[:, None], labels, weight)
        np.testing.assert_allclose(slope, model.coef_[0, 0], rtol=1e-4, atol=1e-5)
        shifted = 1 / (1 + np.exp(-(odds + intercept)))
        np.testing.assert_allclose(weight @ shifted, weight @ labels, rtol=1e-9)


def test_calibration_that_has_no_value_is_nan_and_far_predictions_converge():
    weights = np.ones((1, 4))
    separated = np.array([False, False, True, True])
    slope, _ = calibration_line(separated, np.array([0.1, 0.2, 0.8, 0.9]), weights)
    assert np.isnan(slope[0])
    slope, intercept = calibration_line(np.ones(4, bool), np.array([0.1, 0.2, 0.8, 0.9]), weights)
    assert np.isnan(slope[0])
    assert np.isnan(intercept[0])
    slope, intercept = calibration_line(separated, np.full(4, 0.25), weights)
    assert np.isnan(slope[0])
    np.testing.assert_allclose(intercept, np.log(3))
    far = np.array([0.0, 1.0, 0.0, 1.0, 1.0])
    slope, intercept = calibration_line(np.array([True, False, False, True, True]), far, np.ones((1, 5)))
    np.testing.assert_allclose(slope, (np.log(2) + np.log(1)) / 2 / np.log(1e7), rtol=1e-4)
    assert np.isfinite(intercept[0])


def test_the_expected_calibration_error_is_the_mean_gap_over_bins_of_equal_size():
    rng = np.random.default_rng(0)
    probabilities = rng.random(500)
    labels = rng.random(500) < probabilities**2
    bins = quantile_bins(probabilities)
    assert np.bincount(bins).tolist() == [50] * 10
    by_hand = sum(
        abs(labels[bins == index].mean() - probabilities[bins == index].mean()) * 0.1 for index in range(10)
    )
    found = binary_scorer(labels, probabilities)(np.ones((1, 500)))
    np.testing.assert_allclose(found["ece"], by_hand)
    rows = reliability_bins(labels, probabilities)
    assert [row["examples"] for row in rows] == [50] * 10
    assert all(row["low"] < row["observed"] < row["high"] for row in rows[1:])
    # Wilson's interval of 5 of 50, by statsmodels' proportion_confint.
    (row,) = reliability_bins(np.arange(50) < 5, np.full(50, 0.1))
    np.testing.assert_allclose([row["low"], row["high"]], [0.0434754, 0.2136022], atol=2e-5)


def test_bins_of_numbers_have_the_mean_label_and_its_interval():
    labels = np.array([1.0, 2, 3, 10, 10])
    predictions = np.array([0.0, 0, 0, 9, 11])
    rows = regression_bins(labels, predictions)
    assert rows[0]["examples"] == 3
    assert (rows[0]["predicted"], rows[0]["observed"]) == (0.0, 2.0)
    np.testing.assert_allclose([rows[0]["low"], rows[0]["high"]], [2 - 1.96 / 3**0.5, 2 + 1.96 / 3**0.5])
    assert sum(row["examples"] for row in rows) == 5
    np.testing.assert_allclose(sum(row["examples"] * row["observed"] for row in rows), labels.sum())


def test_net_benefit_is_that_of_its_definition():
    labels = np.array([True, True, False, False, False])
    probabilities = np.array([0.9, 0.3, 0.6, 0.2, 0.1])
    at = {round(row["threshold"], 2): row for row in decision_curve(labels, probabilities)}
    np.testing.assert_allclose(at[0.25]["model"], 2 / 5 - 1 / 5 * (0.25 / 0.75))
    np.testing.assert_allclose(at[0.25]["treat_all"], 2 / 5 - 3 / 5 * (0.25 / 0.75))
    np.testing.assert_allclose(at[0.9]["model"], 1 / 5)
    np.testing.assert_allclose(at[0.95]["model"], 0)


@given(seeds, st.integers(2, 60))
def test_curves_enclose_the_areas(seed, examples):
    rng = np.random.default_rng(seed)
    labels = rng.random(examples) < 0.5
    probabilities = rng.integers(0, 8, examples) / 7
    found = curves(labels, probabilities)
    if labels.all() or not labels.any():
        assert found is None
        return
    area = np.trapezoid(found["recall"], found["false_positive_rate"])
    np.testing.assert_allclose(area, metrics.roc_auc_score(labels, probabilities))
    steps = np.diff(found["recall"]) @ found["precision"][1:]
    np.testing.assert_allclose(steps, metrics.average_precision_score(labels, probabilities))


@given(seeds, st.integers(6, 40), st.integers(2, 4))
def test_multiclass_figures_are_those_of_scikit_learn(seed, examples, classes):
    rng = np.random.default_rng(seed)
    labels = np.concatenate([np.arange(classes), rng.integers(0, classes, examples - classes)])
    probabilities = rng.dirichlet(np.ones(classes), examples)
    weights = weights_of(rng, 3, examples)
    weights[:, :classes] += 1  # each class is there
    found = multiclass_scorer(labels, probabilities)(weights)
    one_hot = labels[:, None] == np.arange(classes)
    for row, weight in enumerate(weights):
        aurocs = [
            metrics.roc_auc_score(one_hot[:, k], probabilities[:, k], sample_weight=weight)
            for k in range(classes)
        ]
        expected = {
            "accuracy": metrics.accuracy_score(labels, probabilities.argmax(axis=1), sample_weight=weight),
            "log_loss": metrics.log_loss(labels, probabilities, sample_weight=weight),
            "brier": metrics.brier_score_loss(
                labels, probabilities, sample_weight=weight, scale_by_half=False
            )
            if classes > 2
            else np.average(((probabilities - one_hot) ** 2).sum(axis=1), weights=weight),
            "macro_auroc": np.mean(aurocs),
            "weighted_auroc": np.average(aurocs, weights=weight @ one_hot),
        }
        for name, value in expected.items():
            np.testing.assert_allclose(found[name][row], value, rtol=1e-10, err_msg=name)
    plain = {"macro_auroc": "macro", "weighted_auroc": "weighted"}
    if classes > 2:
        for name, average in plain.items():
            value = metrics.roc_auc_score(labels, probabilities, average=average, multi_class="ovr")
            once = multiclass_scorer(labels, probabilities)(np.ones((1, examples)))
            np.testing.assert_allclose(once[name][0], value, rtol=1e-10)


def test_a_class_that_is_absent_is_left_out_of_the_mean():
    labels, probabilities = np.array([0, 0, 1, 1]), np.array([[0.7, 0.2, 0.1]] * 2 + [[0.1, 0.8, 0.1]] * 2)
    found = multiclass_scorer(labels, probabilities)(np.array([[1.0, 1, 1, 1], [1, 1, 0, 0]]))
    np.testing.assert_array_equal(found["macro_auroc"], [1.0, np.nan])
    np.testing.assert_array_equal(found["weighted_auroc"], [1.0, np.nan])


@settings(max_examples=10)
@given(seeds, st.integers(2, 12), st.integers(3, 8))
def test_multilabel_figures_are_means_over_samples_of_those_of_scikit_learn(seed, examples, codes):
    rng = np.random.default_rng(seed)
    labels = rng.random((examples, codes)) < 0.4
    probabilities = (rng.integers(0, 6, (examples, codes)) / 5).astype(np.float32)
    seen = rng.random((examples, codes)) < 0.5
    weights = weights_of(rng, 3, examples)
    found = multilabel_scorer(labels, probabilities, seen)(weights)
    details = over_codes(labels, probabilities, seen)
    kinds = {"": np.ones_like(seen), "incident_": ~seen, "repeat_": seen}
    for prefix, counted in kinds.items():
        values = [
            figures_by_sklearn(labels[i, counted[i]], probabilities[i, counted[i]]) for i in range(examples)
        ]
        for row, weight in enumerate(weights):
            kept = [(w, value) for w, value in zip(weight, values, strict=True) if value is not None and w]
            for place, name in enumerate(("auroc", "average_precision")):
                mean = (
                    np.average([v[place] for _, v in kept], weights=[w for w, _ in kept]) if kept else np.nan
                )
                np.testing.assert_allclose(found[prefix + name][row], mean, rtol=1e-10, atol=1e-12)
        detail = details[prefix.rstrip("_") or "all"]
        micro = figures_by_sklearn(labels[counted], probabilities[counted])
        columns = [
            figures_by_sklearn(labels[counted[:, k], k], probabilities[counted[:, k], k])
            for k in range(codes)
        ]
        columns = [column for column in columns if column is not None]
        assert detail["codes"] == len(columns)
        assert detail["examples"] == sum(value is not None for value in values)
        check(detail, "micro", micro)
        check(detail, "macro", np.mean(columns, axis=0) if columns else None)
    np.testing.assert_allclose(
        found["brier"][0], np.mean((probabilities.astype(np.float64) - labels) ** 2), rtol=1e-5
    )


def figures_by_sklearn(labels, scores):
    if not len(labels) or labels.all() or not labels.any():
        return None
    return metrics.roc_auc_score(labels, scores), metrics.average_precision_score(labels, scores)


def check(detail, name, expected):
    found = detail[f"{name}_auroc"], detail[f"{name}_average_precision"]
    if expected is None:
        assert found == (None, None)
    else:
        np.testing.assert_allclose(found, expected, rtol=1e-10)


@given(seeds, st.integers(3, 30), st.booleans())
def test_regression_figures_are_those_of_scikit_learn_and_scipy(seed, examples, tied):
    from scipy.stats import spearmanr

    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 6, examples).astype(float) if tied else 100 + rng.normal(size=examples)
    labels[:2] = 50.0, 51.0
    predictions = np.round(labels + rng.normal(size=examples), 0 if tied else 6)
    predictions[:2] = 70.0, 75.0
    weights = weights_of(rng, 3, examples)
    weights[:, :2] += 1
    found = regression_scorer(labels, predictions)(weights)
    for row, weight in enumerate(weights):
        of = {"sample_weight": weight}
        expected = {
            "mae": metrics.mean_absolute_error(labels, predictions, **of),
            "rmse": metrics.root_mean_squared_error(labels, predictions, **of),
            "r2": metrics.r2_score(labels, predictions, **of),
            "spearman": spearmanr(repeated(labels, weight), repeated(predictions, weight)).statistic,
        }
        for name, value in expected.items():
            np.testing.assert_allclose(found[name][row], value, rtol=1e-7, atol=1e-9, err_msg=name)


def test_equal_labels_have_no_explained_variance_nor_ranks():
    found = regression_scorer(np.full(5, 0.1), np.arange(5.0))(np.ones((1, 5)))
    assert np.isnan(found["r2"][0])
    assert np.isnan(found["spearman"][0])
    np.testing.assert_allclose(found["mae"], 1.94)


# Survival figures, worked out pair by pair and example by example.


EDGES = np.array([10.0, 30.0, 60.0])


def example(seed, count):
    rng = np.random.default_rng(seed)
    days = rng.integers(0, 90, count).astype(np.float64)  # equal times occur
    labels = np.stack([days, rng.random(count) < 0.6], axis=1)
    hazards = rng.integers(1, 5, (count, 3)) / 8
    return labels, np.cumprod(1 - hazards, axis=1), rng


def c_index_by_pairs(labels, survival):
    comparable = concordant = 0.0
    days = np.minimum(labels[:, 0], EDGES[-1])
    events = (labels[:, 1] == 1) & (labels[:, 0] <= EDGES[-1])
    for i in range(len(days)):
        if not events[i]:
            continue
        interval = next(k for k, edge in enumerate(EDGES) if days[i] <= edge)
        for j in range(len(days)):
            if days[j] > days[i] or (days[j] == days[i] and not events[j]):
                comparable += 1
                mine, other = survival[i, interval], survival[j, interval]
                concordant += 1.0 if mine < other else 0.5 if mine == other else 0.0
    return concordant / comparable if comparable else np.nan


def followed(labels, day, before):
    """Share still followed, by the product over days with an end of follow-up; events of a day come first."""
    share = 1.0
    for end in sorted({d for d, event in labels if not event and (d < day or (d == day and not before))}):
        risk = sum(d > end or (d == end and not event) for d, event in labels)
        share *= 1 - sum(d == end and not event for d, event in labels) / risk
    return share


def integrated_brier_by_hand(labels, survival):
    times, scores = [0.0], [0.0]
    for k, edge in enumerate(EDGES):
        if followed(labels, edge, before=False) <= 0:
            break
        total = 0.0
        for (days, event), curve in zip(labels, survival, strict=True):
            if days <= edge and event:
                total += curve[k] ** 2 / followed(labels, days, before=True)
            elif days > edge:
                total += (1 - curve[k]) ** 2 / followed(labels, edge, before=False)
        times.append(edge)
        scores.append(total / len(labels))
    areas = [(b - a) * (f + g) / 2 for a, b, f, g in zip(times, times[1:], scores, scores[1:], strict=False)]
    return sum(areas) / times[-1] if areas else np.nan


@given(st.integers(0, 10_000), st.integers(2, 25))
def test_figures_are_those_of_a_calculation_by_pairs(seed, count):
    labels, survival, rng = example(seed, count)
    weights = np.stack([np.ones(count), rng.integers(0, 3, count)])
    weights[1, 0] += 1
    found = survival_scorer(labels, survival, EDGES)(weights)
    again = np.repeat(np.arange(count), weights[1].astype(int))
    expected = c_index_by_pairs(labels, survival), c_index_by_pairs(labels[again], survival[again])
    np.testing.assert_allclose(found["c_index"], expected, rtol=1e-6)
    np.testing.assert_allclose(found["integrated_brier"][0], integrated_brier_by_hand(labels, survival))


def test_without_censoring_the_brier_score_is_the_mean_square():
    labels = np.array([[5.0, 1], [20, 1], [50, 1], [80, 1]])
    survival = np.array([[0.5, 0.3, 0.1]] * 4)
    scores = brier_over_time(labels, survival, EDGES).mean(axis=0)
    np.testing.assert_allclose(scores[1], (2 * 0.3**2 + 2 * 0.7**2) / 4)


def test_past_all_follow_up_nothing_is_said():
    labels, survival = np.array([[5.0, 0], [8.0, 0], [8.0, 0]]), np.full((3, 3), 0.5)
    found = survival_scorer(labels, survival, EDGES)(np.ones((1, 3)))
    assert np.isnan(found["integrated_brier"][0])
    assert np.isnan(found["c_index"][0])
    assert [row["observed"] for row in survival_by_edge(labels, survival, EDGES)] == [None] * 3


def test_kaplan_meier_of_a_textbook_table():
    days = np.array([6.0, 6, 6, 7, 10, 13, 16, 22, 23, 6, 9, 10, 11, 17, 19, 20, 25, 32, 32, 34, 35])
    events = np.arange(21) < 9  # 6-mercaptopurine arm of Freireich et al. 1963
    share = kaplan_meier(days, events, np.array([5, 6, 7, 10, 13, 16, 22, 23.0]))
    np.testing.assert_allclose(share, [1, 0.8571, 0.8067, 0.7529, 0.6902, 0.6275, 0.5378, 0.4482], atol=5e-5)
    np.testing.assert_allclose(kaplan_meier(days, events, np.array([6.0]), left=True), 1.0)


def test_follow_up_is_cut_at_the_horizon():
    days, events = cut_follow_up(np.array([[60.0, 1], [61, 1], [20, 0]]), 60.0)
    assert (days.tolist(), events.tolist()) == ([60, 60, 20], [True, False, False])
