"""Losses, ranks and gradients in parts of the vocabulary against those of all logits."""

import math
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from behrt_jax.data.tasks import KINDS, TaskKind
from behrt_jax.models.losses import (
    add_totals,
    decoder_losses,
    logit_losses,
    mean_metrics,
    target_ranks,
    task_losses,
    totals,
    vocabulary_chunk,
)


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


@cache
def chunked(chunk, dtype=jnp.float32):
    return lambda *head: decoder_losses(*head, chunk=chunk, dtype=dtype)


@partial(jax.jit, static_argnums=0)
def gradients(function, features, kernel, bias, labels, weights):
    """(loss and all else, gradients), of 0.5 times the loss: a cotangent that is not 1."""

    def loss(*trained):
        found = function(*trained, labels, weights)
        return 0.5 * found.loss, found

    return jax.grad(loss, (0, 1, 2), has_aux=True)(features, kernel, bias)


# Each shape compiles anew. Parts of one code, parts that divide the vocabulary and that do not, all in one.
SHAPES = [((1, 1, 2), 1), ((9, 7, 40), 8), ((4, 5, 37), 12), ((2, 3, 40), 39), ((6, 2, 23), 23)]


@settings(max_examples=15)
@given(shape=st.sampled_from(SHAPES), ties=st.booleans(), seed=st.integers(0, 999))
def test_any_chunk_gives_what_all_logits_give(shape, ties, seed):
    sizes, chunk = shape
    inputs = head(seed, *sizes, ties=ties)
    expected_gradients, expected = gradients(plain, *inputs)
    got_gradients, got = gradients(chunked(chunk), *inputs)
    np.testing.assert_array_equal(got.ranks, expected.ranks)
    np.testing.assert_allclose(got.losses, expected.losses, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(got.loss, expected.loss, rtol=1e-5, atol=1e-5)
    for ours, theirs in zip(got_gradients, expected_gradients, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-5)
    # Without differentiation the same figures.
    alone = jax.jit(chunked(chunk))(*inputs)  # a program of its own, known again by the function
    assert alone.guesses is got.guesses is None  # they are not asked for
    for ours, theirs in zip(alone[:-1], got[:-1], strict=True):
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
    expected_gradients, expected = gradients(partial(plain, dtype=half), *inputs)
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


# Loss and accuracy sums against plain definitions.


@jax.jit
def sums(logits, labels, weights):
    found = logit_losses(logits, labels, weights)
    return totals(found.loss, found.ranks, weights)


@given(st.integers(0, 10_000), st.booleans())
def test_totals_agree_with_a_slow_definition(seed, ties):
    rng = np.random.default_rng(seed)
    logits = rng.normal(size=(3, 4, 17)).astype(np.float32)
    if ties:
        logits = np.round(logits)
    labels = rng.integers(0, 17, (3, 4)).astype(np.int32)
    weights = rng.random((3, 4)) < 0.6
    got = sums(logits, labels, weights)
    loss, hits = 0.0, {1: 0, 5: 0, 10: 0}
    for row, label in zip(logits[weights], labels[weights], strict=True):
        loss += math.log(np.exp(row.astype(np.float64)).sum()) - row[label]
        order = np.argsort(-row, kind="stable")
        for k in hits:
            hits[k] += label in order[:k]
    assert float(got["targets"]) == weights.sum()
    assert float(got["loss"]) == pytest.approx(loss, rel=1e-4, abs=1e-4)
    assert {k: int(got[f"top{k}"]) for k in hits} == hits


def test_constant_logits_earn_no_hits_by_ties():
    labels = np.arange(100, dtype=np.int32)[None]
    ranks = jax.jit(target_ranks)(np.zeros((1, 100, 100), np.float32), labels)
    np.testing.assert_array_equal(ranks, labels)


def test_unused_slots_count_for_nothing_even_where_they_are_not_finite():
    logits = np.array([[[0.0, 1.0], [np.nan, np.inf]]], np.float32)
    got = sums(logits, np.array([[1, 0]], np.int32), np.array([[True, False]]))
    assert float(got["targets"]) == 1.0
    assert math.isfinite(float(got["loss"]))


def test_means_are_of_the_sums_not_of_the_means():
    first = {"loss": 1.0, "top1": 1.0, "top5": 1.0, "top10": 1.0, "targets": 1.0}
    second = {"loss": 9.0, "top1": 0.0, "top5": 1.0, "top10": 3.0, "targets": 3.0}
    metrics = mean_metrics(add_totals(add_totals({}, first), second))
    assert metrics == {
        "loss": 2.5,
        "perplexity": math.exp(2.5),
        "accuracy": 0.25,
        "accuracy_top5": 0.5,
        "accuracy_top10": 1.0,
        "targets": 4,
    }


def test_no_targets_give_nan_not_a_perfect_score():
    metrics = mean_metrics({"loss": 0.0, "top1": 0.0, "top5": 0.0, "top10": 0.0, "targets": 0.0})
    assert math.isnan(metrics["loss"])
    assert math.isnan(metrics["accuracy"])


# Losses of labelled tasks against slow formulas, and the outputs that training begins with.


@partial(jax.jit, static_argnums=0)
def losses_of(kind: TaskKind, outputs: np.ndarray, targets: np.ndarray) -> jax.Array:
    """Of each example, float32 `[examples]`: one program for each shape, not one for every operation."""
    return task_losses(KINDS[kind].loss, outputs, targets)


def random_targets(rng: np.random.Generator, kind: TaskKind, examples: int, outputs: int) -> np.ndarray:
    """float32 `[examples, targets]`."""
    if kind in ("binary", "multilabel"):
        return rng.integers(0, 2, (examples, outputs)).astype(np.float32)
    if kind == "multiclass":
        return rng.integers(0, outputs, (examples, 1)).astype(np.float32)
    if kind == "regression":
        return rng.normal(size=(examples, 1)).astype(np.float32)
    event = rng.integers(0, 2, examples)
    # Whoever has outlived all intervals has number `outputs`, and no event.
    interval = rng.integers(0, outputs + 1 - event)
    return np.stack([interval, event], axis=1).astype(np.float32)


def outputs_of(kind: TaskKind, wanted: int) -> int:
    return 1 if kind in ("binary", "regression") else wanted


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def slow_loss(kind: TaskKind, outputs: list[float], targets: list[float]) -> float:
    """One example, number by number, as the formulas are written in books."""
    if kind in ("binary", "multilabel"):
        chances = [sigmoid(x) if yes else 1 - sigmoid(x) for x, yes in zip(outputs, targets, strict=True)]
        return -sum(map(math.log, chances)) / len(chances)
    if kind == "multiclass":
        shares = [math.exp(x) for x in outputs]
        return -math.log(shares[int(targets[0])] / sum(shares))
    if kind == "regression":
        return (outputs[0] - targets[0]) ** 2 / 2
    chance, (interval, event) = 1.0, targets
    for number, x in enumerate(outputs):
        if number < interval:
            chance *= 1 - sigmoid(x)
        elif number == interval and event:
            chance *= sigmoid(x)
    return -math.log(chance)


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=10)
@given(seed=st.integers(0, 2**32 - 1), wanted=st.integers(2, 5))
def test_losses_equal_a_slow_formula(kind, seed, wanted):
    rng = np.random.default_rng(seed)
    outputs = rng.normal(scale=3, size=(4, outputs_of(kind, wanted))).astype(np.float32)
    targets = random_targets(rng, kind, 4, outputs.shape[1])
    expected = [slow_loss(kind, *pair) for pair in zip(outputs.tolist(), targets.tolist(), strict=True)]
    np.testing.assert_allclose(losses_of(kind, outputs, targets), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_losses_of_packed_rows_equal_those_of_their_segments(kind):
    rng = np.random.default_rng(0)
    outputs = rng.normal(size=(6, outputs_of(kind, 3))).astype(np.float32)
    targets = random_targets(rng, kind, 6, outputs.shape[1])
    packed = losses_of(kind, outputs.reshape(2, 3, -1), targets.reshape(2, 3, -1))
    np.testing.assert_array_equal(np.asarray(packed).reshape(-1), losses_of(kind, outputs, targets))


@pytest.mark.parametrize("kind", KINDS)
def test_losses_stay_finite_where_outputs_are_far_out(kind):
    outputs = np.full((1, outputs_of(kind, 3)), 300.0, np.float32)
    targets = random_targets(np.random.default_rng(1), kind, 1, outputs.shape[1])
    assert np.isfinite(np.asarray(losses_of(kind, outputs, targets))).all()


@settings(max_examples=10)
@given(seed=st.integers(0, 2**32 - 1), intervals=st.integers(1, 6))
def test_the_survival_likelihood_of_all_outcomes_is_one(seed, intervals):
    """An event in one of the intervals, or none up to the last edge."""
    outputs = np.random.default_rng(seed).normal(scale=2, size=intervals).astype(np.float32)
    outcomes = [(number, 1) for number in range(intervals)] + [(intervals, 0)]
    losses = losses_of("survival", np.tile(outputs, (len(outcomes), 1)), np.array(outcomes, np.float32))
    assert np.exp(-np.asarray(losses, np.float64)).sum() == pytest.approx(1, abs=1e-5)


def test_censoring_in_the_first_interval_tells_nothing():
    outputs = np.array([[1.0, -2.0]], np.float32)
    assert losses_of("survival", outputs, np.array([[0, 0]], np.float32))[0] == 0


def entropy(shares: np.ndarray) -> float:
    shares = shares[shares > 0]
    return float(-(shares * np.log(shares)).sum())


@settings(max_examples=10)
@given(seed=st.integers(0, 2**32 - 1), examples=st.integers(1, 40), wanted=st.integers(2, 4))
def test_first_outputs_give_the_loss_of_the_base_rate(seed, examples, wanted):
    """With half a count of each kind more, what is predicted is just the rate; and so the loss on the
    examples with those half counts is the entropy of the rate.
    """
    rng = np.random.default_rng(seed)
    for kind in ("binary", "multilabel"):
        targets = random_targets(rng, kind, examples, outputs_of(kind, wanted))
        outputs = KINDS[kind].base_outputs(targets, targets.shape[1])
        rates = (targets.sum(axis=0) + 0.5) / (examples + 1)
        losses = [
            rate * losses_of(kind, x[None], np.ones(1, np.float32))
            + (1 - rate) * losses_of(kind, x[None], np.zeros(1, np.float32))
            for x, rate in zip(outputs, rates, strict=True)
        ]
        expected = [entropy(np.array([rate, 1 - rate])) for rate in rates]
        np.testing.assert_allclose(losses, expected, rtol=1e-4)
    targets = random_targets(rng, "multiclass", examples, wanted)
    outputs = KINDS["multiclass"].base_outputs(targets, wanted)
    rates = (np.bincount(targets[:, 0].astype(int), minlength=wanted) + 0.5) / (examples + wanted / 2)
    each = losses_of(
        "multiclass", np.tile(outputs, (wanted, 1)), np.arange(wanted, dtype=np.float32)[:, None]
    )
    assert float(rates @ np.asarray(each)) == pytest.approx(entropy(rates), rel=1e-4)


def test_first_outputs_of_many_examples_give_the_least_loss_of_all_constant_ones():
    rng = np.random.default_rng(3)
    for kind in KINDS:
        targets = random_targets(rng, kind, 4000, outputs_of(kind, 3))
        if kind == "regression":
            targets = (targets - targets.mean()) / targets.std()
        outputs = KINDS[kind].base_outputs(targets, outputs_of(kind, 3))

        def mean_loss(outputs, kind=kind, targets=targets):
            everyone = np.tile(outputs, (len(targets), 1)).astype(np.float32)
            return float(np.asarray(losses_of(kind, everyone, targets), np.float64).mean())

        least = mean_loss(outputs)
        for place in range(len(outputs)):
            for step in (-0.1, 0.1):
                assert mean_loss(outputs + step * np.eye(len(outputs))[place]) > least, kind


def test_first_outputs_are_finite_where_a_class_or_an_interval_has_no_example():
    for kind, targets, outputs in (
        ("binary", np.zeros((5, 1)), 1),
        ("binary", np.ones((5, 1)), 1),
        ("multiclass", np.zeros((5, 1)), 3),
        ("survival", np.array([[0.0, 1.0], [2.0, 0.0]]), 3),
    ):
        found = KINDS[kind].base_outputs(targets.astype(np.float32), outputs)
        assert found.shape == (outputs,) and found.dtype == np.float32 and np.isfinite(found).all()
