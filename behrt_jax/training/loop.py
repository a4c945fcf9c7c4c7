"""The training loop: steps, logging, validation, early stopping, checkpoints."""

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol

import jax
import numpy as np

from behrt_jax.evaluation.metrics import add_totals, mean_metrics
from behrt_jax.training.step import TrainState, Variables

Metrics = dict[str, Any]


class DivergenceError(RuntimeError):
    """The training loss or gradient is no longer finite."""


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


class Reporter(Protocol):
    """Where the loop reports to."""

    def step(self, step: int, tokens: int, loss: float | None) -> None:
        """A step was dispatched; `loss` is the latest that is known."""
        ...

    def record(self, metrics: Metrics) -> None:
        """A line of metrics.jsonl."""
        ...


@dataclass(frozen=True)
class Actions:
    """What the loop calls; everything about data, devices and files is behind these."""

    next_batch: Callable[[int], tuple[Any, int]]
    """Step -> batch on the devices, and its number of real tokens."""
    train_step: Callable[[TrainState, Any], tuple[TrainState, Metrics]]
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

    The host never waits for a step, except where a line is logged or a validation is due: until
    then metrics stay on the device.

    Returns:
        The last state and why it stopped: ``finished``, ``early stopping`` or ``interrupted``.
        `cursor` is updated in place.

    Raises:
        DivergenceError: loss or gradient is not finite; names step, learning rates and the leaf where
            it began. Nothing of the failed stretch is saved.
    """
    window = _Window(cursor, actions)
    if schedule.patience is not None and cursor.validations_without_gain >= schedule.patience:
        return state, "early stopping"
    while cursor.step < schedule.total_steps:
        if actions.interrupted():
            window.collect()
            actions.save(state, cursor, None)
            return state, "interrupted"
        asked = time.perf_counter()
        batch, tokens = actions.next_batch(cursor.step)
        window.data_seconds += time.perf_counter() - asked
        state, metrics = actions.train_step(state, batch)
        cursor.step += 1
        window.add(metrics, tokens)
        reporter.step(cursor.step, tokens, window.latest_loss)

        last = cursor.step == schedule.total_steps
        validate = last or cursor.step % schedule.validate_every == 0
        if validate or cursor.step % schedule.log_every == 0:
            epoch = cursor.step / schedule.steps_per_epoch
            reporter.record({"step": cursor.step, "epoch": epoch, "split": "train", **window.close()})
        if validate:
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
            if waited and not last:
                return state, "early stopping"
    return state, "finished"


def _note_validation(cursor: Cursor, loss: float) -> None:
    if loss < cursor.best_loss:
        cursor.best_loss, cursor.best_step, cursor.validations_without_gain = loss, cursor.step, 0
    else:
        cursor.validations_without_gain += 1


class _Window:
    """Training totals since the last logged line, left on the device until they are needed."""

    def __init__(self, cursor: Cursor, actions: Actions):
        self.cursor = cursor
        self.actions = actions
        self.pending: list[Metrics] = []
        self.latest_loss: float | None = None
        self.gradient_norm = math.nan
        self.squares: np.ndarray | None = None
        self.restart_clock()

    def restart_clock(self) -> None:
        self.started, self.steps, self.tokens = time.perf_counter(), 0, 0
        self.data_seconds = 0.0

    def add(self, metrics: Metrics, tokens: int) -> None:
        self.pending.append(metrics)
        self.steps += 1
        self.tokens += tokens

    def collect(self) -> None:
        """Fetch what is pending and add it to the cursor's totals."""
        fetched = jax.device_get(self.pending)
        first = self.cursor.step - len(fetched) + 1
        for step, metrics in enumerate(fetched, start=first):
            norm = float(metrics.pop("gradient_norm"))
            squares = metrics.pop("gradient_squares", None)
            if not (math.isfinite(metrics["loss"]) and math.isfinite(norm)):
                rates = self.actions.learning_rates(step - 1)
                raise DivergenceError(
                    f"Loss {metrics['loss']:.4g} and gradient norm {norm:.4g} at step {step}, learning rates "
                    f"{ {group: float(f'{rate:.3g}') for group, rate in rates.items()} }. First not finite: "
                    f"{self.actions.offender(squares)}. The last good checkpoint is kept. "
                    "Lower optimizer.learning_rate or optimizer.clip_norm."
                )
            self.cursor.totals = add_totals(self.cursor.totals, {k: float(v) for k, v in metrics.items()})
            self.gradient_norm, self.squares = norm, squares
            self.latest_loss = float(metrics["loss"]) / max(float(metrics["targets"]), 1.0)
        self.pending = []

    def close(self) -> Metrics:
        """Metrics of the window, which starts anew."""
        waited = time.perf_counter()
        self.collect()
        now = time.perf_counter()
        seconds = max(now - self.started, 1e-9)
        metrics = {
            **mean_metrics(self.cursor.totals),
            "learning_rate": self.actions.learning_rates(self.cursor.step - 1),
            "gradient_norm": self.gradient_norm,
            "steps_per_second": self.steps / seconds,
            "tokens_per_second": self.tokens / seconds,
            "data_share": self.data_seconds / seconds,
            "device_share": (now - waited) / seconds,
        }
        if (compilations := self.actions.compilations()) is not None:
            metrics["compilations"] = compilations
        if self.squares is not None:
            metrics |= self.actions.gradients(self.squares)
        self.cursor.totals = {}
        self.restart_clock()
        return metrics
