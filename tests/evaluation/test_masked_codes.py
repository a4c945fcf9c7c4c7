"""Figures made of single masked codes."""

import math

import numpy as np
import pytest

from behrt_jax.evaluation.masked_codes import (
    REACH,
    Cooccurrence,
    MaskedCodeResults,
    MaskedSplit,
    Unigram,
    assess,
    frequency_bands,
    mean_interval,
    share_of_attainable_gain,
)
from tests.evaluation.masked import masked_split, sequences_of


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


# Gaps are paired code by code, and the share of the attainable gain has its two fixed points.


COUNTS = np.array([0, 50, 30, 20])


def results(losses):
    rng = np.random.default_rng(1)
    codes = rng.integers(1, 4, len(losses)).astype(np.int32)
    return MaskedCodeResults(codes, losses, codes - 1, np.arange(len(losses)) // 4)


def test_gaps_are_paired():
    rng = np.random.default_rng(0)
    hard = rng.exponential(2.0, 4000)  # how hard each code is, the same for all predictors
    oracle, unigram = results(hard), results(hard + 1.0)
    model = results(hard + 0.1 + 0.02 * rng.normal(size=4000))
    found = assess(COUNTS, 1, {"unigram": unigram, "oracle": oracle}, model)
    gap = found["oracle_gap"]
    assert gap == found["gaps"]["oracle"]
    assert gap["nats"] == pytest.approx(0.1, abs=0.002)
    assert 0.001 < gap["high"] - gap["low"] < 0.005  # unpaired, it would be 0.25
    assert found["gaps"]["unigram"]["nats"] == pytest.approx(-0.9, abs=0.002)
    assert found["share_of_attainable_gain"] == pytest.approx(0.9, abs=0.002)
    assert found["interval"][0] < model.losses.mean() < found["interval"][1]
    assert [band["targets"] for band in found["bands"]] == [4000]


def test_without_an_oracle_nothing_is_said_of_the_optimum():
    found = assess(COUNTS, 1, {"unigram": results(np.ones(8))}, results(np.zeros(8)))
    assert "oracle_gap" not in found
    assert "share_of_attainable_gain" not in found


def test_share_of_the_attainable_gain():
    assert share_of_attainable_gain(5.0, unigram=5.0, oracle=3.0) == 0
    assert share_of_attainable_gain(3.0, unigram=5.0, oracle=3.0) == 1
    assert share_of_attainable_gain(6.0, unigram=5.0, oracle=3.0) == -0.5
    assert share_of_attainable_gain(5.0, unigram=5.0, oracle=5.0) is None


# The co-occurrence baseline by hand, and what it can and cannot know.


FIRST = 2
SIZE = 12


def fitted(histories):
    train = sequences_of(histories)
    unigram = Unigram(np.bincount(train.codes, minlength=SIZE), FIRST)
    return Cooccurrence(train, unigram, FIRST), unigram


def test_probability_by_hand():
    baseline, unigram = fitted([[2, 3], [2, 4], [2, 3], [2, 3]])
    split = masked_split([[2, 3]], targets=[1])
    near = 3 / 4  # code 3 stands near code 2 in three of its four pairs
    expected = (1 - baseline.share) * unigram.probabilities[3] + baseline.share * near
    results = baseline.predict(split)
    assert baseline.share > 0
    np.testing.assert_allclose(results.losses, [-np.log(expected)])
    np.testing.assert_array_equal(results.ranks, [0])


def test_pairs_of_codes_are_found_where_they_exist_and_only_there():
    rng = np.random.default_rng(0)
    paired = [[a, a + 5] for a in rng.integers(2, 7, 400)]
    split = masked_split([[a, a + 5] for a in range(2, 7)], targets=range(1, 10, 2))
    baseline, unigram = fitted(paired)
    assert baseline.share >= 0.9
    assert (baseline.predict(split).ranks == 0).all()
    apart = [[a, b] for a, b in zip(rng.integers(2, 7, 400), rng.integers(7, 12, 400), strict=True)]
    baseline, unigram = fitted(apart)
    gain = unigram.predict(split).losses.mean() - baseline.predict(split).losses.mean()
    assert gain < np.log(2) + 0.05  # which half of the codes it is, and no more


def test_probabilities_sum_to_one_over_all_codes():
    rng = np.random.default_rng(1)
    baseline, _ = fitted(rng.integers(FIRST, SIZE, (30, 9)).tolist())
    history = [4, 7, 3, 9]
    chances = []
    for code in range(FIRST, SIZE):
        split = masked_split([[*history[:2], code, *history[2:]]], targets=[2])
        chances.append(np.exp(-baseline.predict(split).losses[0]))
    assert sum(chances) == pytest.approx(1.0)


def test_without_context_it_is_the_unigram():
    baseline, unigram = fitted([[2, 3], [2, 4], [2, 3], [2, 3]])
    split = masked_split([[3], [4]], targets=[0, 1])
    np.testing.assert_allclose(baseline.predict(split).losses, unigram.predict(split).losses)


@pytest.mark.parametrize("hidden", ["other window", "out of reach", "masked", "special"])
def test_what_the_model_cannot_see_is_no_context(hidden):
    baseline, unigram = fitted([[2, 3], [2, 4], [2, 3], [2, 3]])
    between = [1] * REACH if hidden == "out of reach" else []
    split = masked_split([[2, *between, 3]], targets=[len(between) + 1])
    shown, windows = split.shown.copy(), split.windows.copy()
    if hidden == "other window":
        windows[0] = 7
    elif hidden == "masked":
        shown[0] = 1
    elif hidden == "special":
        shown[0] = 0
    split = MaskedSplit(split.sequences, shown, windows, split.targets)
    np.testing.assert_allclose(baseline.predict(split).losses, unigram.predict(split).losses)


def test_chunks_change_nothing(monkeypatch):
    rng = np.random.default_rng(2)
    histories = rng.integers(FIRST, SIZE, (40, 12)).tolist()
    split = masked_split(rng.integers(FIRST, SIZE, (20, 12)).tolist(), targets=range(0, 240, 5))
    whole = fitted(histories)[0].predict(split)
    monkeypatch.setattr("behrt_jax.evaluation.masked_codes._CELLS", SIZE * 7)
    parts = fitted(histories)[0].predict(split)
    np.testing.assert_allclose(parts.losses, whole.losses)
    np.testing.assert_array_equal(parts.ranks, whole.ranks)
