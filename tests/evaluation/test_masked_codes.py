"""Figures made of single masked codes."""

import math

import numpy as np
import pytest

from behrt_jax.evaluation.masked_codes import MaskedCodeResults, Unigram, frequency_bands, mean_interval
from tests.evaluation.masked import masked_split


def test_unigram_by_hand():
    unigram = Unigram(np.array([0, 9, 4, 0, 2]), first_code=2)  # codes 2, 3, 4 with 5, 1, 3 of 9
    results = unigram.predict(masked_split([[2, 3], [4, 4]], targets=[0, 1, 3]))
    np.testing.assert_allclose(results.losses, -np.log([5 / 9, 1 / 9, 3 / 9]))
    np.testing.assert_array_equal(results.ranks, [0, 2, 1])
    np.testing.assert_array_equal(results.subjects, [0, 0, 1])
    metrics = results.metrics()
    assert metrics["loss"] == pytest.approx(-math.log(15 / 729) / 3)
    assert metrics["accuracy"] == pytest.approx(1 / 3)
    assert (metrics["accuracy_top5"], metrics["targets"]) == (1.0, 3)


def test_the_interval_covers_the_mean_as_often_as_it_says_where_codes_of_a_subject_agree():
    rng = np.random.default_rng(0)
    covered, narrow = 0, 0
    for _ in range(1000):
        subjects = np.repeat(np.arange(60), rng.integers(1, 9, 60))
        values = 3.0 + rng.normal(size=60)[subjects] + 0.3 * rng.normal(size=len(subjects))
        low, high = mean_interval(values, subjects)
        covered += low <= 3.0 <= high
        error = 1.96 * values.std() / math.sqrt(len(values))  # as if codes were independent
        narrow += abs(values.mean() - 3.0) <= error
    assert 0.92 < covered / 1000 < 0.965
    assert narrow / 1000 < 0.8


def test_an_interval_of_one_subject_or_none_is_unknown():
    assert all(math.isnan(end) for end in mean_interval(np.array([1.0, 2.0]), np.array([4, 4])))
    assert all(math.isnan(end) for end in mean_interval(np.array([]), np.array([], np.int64)))


def test_bands_split_the_codes_by_frequency_and_every_target_is_in_one():
    counts = np.array([0, 0, *range(150, 0, -1)])  # code 2 is the most frequent of 150
    codes = np.array([2, 11, 12, 12, 101, 102, 151], np.int32)
    ranks = np.array([0, 3, 0, 12, 5, 0, 99])
    results = MaskedCodeResults(codes, np.arange(7.0), ranks, np.arange(7))
    unigram = MaskedCodeResults(codes, np.full(7, 5.0), codes - 2, np.arange(7))
    bands = frequency_bands(counts, 2, results, unigram)
    assert [(band["band"], band["codes"], band["targets"]) for band in bands] == [
        ("1-10", 10, 2),
        ("11-100", 90, 3),
        ("101-150", 50, 2),
    ]
    assert [band["loss"] for band in bands] == [0.5, 3.0, 5.5]
    assert [band["accuracy"] for band in bands] == [0.5, 1 / 3, 0.5]
    assert [band["accuracy_top10"] for band in bands] == [1.0, 2 / 3, 0.5]
    assert [band["unigram_accuracy"] for band in bands] == [0.5, 0.0, 0.0]


def test_a_band_without_targets_has_no_figures():
    nothing = MaskedCodeResults(*(np.array([], dtype) for dtype in (np.int32, float, int, int)))
    (band,) = frequency_bands(np.array([0, 5, 3]), 1, nothing, nothing)
    assert (band["band"], band["targets"], band["loss"], band["accuracy"]) == ("1-2", 0, None, None)
