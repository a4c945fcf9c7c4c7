"""Gaps are paired code by code, and the share of the attainable gain has its two fixed points."""

import numpy as np
import pytest

from behrt_jax.evaluation.masked_codes import MaskedCodeResults, assess, share_of_attainable_gain

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
