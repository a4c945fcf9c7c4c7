"""Intervals come from resampled subjects, and hold the truth as often as they say."""

import numpy as np

from behrt_jax.evaluation.bootstrap import Figures, bootstrap, interval, mean_figures, subject_draws


def mean_scorer(values):
    return lambda weights: {"mean": weights @ values / weights.sum(axis=1)}


def test_all_examples_of_a_subject_come_together_and_as_many_subjects_as_there_are():
    ids = np.array([7, 9, 7, -3, 9, 9])
    weights = np.concatenate(list(subject_draws(ids, 50, seed=1).weights()))
    assert weights.shape == (50, 6)
    np.testing.assert_array_equal(weights[:, 0], weights[:, 2])
    np.testing.assert_array_equal(weights[:, 1], weights[:, 4])
    np.testing.assert_array_equal(weights[:, [0, 1, 3]].sum(axis=1), np.full(50, 3.0))
    assert len(np.unique(weights, axis=0)) > 5


def test_draws_are_those_of_the_seed_whatever_the_pieces(monkeypatch):
    ids = np.arange(40) % 11
    first = np.concatenate(list(subject_draws(ids, 30, seed=1).weights()))
    monkeypatch.setattr("behrt_jax.evaluation.bootstrap._PIECE", 80)
    pieces = list(subject_draws(ids, 30, seed=1).weights())
    assert len(pieces) == 15
    np.testing.assert_array_equal(np.concatenate(pieces), first)
    assert (np.concatenate(list(subject_draws(ids, 30, seed=2).weights())) != first).any()


def test_the_interval_of_a_mean_holds_it_as_often_as_it_says():
    rng = np.random.default_rng(0)
    held, widths = 0, []
    for seed in range(200):
        of_subject = rng.normal(size=60)
        ids = np.repeat(np.arange(60), 3)
        found = bootstrap(mean_scorer(of_subject[ids]), subject_draws(ids, 200, seed)).entry("mean")
        held += found["low"] <= 0 <= found["high"]
        widths.append(found["high"] - found["low"])
    assert 0.90 <= held / 200 <= 0.98
    # Were the examples resampled in place of subjects, the width would be that of 180 values.
    np.testing.assert_allclose(np.mean(widths), 2 * 1.96 / np.sqrt(60), rtol=0.1)


def test_differences_are_paired():
    values = np.random.default_rng(0).normal(size=100)
    draws = subject_draws(np.arange(100), 300, 0)
    one, other = bootstrap(mean_scorer(values), draws), bootstrap(mean_scorer(values - 0.25), draws)
    found = one.less(other, "mean")
    np.testing.assert_allclose([found["value"], found["low"], found["high"]], 0.25)
    both = mean_figures([one, other])
    np.testing.assert_allclose(both.values["mean"], one.values["mean"] - 0.125)
    np.testing.assert_allclose(both.drawn["mean"], one.drawn["mean"] - 0.125)


def test_one_subject_has_no_interval_and_undefined_draws_are_counted():
    found = bootstrap(mean_scorer(np.ones(3)), subject_draws(np.full(3, 5), 100, 0)).entry("mean")
    assert found == {"value": 1.0, "low": None, "high": None}
    drawn = np.concatenate([np.full(30, np.nan), np.linspace(0, 1, 70)])
    assert Figures({"a": 0.5}, {"a": drawn}).entry("a")["undefined_draws"] == 30
    assert interval(np.array([np.nan, np.nan, 1.0])) is None
    assert Figures({"a": np.nan}, {"a": drawn}).entry("a") == {"value": None, "low": None, "high": None}
