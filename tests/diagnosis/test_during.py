"""Each fault that shows in the metrics of a training, and none for a healthy one."""

import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from behrt_jax.diagnosis.during import check_during, input_stalls, loss_spikes, recompilations
from behrt_jax.diagnosis.finding import Facts, RunRecord
from tests.diagnosis.runs import (
    BASELINES,
    FACTS,
    HEALTHY,
    history,
    ids,
    only,
    settings_of,
    train_line,
    validation_line,
)

LORA = settings_of()
CHANCE = math.log(995)


def found(records, settings=LORA, baselines=BASELINES, stop_reason="", **facts):
    summary = {"stop_reason": stop_reason}
    return list(check_during(RunRecord(settings, {}, replace(FACTS, **facts), baselines, records, summary)))


def test_nothing_is_found_in_a_healthy_run_at_any_time():
    for length in range(len(HEALTHY) + 1):
        assert found(HEALTHY[:length]) == []
    assert list(check_during(RunRecord({}, {}, Facts(), {}, HEALTHY, {"stop_reason": "finished"}))) == []


def test_a_trial_of_three_steps_is_not_judged():
    first = train_line(3, 6.9, without_gradient=["lora/x/a"])
    assert found([first, validation_line(3, 6.9)], total_steps=3) == []


@pytest.mark.parametrize(
    ("loss", "expected", "severity"),
    [(CHANCE, "stuck-at-chance", "error"), (0.985 * CHANCE, "stuck-at-chance", "error"),
     (5.5, "stuck-at-frequencies", "warning"), (5.42, "stuck-at-frequencies", "warning"),
     (5.6, "stuck-at-frequencies", "warning"), (5.2, None, None)],
)  # fmt: skip
def test_a_loss_that_does_not_leave_chance_or_frequencies(loss, expected, severity):
    records = history([loss] * 10, [loss] * 10)
    assert ids(found(records)) == ([expected] if expected else [])
    if expected:
        finding = only(found(records), expected)
        assert finding.severity == severity
        assert f"{loss:.4f}" in finding.seen
        # Early on nothing else can be expected: a quarter of 1,890 steps.
        assert found(records[: 2 * 7]) == []
        assert ids(found(records[: 2 * 8])) == [expected]


def test_near_uniform_frequencies_are_not_taken_for_chance():
    baselines = {"unigram": {"loss": 0.99 * CHANCE}}
    records = history([0.99 * CHANCE] * 10, [0.99 * CHANCE] * 10)
    assert ids(found(records, baselines=baselines)) == ["stuck-at-frequencies"]
    uniform = {**LORA, "data": {**LORA["data"], "source": "uniform"}}
    assert found(records, uniform, baselines) == []


def test_a_group_or_a_leaf_without_gradient():
    dead = {"gradient_norms": {"lora": 0.0, "lora_a": 0.0, "lora_b": 0.0, "head": 1.0}}
    names = ["lora/x/a", "lora/x/b"]
    lines = [train_line(step, without_gradient=names, **dead) for step in (20, 40)]
    finding = only(found(lines), "zero-gradient")
    assert finding.severity == "error"
    assert "group lora was" in finding.seen
    assert found(lines[:1]) == []
    assert found([*lines, train_line(60)]) == []
    leaf = [train_line(step, without_gradient=["params/x/kernel", "params/x/bias"]) for step in (20, 40)]
    assert "1 trainable leaves" in only(found(leaf), "zero-gradient-leaf").seen
    key_bias = [train_line(step, without_gradient=["params/x/key/bias"]) for step in (20, 40)]
    assert found(key_bias) == []
    # While b is zero, as it is at first, a has no gradient.
    first = [train_line(1, without_gradient=["lora/x/a"]), train_line(2)]
    assert found(first) == []


@pytest.mark.parametrize("part", ["a", "b"])
def test_adapters_that_stay_where_they_are(part):
    moved = {"layer": "layer_0/key", "movement": 0.3}
    adapters = {"a": moved, "b": moved, part: {"layer": "layer_1/out", "movement": 1e-7}}
    finding = only(found([validation_line(63, adapters=adapters)]), "adapters-still")
    assert finding.severity == "error"
    assert f"{part} of layer_1/out" in finding.seen
    assert found([validation_line(5, adapters=adapters)]) == []


def test_overfitting_and_where_it_began():
    records = history([5, 4.5, 4.0, 3.5, 3.0, 2.5], [5.0, 4.6, 4.5, 4.6, 4.8, 5.0])
    patient = found(records)
    assert ids(patient) == []
    assert only(patient, "overfitting").severity == "info"
    impatient = {**LORA, "train": {**LORA["train"], "patience": None}}
    finding = only(found(records, impatient), "overfitting")
    assert finding.severity == "warning"
    assert "From epoch 3.0 (step 189)" in finding.seen
    assert "rose by 0.500 nats" in finding.seen
    # Both fall, both rise, or too early to tell.
    assert found(records[:8], impatient) == []
    assert found(history([5, 4.5, 4.0, 4.2, 4.4, 4.6], [5.0, 4.6, 4.5, 4.6, 4.8, 5.0]), impatient) == []


def test_loss_spikes():
    losses = [4.0, 3.9, 3.9, 3.8, 3.8, 3.8, 5.5, 3.9, 3.8]
    finding = only(found(history(losses, [4.0] * 9)), "loss-spikes")
    assert "1 spikes" in finding.seen
    assert "step 441: 5.500 after 3.800" in finding.seen
    assert found(history([*losses[:6], 4.1], [4.0] * 7)) == []


@given(st.integers(0, 10_000))
def test_noise_is_no_spike(seed):
    rng = np.random.default_rng(seed)
    targets = rng.integers(10, 3000, 60)
    losses = 4.0 + 1.5 * rng.normal(size=60) / np.sqrt(targets)
    lines = [
        train_line(20 * i + 20, loss, targets=n)
        for i, (loss, n) in enumerate(zip(losses, targets, strict=True))
    ]
    assert list(loss_spikes(RunRecord(metrics=lines))) == []


def test_divergence_tells_its_reason():
    reason = "diverged: Loss nan at step 7. First not finite: the gradient of lora/x/a"
    findings = found(HEALTHY, stop_reason=reason)
    finding = only(findings, "diverged")
    assert finding.severity == "error"
    assert "gradient of lora/x/a" in finding.seen
    assert "step 84" in only(found([*HEALTHY, train_line(84, None)]), "diverged").seen


def test_rows_that_were_never_updated():
    rows = {"expected": 990, "untouched": 12}
    assert "12 of 990" in only(found([validation_line(630, embedding_rows=rows)]), "untouched-rows").seen


def test_recompilations():
    assert "3 times" in only(found([train_line(20), train_line(40, compilations=3)]), "recompilations").seen


def test_input_stalls():
    slow = {"data_share": 0.7, "device_share": 0.02}
    lines = [train_line(20 * index, **slow) for index in range(1, 6)]
    assert "70%" in only(found(lines), "input-stalls").seen
    # Batches that are made while the devices work cost nothing; a single slow line says nothing.
    assert found([{**line, "device_share": 0.5} for line in lines]) == []
    assert found([*lines[:2], *(train_line(20 * index) for index in range(3, 9))]) == []


def test_null_figures_are_no_fault():
    lines = [train_line(20, 5.0, data_share=None, device_share=None, compilations=None)] * 4
    run = RunRecord(metrics=lines)
    assert list(input_stalls(run)) == list(recompilations(run)) == []
