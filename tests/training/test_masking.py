"""Masking: labels and codes stay aligned, shares are right, special tokens are left alone."""

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from behrt_jax.config.training import MaskingConfig
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
    shown, columns, labels, weights = map(np.asarray, masked[:4])
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


@given(st.integers(0, 10_000), st.integers(0, LENGTH))
def test_static_facts_are_never_drawn(seed, facts):
    codes, ids = rows_of_codes(seed), np.arange(6, dtype=np.int32)
    visits = np.where(np.arange(LENGTH) < facts, -1, np.arange(LENGTH) // 3).astype(np.int32)
    visits = np.random.default_rng(seed).permuted(np.tile(visits, (6, 1)), axis=1)
    config = MaskingConfig(probability=0.9)
    masked = mask_batch(jax.random.key(seed), codes, ids, config, VOCABULARY, visits)
    is_fact = visits < 0
    np.testing.assert_array_equal(np.asarray(masked.codes)[is_fact], codes[is_fact])
    drawn = np.take_along_axis(is_fact, np.asarray(masked.columns), axis=1)
    assert not (drawn & np.asarray(masked.weights)).any()
    share = 0.9 * ((codes >= FIRST_CODE) & ~is_fact).sum(axis=1)
    assert (np.abs(np.asarray(masked.weights).sum(axis=1) - share) < 1 + 1e-4).all()
    # Were they special tokens, the same would be drawn.
    plain = mask_batch(
        jax.random.key(seed), np.where(is_fact, PAD, codes), ids, config, VOCABULARY, np.zeros_like(visits)
    )
    np.testing.assert_array_equal(masked.columns, plain.columns)
    np.testing.assert_array_equal(masked.weights, plain.weights)


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


def test_budget_of_visits_has_room_for_one_that_goes_over():
    found = [masking_budget(length, 0.15, "visit") for length in (1, 20, 50, 200)]
    assert found == [1, 6, 16, 46]


# Visits.

VISITS = MaskingConfig(probability=0.25, unit="visit")


def rows_of_visits(seed, rows, sizes):
    """Rows of segments of some visits, some codes special, one fact before each segment: a batch's arrays."""
    rng = np.random.default_rng(seed)
    codes = rng.integers(FIRST_CODE, VOCABULARY, (rows, LENGTH)).astype(np.int32)
    visits, segments = np.zeros((2, rows, LENGTH), np.int32)
    for row in range(rows):
        column, segment, visit = 0, 0, 9
        while column < LENGTH:
            if visit >= 2:
                segment, visit = segment + 1, 0
                segments[row, column], visits[row, column] = segment, -1
                column += 1
            size = rng.choice(sizes)
            segments[row, column : column + size], visits[row, column : column + size] = segment, visit
            column, visit = column + size, visit + 1
    special = rng.random(codes.shape) < 0.1
    codes = np.where(special, rng.integers(0, FIRST_CODE, codes.shape), codes).astype(np.int32)
    return codes, visits, segments


def mask_visits(key, arrays):
    codes, visits, segments = arrays
    ids = np.arange(len(codes), dtype=np.int32)
    masked = mask_batch(key, codes, ids, VISITS, VOCABULARY, visits, segments)
    return masked, np.asarray(masked.weights), np.asarray(masked.columns)


def runs_of(arrays):
    """Rows and columns of the codes of each visit."""
    codes, visits, segments = arrays
    for row in range(len(codes)):
        keys = segments[row] * 100 + visits[row]
        for key in np.unique(keys[(codes[row] >= FIRST_CODE) & (visits[row] >= 0)]):
            yield row, np.flatnonzero((keys == key) & (codes[row] >= FIRST_CODE))


@given(st.integers(0, 10_000), st.sampled_from([(1,), (1, 2, 6), (3, 4, 20), (32,)]))
def test_visits_are_hidden_whole(seed, sizes):
    arrays = codes, visits, _ = rows_of_visits(seed, 40, sizes)
    masked, weights, columns = mask_visits(jax.random.key(seed), arrays)
    shown, asked = np.asarray(masked.codes), np.zeros(codes.shape, bool)
    for row in range(len(codes)):
        hidden = columns[row][weights[row]]
        asked[row, hidden] = True
        assert len(np.unique(hidden)) == len(hidden)
        np.testing.assert_array_equal(np.asarray(masked.labels)[row][weights[row]], codes[row][hidden])
    left_out = np.zeros(len(codes), int)
    largest = np.zeros(len(codes), int)
    for row, places in runs_of(arrays):
        largest[row] = max(largest[row], len(places))
        if asked[row, places].any():
            unasked = places[~asked[row, places]]
            assert (shown[row, unasked] == MASK).all()
            left_out[row] += len(unasked)
    np.testing.assert_array_equal(masked.unasked, left_out)
    others = (codes < FIRST_CODE) | (visits < 0)
    assert not asked[others].any()
    np.testing.assert_array_equal(shown[others], codes[others])
    of_row = (~others).sum(axis=1)
    hidden = asked.sum(axis=1) + left_out
    assert (hidden < 0.25 * of_row + largest).all()
    assert (left_out[largest <= 8] == 0).all()


def test_every_visit_is_hidden_with_the_probability():
    arrays = codes, visits, _ = rows_of_visits(0, 40, (1, 2, 3, 6, 14))
    runs = list(runs_of(arrays))
    times = 60
    hidden, both, pairs = np.zeros(len(runs)), 0.0, 0
    for number in range(times):
        _, weights, columns = mask_visits(jax.random.key(number), arrays)
        asked = np.zeros(codes.shape, bool)
        np.put_along_axis(asked, columns, weights, axis=1)
        drawn = np.array([asked[row, places].any() for row, places in runs])
        hidden += drawn
        # First visits of neighbouring segments have the same number, and are not drawn together.
        for one, other in zip(range(len(runs)), range(2, len(runs)), strict=False):
            if runs[one][0] == runs[other][0] and visits[runs[one][0], runs[one][1][0]] == 0:
                both, pairs = both + (drawn[one] and drawn[other]), pairs + 1
    sizes = np.array([len(places) for _, places in runs])
    for low, high in ((1, 1), (2, 3), (4, 9), (10, 14)):
        of_size = (sizes >= low) & (sizes <= high)
        count = of_size.sum() * times
        assert abs(hidden[of_size].sum() - 0.25 * count) < 4 * np.sqrt(0.25 * 0.75 * count)
    assert both / pairs < 0.15


def test_masking_by_visit_needs_visits():
    with pytest.raises(ValueError, match="needs the visits"):
        mask_codes(jax.random.key(0), rows_of_codes(0), np.arange(6), VISITS, VOCABULARY)


def test_visits_of_different_segments_are_different():
    codes = rows_of_codes(0, special_share=0.0, rows=40)
    segments = np.broadcast_to(1 + np.arange(LENGTH, dtype=np.int32) // 2, codes.shape)
    _, weights, _ = mask_visits(jax.random.key(0), (codes, np.zeros_like(codes), segments))
    asked = weights.sum(axis=1)
    assert (asked == 8).all()  # a quarter of the 16 visits of two codes
