"""Survival figures are those that the definitions give, worked out pair by pair and example by example."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from behrt_jax.evaluation.survival import (
    brier_over_time,
    cut_follow_up,
    kaplan_meier,
    survival_by_edge,
    survival_scorer,
)

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
