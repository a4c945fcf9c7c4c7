"""Losses, ranks and gradients in parts of the vocabulary against those of all logits."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from behrt_jax.models.losses import decoder_losses, logit_losses, vocabulary_chunk


def head(seed, slots, hidden, vocabulary, ties=False):
    """Features, kernel, bias, labels and weights."""
    rng = np.random.default_rng(seed)
    features, kernel = rng.normal(size=(slots, hidden)), rng.normal(size=(hidden, vocabulary))
    bias = rng.normal(size=vocabulary)
    if ties:  # small whole numbers: many equal logits, and no rounding
        features, kernel, bias = (np.round(x) for x in (features, kernel, bias))
    labels = rng.integers(0, vocabulary, slots).astype(np.int32)
    arrays = (x.astype(np.float32) for x in (features, kernel, bias))
    return *arrays, labels, rng.random(slots) < 0.7


def plain(features, kernel, bias, labels, weights, dtype=jnp.float32):
    """As the head's Dense layer does it."""
    logits = jnp.matmul(features.astype(dtype), kernel.astype(dtype), preferred_element_type=jnp.float32)
    return logit_losses(logits + bias.astype(dtype).astype(jnp.float32)[None], labels, weights)


def chunked(chunk, dtype=jnp.float32):
    return lambda *head: decoder_losses(*head, chunk=chunk, dtype=dtype)


def gradients(function, features, kernel, bias, labels, weights):
    """(loss and all else, gradients), of 0.5 times the loss: a cotangent that is not 1."""

    def loss(*trained):
        found = function(*trained, labels, weights)
        return 0.5 * found.loss, found

    return jax.jit(jax.grad(loss, (0, 1, 2), has_aux=True))(features, kernel, bias)


# Each new shape compiles anew.
@settings(max_examples=8)
@given(
    sizes=st.tuples(st.integers(1, 9), st.integers(1, 7), st.integers(2, 40)),
    chunk=st.integers(1, 39),
    ties=st.booleans(),
    seed=st.integers(0, 999),
)
def test_any_chunk_gives_what_all_logits_give(sizes, chunk, ties, seed):
    inputs = head(seed, *sizes, ties=ties)
    chunk = min(chunk, sizes[2])
    expected_gradients, expected = gradients(plain, *inputs)
    got_gradients, got = gradients(chunked(chunk), *inputs)
    np.testing.assert_array_equal(got.ranks, expected.ranks)
    np.testing.assert_allclose(got.losses, expected.losses, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(got.loss, expected.loss, rtol=1e-5, atol=1e-5)
    for ours, theirs in zip(got_gradients, expected_gradients, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-5)
    # Without differentiation the same figures.
    alone = jax.jit(chunked(chunk))(*inputs)
    for ours, theirs in zip(alone, got, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-6)


def test_constant_logits_are_ranked_by_their_number():
    labels = np.arange(30, dtype=np.int32)
    arguments = (np.ones((30, 4), np.float32), np.zeros((4, 30), np.float32), np.zeros(30, np.float32))
    found = jax.jit(chunked(7))(*arguments, labels, np.ones(30, bool))
    np.testing.assert_array_equal(found.ranks, labels)
    np.testing.assert_allclose(found.losses, np.log(30.0), rtol=1e-6)


def test_unused_slots_add_nothing():
    features, kernel, bias, labels, weights = head(0, 8, 5, 23)
    weights = np.arange(8) < 5
    (of_features, of_kernel, _), found = gradients(chunked(6), features, kernel, bias, labels, weights)
    used = [x[:5] for x in (features, labels, weights)]
    (of_used, kernel_of_used, _), found_used = gradients(chunked(6), used[0], kernel, bias, *used[1:])
    np.testing.assert_allclose(found.loss, found_used.loss, rtol=1e-6)
    np.testing.assert_array_equal(of_features[5:], 0.0)
    np.testing.assert_allclose(of_features[:5], of_used, rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(of_kernel, kernel_of_used, rtol=1e-5, atol=1e-6)


def test_large_logits_neither_overflow_nor_vanish():
    features, kernel, bias, labels, weights = head(1, 6, 5, 23)
    inputs = (200.0 * features, kernel, bias, labels, weights)
    expected_gradients, expected = gradients(plain, *inputs)
    got_gradients, got = gradients(chunked(5), *inputs)
    assert np.isfinite(expected.losses).all() and np.max(expected.losses) > 100.0
    np.testing.assert_allclose(got.losses, expected.losses, rtol=1e-5, atol=1e-3)
    np.testing.assert_allclose(got_gradients[1], expected_gradients[1], rtol=1e-4, atol=1e-3)


def test_bfloat16_rounds_inputs_of_products_and_sums_in_float32():
    features, kernel, bias, labels, weights = head(2, 16, 32, 50)
    inputs = (features, 0.2 * kernel, bias, labels, weights)
    half = jnp.bfloat16
    expected_gradients, expected = gradients(lambda *x: plain(*x, dtype=half), *inputs)
    got_gradients, got = gradients(chunked(13, half), *inputs)
    # The logits have the same bits but for the order of float32 sums.
    np.testing.assert_allclose(got.losses, expected.losses, rtol=1e-5, atol=1e-5)
    exact, _ = gradients(plain, *inputs)
    for ours, theirs, full in zip(got_gradients, expected_gradients, exact, strict=True):
        assert ours.dtype == jnp.float32
        # No farther from the gradient in float32 than the plain way is, give or take a rounding.
        scale = np.abs(full).max()
        assert np.abs(ours - full).max() < 2 * np.abs(theirs - full).max() + 2**-8 * scale


def compiled(trains, slots=64, hidden=32, vocabulary=5000, chunk=500):
    """The compiled loss and gradient of the arguments numbered in `trains`."""
    inputs = head(0, slots, hidden, vocabulary)

    def loss(*inputs):
        return chunked(chunk)(*inputs).loss

    return jax.jit(jax.value_and_grad(loss, trains)).lower(*inputs).compile()


def flops(trains):
    """A loop's body is counted once: of one chunk, in both passes."""
    return compiled(trains).cost_analysis()["flops"]


def test_a_frozen_decoder_costs_no_gradient():
    product = 2 * 64 * 32 * 500  # of one chunk
    everything, of_features, of_bias = flops((0, 1, 2)), flops((0,)), flops((2,))
    assert everything - of_features == pytest.approx(product, rel=0.1)  # that of the kernel
    assert of_features - of_bias == pytest.approx(product, rel=0.1)


def test_no_array_of_all_logits_at_a_vocabulary_of_100_000():
    slots, hidden, vocabulary = 512, 16, 100_000
    program = compiled((0, 1, 2), slots, hidden, vocabulary, chunk=2048)
    for shape in (f"[{slots},{vocabulary}]", f"[{vocabulary},{slots}]"):
        assert shape not in program.as_text()
    of_all_logits = 4 * slots * vocabulary
    assert program.memory_analysis().temp_size_in_bytes < 0.2 * of_all_logits
    # The measure can tell: the plain way holds them, more than once.
    inputs = head(0, slots, hidden, vocabulary)
    whole = jax.jit(jax.value_and_grad(lambda *x: plain(*x).loss, (0, 1, 2))).lower(*inputs).compile()
    assert f"[{slots},{vocabulary}]" in whole.as_text()
    assert whole.memory_analysis().temp_size_in_bytes >= of_all_logits


def test_the_chunk_is_chosen_by_the_number_of_logits():
    assert vocabulary_chunk(None, 300, 1000) is None
    assert vocabulary_chunk(None, 4000, 100_000) < 10_000
    assert vocabulary_chunk(700, 300, 1000) == 700
    assert vocabulary_chunk(1000, 300, 1000) is None
