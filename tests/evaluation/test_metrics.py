"""Loss and accuracy sums against plain definitions."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from behrt_jax.models.losses import add_totals, logit_losses, mean_metrics, target_ranks, totals


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
    labels = jnp.arange(100, dtype=jnp.int32)[None]
    ranks = target_ranks(jnp.zeros((1, 100, 100)), labels)
    np.testing.assert_array_equal(ranks, labels)


def test_unused_slots_count_for_nothing_even_where_they_are_not_finite():
    logits = jnp.array([[[0.0, 1.0], [jnp.nan, jnp.inf]]])
    got = sums(logits, jnp.array([[1, 0]], jnp.int32), jnp.array([[True, False]]))
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
