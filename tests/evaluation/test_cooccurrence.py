"""The co-occurrence baseline by hand, and what it can and cannot know."""

import numpy as np
import pytest

from behrt_jax.evaluation.masked_codes import REACH, Cooccurrence, MaskedSplit, Unigram
from tests.evaluation.masked import masked_split, sequences_of

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
