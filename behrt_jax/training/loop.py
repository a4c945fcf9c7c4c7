"""The training loop: steps, logging, validation, early stopping, checkpoints."""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol

import numpy as np

from behrt_jax.training.metrics_window import Call, DivergenceError, Metrics, Window
from behrt_jax.training.update import TrainState, Variables

__all__ = ["Actions", "Cursor", "DivergenceError", "Reporter", "Schedule", "train"]


@dataclass
class Cursor:
    """Where a run is, beside its arrays; saved with each checkpoint."""

    step: int = 0
    best_step: int | None = None
    best_loss: float = math.inf
    validations_without_gain: int = 0
    totals: dict[str, float] = field(default_factory=dict)
    """Training totals since the last line in metrics.jsonl."""
    seconds: float = 0.0
    """Wall time of the run so far, all its parts together."""

    def to_json(self) -> dict[str, Any]:
        """As JSON: no infinity."""
        return {**asdict(self), "best_loss": None if math.isinf(self.best_loss) else self.best_loss}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> "Cursor":
        """Inverse of :meth:`to_json`."""
        return cls(**{**value, "best_loss": math.inf if value["best_loss"] is None else value["best_loss"]})


@dataclass(frozen=True)
class Schedule:
    """When what happens, in steps."""

    total_steps: int
    steps_per_epoch: int
    validate_every: int
    log_every: int
    patience: int | None

    def next_validation(self, step: int) -> int:
        """The first step after `step` that is followed by a validation."""
        return min(self.total_steps, (step // self.validate_every + 1) * self.validate_every)


class Reporter(Protocol):
    """Where the loop reports to."""

    def step(self, step: int, tokens: int, loss: float | None) -> None:
        """Steps up to `step` were dispatched, with `tokens` in them; `loss` is the latest that is known."""
        ...

    def record(self, metrics: Metrics) -> None:
        """A line of metrics.jsonl."""
        ...


@dataclass(frozen=True)
class Actions:
    """What the loop calls; everything about data, devices and files is behind these."""

    next_inputs: Callable[[int, int], tuple[Any, Sequence[int]]]
    """(step, limit) -> what `train_step` takes for that step and maybe some after it, at most `limit`, and
    the number of real tokens of each."""
    train_step: Callable[[TrainState, Any], tuple[TrainState, Metrics]]
    """(state, inputs) -> state after these steps, and each one's metrics, stacked: `[steps, ...]`."""
    validate: Callable[[Variables], Metrics]
    learning_rates: Callable[[int], dict[str, float]]
    save: Callable[[TrainState, Cursor, Metrics | None], None]
    """Write a checkpoint; with the validation's metrics where it follows one."""
    interrupted: Callable[[], bool]
    probe: Callable[[TrainState], Metrics] = lambda state: {}
    """What is looked at beside the validation, whose line in metrics.jsonl it joins."""
    gradients: Callable[[np.ndarray], Metrics] = lambda squares: {}
    """Sum of squares of each trainable leaf's gradient `[leaves]` -> what the line says of them."""
    offender: Callable[[np.ndarray | None], str] = lambda squares: "unknown"
    """The same of the first step that is not finite -> what went wrong first."""
    compilations: Callable[[], int | None] = lambda: None
    """How often the train step was compiled so far."""


def train(
    state: TrainState, cursor: Cursor, schedule: Schedule, actions: Actions, reporter: Reporter
) -> tuple[TrainState, str]:
    """Train from `cursor.step` until a reason to stop.

    The devices never wait for the host, except where a validation is due: metrics stay on them until a line
    of the log is full, and are fetched when the call after that is already under way. Nor does the host run
    far ahead of them, see `metrics_window.IN_FLIGHT`.

    Returns:
        The last state and why it stopped: ``finished``, ``early stopping`` or ``interrupted``.
        `cursor` is updated in place.

    Raises:
        DivergenceError: loss or gradient is not finite; names step, learning rates and the leaf where
            it began. Nothing of the failed stretch is saved.
    """
    window = Window(cursor, schedule, actions, reporter)
    if schedule.patience is not None and cursor.validations_without_gain >= schedule.patience:
        return state, "early stopping"
    while cursor.step < schedule.total_steps:
        if actions.interrupted():
            window.settle()
            actions.save(state, cursor, None)
            return state, "interrupted"
        window.let_devices_catch_up()
        asked = time.perf_counter()
        inputs, tokens = actions.next_inputs(cursor.step, schedule.next_validation(cursor.step) - cursor.step)
        data_seconds = time.perf_counter() - asked
        state, metrics = actions.train_step(state, inputs)
        cursor.step += len(tokens)
        window.add(Call(metrics, tokens, data_seconds))
        reporter.step(cursor.step, sum(tokens), window.latest_loss)

        if cursor.step == schedule.next_validation(cursor.step - 1):
            window.settle()
            validation = actions.validate(state.variables)
            _note_validation(cursor, validation["loss"])
            # Metrics first: a run killed in between drops the lines past its checkpoint when resumed,
            # while a line never written could not be brought back.
            epoch = cursor.step / schedule.steps_per_epoch
            reporter.record(
                {"step": cursor.step, "epoch": epoch, "split": "tuning", **validation, **actions.probe(state)}
            )
            actions.save(state, cursor, validation)
            window.restart_clock()
            waited = schedule.patience is not None and cursor.validations_without_gain >= schedule.patience
            if waited and cursor.step < schedule.total_steps:
                return state, "early stopping"
    return state, "finished"


def _note_validation(cursor: Cursor, loss: float) -> None:
    if loss < cursor.best_loss:
        cursor.best_loss, cursor.best_step, cursor.validations_without_gain = loss, cursor.step, 0
    else:
        cursor.validations_without_gain += 1
