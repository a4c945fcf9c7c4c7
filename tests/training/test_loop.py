"""The loop's decisions, with plain functions in place of model and files; the recipes go through it alike."""

import json
import math
import signal
from dataclasses import replace

import numpy as np
import pytest

from behrt_jax.training.loop import IN_FLIGHT, Cursor, DivergenceError, Schedule, Steps, catching_signals
from behrt_jax.training.step import TrainState
from behrt_jax.training.telemetry import Telemetry

SCHEDULE = Schedule(total_steps=12, steps_per_epoch=4, validate_every=4, log_every=3, patience=None)


class Stage:
    """Records what the loop does; the state is the number of steps done."""

    def __init__(self, train_losses=None, validation_losses=None, interrupt_at=None):
        self.train_losses = train_losses or [1.0] * 100
        self.validation_losses = iter(validation_losses or [1.0] * 100)
        self.interrupt_at = interrupt_at
        self.records, self.saved, self.done = [], [], 0

    def run(self, schedule=SCHEDULE, cursor=None):
        cursor = Cursor() if cursor is None else cursor
        self.done = cursor.step
        state = TrainState(np.int32(cursor.step), {}, ())
        telemetry = Telemetry(lambda step: {"lora": 0.1 * (step + 1)}, names=[], probe=lambda state: {})
        steps = Steps(self, cursor, schedule, telemetry, self.records.append)
        for _ in steps.dispatch(state, lambda: self.done == self.interrupt_at):
            self.step(cursor.step, steps.latest_tokens)
            if schedule.validates(cursor.step):
                steps.settle()
                validation = {"loss": next(self.validation_losses)}
                cursor.note_validation(validation["loss"])
                self.records.append({**schedule.line(cursor.step, "tuning"), **validation})
                self.saved.append((cursor.to_json(), validation))
                steps.restart_clock()
        if steps.stop_reason == "interrupted":
            self.saved.append((cursor.to_json(), None))
        return steps.stop_reason

    def compilations(self):
        return None

    def next_inputs(self, step, limit):
        return step, [10]

    def train_step(self, state, batch):
        assert batch == self.done
        self.done += 1
        loss = self.train_losses[batch]
        sums = {"loss": np.float32(2 * loss), "top1": 1.0, "top5": 1.0, "top10": 2.0, "targets": 2.0}
        metrics = {**sums, "gradient_norm": np.float32(0.5)}
        return state._replace(step=state.step + 1), {name: np.array([x]) for name, x in metrics.items()}

    def step(self, step, tokens):
        assert (step, tokens) == (self.done, 10)


def test_lines_and_validations_come_when_they_are_due():
    stage = Stage(train_losses=list(range(1, 13)))
    assert stage.run() == "finished"
    lines = [(r["split"], r["step"], r["loss"]) for r in stage.records]
    assert lines == [
        ("train", 3, 2.0), ("train", 4, 4.0), ("tuning", 4, 1.0),
        ("train", 6, 5.5), ("train", 8, 7.5), ("tuning", 8, 1.0),
        ("train", 9, 9.0), ("train", 12, 11.0), ("tuning", 12, 1.0),
    ]  # fmt: skip
    assert [cursor["step"] for cursor, _ in stage.saved] == [4, 8, 12]
    first = stage.records[0]
    assert first["epoch"] == 0.75
    assert first["targets"] == 6
    assert first["learning_rate"] == {"lora": pytest.approx(0.3)}
    assert first["tokens_per_second"] == pytest.approx(10 * first["steps_per_second"])


def test_a_last_partial_epoch_is_validated():
    stage = Stage()
    assert stage.run(replace(SCHEDULE, total_steps=6)) == "finished"
    assert [r["step"] for r in stage.records if r["split"] == "tuning"] == [4, 6]


def test_early_stopping_counts_validations_without_gain():
    stage = Stage(validation_losses=[3.0, 2.0, 2.0, math.nan, 2.5, 0.0])
    schedule = replace(SCHEDULE, total_steps=100, patience=3)
    cursor = Cursor()
    assert stage.run(schedule, cursor) == "early stopping"
    assert (cursor.step, cursor.best_step, cursor.best_loss) == (20, 8, 2.0)
    # A run that is resumed after it stopped early stops at once.
    assert stage.run(schedule, Cursor.from_json(cursor.to_json())) == "early stopping"
    assert stage.done == 20


def test_a_loss_that_is_not_finite_stops_with_step_and_rate_and_saves_nothing_of_it():
    losses = [1.0] * 6 + [math.nan] + [1.0] * 10
    stage = Stage(train_losses=losses)
    with pytest.raises(DivergenceError, match=r"Loss nan .*at step 7, learning rates \{'lora': 0.7\}"):
        stage.run()
    assert [cursor["step"] for cursor, _ in stage.saved] == [4]


def test_an_interruption_saves_at_once_and_resuming_writes_the_same_lines():
    losses = list(range(1, 13))
    whole = Stage(train_losses=losses)
    whole.run()
    first = Stage(train_losses=losses, interrupt_at=5)
    assert first.run() == "interrupted"
    cursor, metrics = first.saved[-1]
    assert (cursor["step"], metrics) == (5, None)
    second = Stage(train_losses=losses)
    assert second.run(cursor=Cursor.from_json(json.loads(json.dumps(cursor)))) == "finished"
    rates = ("steps_per_second", "tokens_per_second", "data_share", "device_share")
    lines = [
        [{key: value for key, value in r.items() if key not in rates} for r in records]
        for records in (whole.records, first.records + second.records)
    ]
    assert lines[0] == lines[1]


@pytest.mark.parametrize("sent", [signal.SIGHUP, signal.SIGUSR1, signal.SIGTERM])
def test_a_signal_asks_for_a_stop_and_its_handler_comes_back(sent):
    outside = signal.signal(sent, signal.SIG_DFL)  # the tests themselves may run under nohup
    try:
        with catching_signals() as interruption:
            assert not interruption
            signal.raise_signal(sent)
            assert interruption and interruption.name == sent.name
        assert signal.getsignal(sent) is signal.SIG_DFL
    finally:
        signal.signal(sent, outside)


def test_a_hangup_that_is_ignored_stays_ignored(monkeypatch):
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does
    try:
        with catching_signals() as interruption:
            signal.raise_signal(signal.SIGHUP)
            assert not interruption
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_the_cursor_survives_json_before_any_validation():
    cursor = Cursor(step=2, totals={"loss": 1.5})
    assert Cursor.from_json(json.loads(json.dumps(cursor.to_json(), allow_nan=False))) == cursor


class Pending:
    """A metric on a device that tells when it is fetched."""

    def __init__(self, values, log, step):
        self.values, self.log, self.step = values, log, step

    def __array__(self, *_, **__):
        self.log.append(("fetched", self.step))
        return self.values

    def block_until_ready(self):
        self.log.append(("waited for", self.step))
        return self


def test_a_line_is_fetched_when_the_next_call_is_under_way(monkeypatch):
    log = []
    stage = Stage()
    original = stage.train_step

    def train_step(state, batch):
        state, metrics = original(state, batch)
        log.append(("dispatched", stage.done))
        return state, {**metrics, "loss": Pending(metrics["loss"], log, stage.done)}

    monkeypatch.setattr(stage, "train_step", train_step)
    stage.run(replace(SCHEDULE, total_steps=8, validate_every=8))
    fetched = [(what, step) for what, step in log if what != "waited for"]
    assert fetched == [
        *(("dispatched", step) for step in (1, 2, 3, 4)),
        *(("fetched", step) for step in (1, 2, 3)),
        *(("dispatched", step) for step in (5, 6, 7)),
        *(("fetched", step) for step in (4, 5, 6)),
        ("dispatched", 8),
        *(("fetched", step) for step in (7, 8)),
    ]


def test_the_host_is_never_more_than_a_few_calls_ahead(monkeypatch):
    log = []
    stage = Stage()
    original = stage.train_step

    def train_step(state, batch):
        state, metrics = original(state, batch)
        log.append(("dispatched", stage.done))
        return state, {**metrics, "loss": Pending(metrics["loss"], log, stage.done)}

    monkeypatch.setattr(stage, "train_step", train_step)
    stage.run(replace(SCHEDULE, total_steps=9, validate_every=9, log_every=100))
    for step in range(IN_FLIGHT + 1, 10):
        assert log.index(("waited for", step - IN_FLIGHT)) < log.index(("dispatched", step))


def test_calls_of_several_steps_give_the_lines_of_single_ones():
    """Lines that end in the middle of a call, too."""
    losses = list(range(1, 13))
    single, several = Stage(train_losses=losses), Stage(train_losses=losses)
    single.run()
    one_step = several.train_step

    def train_step(state, steps):
        found = []
        for step in steps:
            state, metrics = one_step(state, step)
            found.append(metrics)
        return state, {name: np.concatenate([m[name] for m in found]) for name in found[0]}

    several.train_step = train_step
    several.next_inputs = lambda step, limit: (range(step, step + limit), [10] * limit)
    several.step = lambda step, tokens: None
    several.run(cursor=Cursor())
    rates = ("steps_per_second", "tokens_per_second", "data_share", "device_share")
    lines = [
        [{key: value for key, value in r.items() if key not in rates} for r in stage.records]
        for stage in (single, several)
    ]
    assert lines[0] == lines[1]
    for line in several.records:
        if line["split"] == "train":
            assert line["tokens_per_second"] == pytest.approx(10 * line["steps_per_second"])


def test_a_failure_that_is_known_late_is_saved_nowhere():
    """Step 3 fails; that is seen only after step 4 is under way, or, here, when the run is interrupted."""
    stage = Stage(train_losses=[1.0, 1.0, math.inf] + [1.0] * 10, interrupt_at=3)
    with pytest.raises(DivergenceError, match="at step 3"):
        stage.run()
    assert stage.saved == []
