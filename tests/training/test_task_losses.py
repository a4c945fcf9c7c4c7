"""Losses of labelled tasks against slow formulas, and the outputs that training begins with."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from behrt_jax.config import TaskKind
from behrt_jax.models.losses import base_outputs, task_losses

KINDS: tuple[TaskKind, ...] = ("binary", "multiclass", "multilabel", "regression", "survival")


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
    np.testing.assert_allclose(task_losses(kind, outputs, targets), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_losses_of_packed_rows_equal_those_of_their_segments(kind):
    rng = np.random.default_rng(0)
    outputs = rng.normal(size=(6, outputs_of(kind, 3))).astype(np.float32)
    targets = random_targets(rng, kind, 6, outputs.shape[1])
    packed = task_losses(kind, outputs.reshape(2, 3, -1), targets.reshape(2, 3, -1))
    np.testing.assert_array_equal(np.asarray(packed).reshape(-1), task_losses(kind, outputs, targets))


@pytest.mark.parametrize("kind", KINDS)
def test_losses_stay_finite_where_outputs_are_far_out(kind):
    outputs = np.full((1, outputs_of(kind, 3)), 300.0, np.float32)
    targets = random_targets(np.random.default_rng(1), kind, 1, outputs.shape[1])
    assert np.isfinite(np.asarray(task_losses(kind, outputs, targets))).all()


@settings(max_examples=10)
@given(seed=st.integers(0, 2**32 - 1), intervals=st.integers(1, 6))
def test_the_survival_likelihood_of_all_outcomes_is_one(seed, intervals):
    """An event in one of the intervals, or none up to the last edge."""
    outputs = np.random.default_rng(seed).normal(scale=2, size=intervals).astype(np.float32)
    outcomes = [(number, 1) for number in range(intervals)] + [(intervals, 0)]
    losses = task_losses("survival", np.tile(outputs, (len(outcomes), 1)), np.array(outcomes, np.float32))
    assert np.exp(-np.asarray(losses, np.float64)).sum() == pytest.approx(1, abs=1e-5)


def test_censoring_in_the_first_interval_tells_nothing():
    outputs = np.array([[1.0, -2.0]], np.float32)
    assert task_losses("survival", outputs, np.array([[0, 0]], np.float32))[0] == 0


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
        outputs = base_outputs(kind, targets, targets.shape[1])
        rates = (targets.sum(axis=0) + 0.5) / (examples + 1)
        losses = [
            rate * task_losses(kind, x[None], np.ones(1, np.float32))
            + (1 - rate) * task_losses(kind, x[None], np.zeros(1, np.float32))
            for x, rate in zip(outputs, rates, strict=True)
        ]
        expected = [entropy(np.array([rate, 1 - rate])) for rate in rates]
        np.testing.assert_allclose(losses, expected, rtol=1e-4)
    targets = random_targets(rng, "multiclass", examples, wanted)
    outputs = base_outputs("multiclass", targets, wanted)
    rates = (np.bincount(targets[:, 0].astype(int), minlength=wanted) + 0.5) / (examples + wanted / 2)
    each = task_losses(
        "multiclass", np.tile(outputs, (wanted, 1)), np.arange(wanted, dtype=np.float32)[:, None]
    )
    assert float(rates @ np.asarray(each)) == pytest.approx(entropy(rates), rel=1e-4)


def test_first_outputs_of_many_examples_give_the_least_loss_of_all_constant_ones():
    rng = np.random.default_rng(3)
    for kind in KINDS:
        targets = random_targets(rng, kind, 4000, outputs_of(kind, 3))
        if kind == "regression":
            targets = (targets - targets.mean()) / targets.std()
        outputs = base_outputs(kind, targets, outputs_of(kind, 3))

        def mean_loss(outputs, kind=kind, targets=targets):
            everyone = np.tile(outputs, (len(targets), 1)).astype(np.float32)
            return float(np.asarray(task_losses(kind, everyone, targets), np.float64).mean())

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
        found = base_outputs(kind, targets.astype(np.float32), outputs)
        assert found.shape == (outputs,) and found.dtype == np.float32 and np.isfinite(found).all()
