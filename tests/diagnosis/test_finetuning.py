"""Each fault of a fine-tuning run, and none for a healthy one."""

from dataclasses import replace
from typing import Any

import pytest

from behrt_jax.config.training import FinetuneConfig, OptimizerConfig, TaskConfig
from behrt_jax.diagnosis.finding import RunRecord
from behrt_jax.presets import FINETUNE
from behrt_jax.workflows.doctor import examine
from behrt_jax.workflows.run import settings
from tests.diagnosis.runs import ids, only, train_line, validation_line

DATA = {
    "train": {"examples": 5000, "positive": 800},
    "tuning": {"examples": 700, "positive": 110},
}
LOSSES = [0.44, 0.41, 0.40, 0.39, 0.395, 0.40, 0.41, 0.41, 0.42]
SUMMARY: dict[str, Any] = {
    "steps": 360,
    "best_step": 160,
    "best": {"loss": 0.39, "auroc": 0.81},
    "stop_reason": "early stopping",
    "baselines": {"base rate": {"loss": 0.44}, "count model": {"loss": 0.41, "auroc": 0.79}},
    "gaps": {"count model": {"nats": -0.02, "low": -0.03, "high": -0.01}},
}
LORA = replace(FINETUNE["lora"], task=TaskConfig(pooling="max"))


def found(
    config: FinetuneConfig = LORA, data: Any = DATA, losses: list[float] = LOSSES, **summary: Any
) -> list[Any]:
    metrics = [
        line
        for number, loss in enumerate(losses, start=1)
        for line in (train_line(40 * number, loss), validation_line(40 * number, loss))
    ]
    whole = {**SUMMARY, **summary}
    return examine(
        RunRecord(settings(config), baselines=whole["baselines"], metrics=metrics, summary=whole, data=data)  # pyright: ignore[reportArgumentType]
    )


def test_nothing_is_found_in_a_healthy_run():
    assert [one.id for one in found()] == []
    assert [one.id for one in found(replace(LORA, task=TaskConfig(pooling="mean")))] == ["mean-pooling"]


@pytest.mark.parametrize(
    ("train", "severity"),
    [((1900, 800), "info"), ((400, 150), "warning"), ((5000, 60), "warning"), ((5000, 4950), "warning")],
)
def test_few_labels(train, severity):
    data = {**DATA, "train": dict(zip(("examples", "positive"), train, strict=True))}
    finding = only(found(data=data), "few-labels")
    assert finding.severity == severity
    assert f"{train[0]:,}, of which {min(train[1], train[0] - train[1]):,}" in finding.seen


def test_a_tuning_split_that_is_too_small():
    for examples, positive in ((80, 30), (700, 15)):
        data = {**DATA, "tuning": {"examples": examples, "positive": positive}}
        assert only(found(data=data), "tuning-too-small").severity == "warning"
    tasks = {"tasks": {"a": DATA, "b": {**DATA, "tuning": {"examples": 80, "positive": 30}}}}
    assert "labels of b are 80" in only(found(data=tasks), "tuning-too-small").seen


def test_a_schedule_that_ended_too_soon():
    falling = [0.44, 0.43, 0.42, 0.41, 0.40]
    short = {"steps": 200, "best_step": 200, "stop_reason": "finished", "best": {"loss": 0.4}}
    finding = only(found(losses=falling, **short), "schedule-at-zero")
    assert finding.severity == "warning"
    assert "zero at step 200" in finding.seen
    constant = replace(LORA, optimizer=OptimizerConfig(schedule="constant"))
    assert "schedule-at-zero" not in ids(found(constant, losses=falling, **short))
    stopped = {**short, "stop_reason": "early stopping"}
    assert "schedule-at-zero" not in ids(found(losses=falling, **stopped))


def test_no_gain_over_the_base_rate():
    assert only(found(best={"loss": 0.44, "auroc": 0.5}), "no-gain-over-base-rate").severity == "error"


@pytest.mark.parametrize(("low", "severity"), [(0.01, "warning"), (-0.01, "info")])
def test_a_count_model_that_is_ahead(low, severity):
    gaps = {"count model": {"nats": 0.02, "low": low, "high": 0.03}}
    finding = only(found(gaps=gaps, best={"loss": 0.43, "auroc": 0.75}), "count-model-ahead")
    assert finding.severity == severity
    assert "AUROC 0.750 and 0.790" in finding.seen


@pytest.mark.parametrize(("auroc", "told"), [(0.99, True), (0.989, False), (None, False)])
def test_an_auroc_too_good_to_be_true(auroc, told):
    assert ("auroc-too-good" in ids(found(best={"loss": 0.3, "auroc": auroc}))) == told
    members = {"best": None, "members": [{"loss": 0.5}, {"loss": 0.3, "auroc": auroc}]}
    assert ("auroc-too-good" in ids(found(**members, predicting_members=[1]))) == told
