"""Masking: labels and codes stay aligned, shares are right, special tokens are left alone."""

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from behrt_jax.config import MaskingConfig
from behrt_jax.data.vocabulary import MASK, PAD
from behrt_jax.training.masking import FIRST_CODE, mask_codes, masking_budget

VOCABULARY = 40
LENGTH = 32

mask_batch = jax.jit(mask_codes, static_argnums=(3, 4))


def rows_of_codes(seed, special_share=0.3, rows=6):
    rng = np.random.default_rng(seed)
    codes = rng.integers(FIRST_CODE, VOCABULARY, (rows, LENGTH)).astype(np.int32)
    special = rng.random(codes.shape) < special_share
    return np.where(special, rng.integers(0, FIRST_CODE, codes.shape), codes).astype(np.int32)


@given(st.integers(0, 10_000), st.sampled_from([0.0, 0.3, 0.95, 1.0]), st.sampled_from([0.15, 0.5, 1.0]))
def test_labels_are_the_codes_that_were_hidden_and_nothing_else_changes(seed, special_share, probability):
    codes = rows_of_codes(seed, special_share)
    config = MaskingConfig(probability=probability)
    masked = mask_batch(jax.random.key(seed), codes, np.arange(6, dtype=np.int32), config, VOCABULARY)
    shown, columns, labels, weights = map(np.asarray, masked)
    assert columns.shape == labels.shape == weights.shape == (6, masking_budget(LENGTH, probability))
    for row in range(6):
        hidden = columns[row][weights[row]]
        assert len(np.unique(hidden)) == len(hidden)
        np.testing.assert_array_equal(labels[row][weights[row]], codes[row][hidden])
        np.testing.assert_array_equal(labels[row][~weights[row]], PAD)
        assert (codes[row][hidden] >= FIRST_CODE).all()
        elsewhere = np.setdiff1d(np.arange(LENGTH), hidden)
        np.testing.assert_array_equal(shown[row][elsewhere], codes[row][elsewhere])
        replaced = shown[row][hidden]
        assert ((replaced == MASK) | (replaced >= FIRST_CODE)).all()
        share = probability * (codes[row] >= FIRST_CODE).sum()
        assert np.floor(share - 1e-4) <= len(hidden) <= np.ceil(share + 1e-4)


def test_shares_of_masked_random_and_kept_codes():
    rng = np.random.default_rng(0)
    codes = rng.integers(FIRST_CODE, VOCABULARY, (4000, LENGTH)).astype(np.int32)
    codes[:, -8:] = PAD
    masked = mask_batch(
        jax.random.key(1), codes, np.arange(4000, dtype=np.int32), MaskingConfig(), VOCABULARY
    )
    weights = np.asarray(masked.weights)
    targets = weights.sum()
    assert abs(targets / (codes >= FIRST_CODE).sum() - 0.15) < 0.002
    shown = np.take_along_axis(np.asarray(masked.codes), np.asarray(masked.columns), 1)[weights]
    labels = np.asarray(masked.labels)[weights]
    assert abs((shown == MASK).mean() - 0.8) < 0.01
    by_chance = 0.1 / (VOCABULARY - FIRST_CODE)
    assert abs((shown == labels).mean() - 0.1 - by_chance) < 0.01
    others = shown[(shown != MASK) & (shown != labels)]
    assert set(others) == set(range(FIRST_CODE, VOCABULARY))
    assert abs(len(others) / targets - 0.1 + by_chance) < 0.01
    # Every place is hidden equally often.
    places = np.bincount(np.asarray(masked.columns)[weights], minlength=LENGTH)[: LENGTH - 8]
    assert places.std() / places.mean() < 0.06


def test_a_row_is_masked_alike_in_any_batch():
    codes = rows_of_codes(3)
    key, ids = jax.random.key(0), np.arange(6, dtype=np.int32)
    whole = mask_batch(key, codes, ids, MaskingConfig(), VOCABULARY)
    part = mask_batch(key, codes[[4, 1]], ids[[4, 1]], MaskingConfig(), VOCABULARY)
    for all_rows, two_rows in zip(whole, part, strict=True):
        np.testing.assert_array_equal(all_rows[np.array([4, 1])], two_rows)


def test_another_key_masks_other_codes():
    codes, ids = rows_of_codes(3), np.arange(6, dtype=np.int32)
    first = mask_batch(jax.random.key(0), codes, ids, MaskingConfig(), VOCABULARY)
    second = mask_batch(jax.random.key(1), codes, ids, MaskingConfig(), VOCABULARY)
    assert (first.columns != second.columns).any()


@pytest.mark.parametrize(("length", "budget"), [(1, 1), (20, 3), (50, 8), (200, 30)])
def test_budget(length, budget):
    assert masking_budget(length, 0.15) == budget
