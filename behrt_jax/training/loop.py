"""The training loop: steps, logging, validation, early stopping, checkpoints."""

import math
import signal
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple, Protocol

import jax
import numpy as np

from behrt_jax.models.losses import add_totals, mean_metrics
from behrt_jax.training.step import TrainState, Variables

# Stop politely when the user or a scheduler asks for it.


class Interruption:
    """Set by a signal, read between two steps."""

    number: int = 0
    """Number of the signal that came, 0 before."""

    def __bool__(self) -> bool:
        return self.number != 0

    @property
    def name(self) -> str:
        """Name of the signal that came."""
        return signal.Signals(self.number).name if self.number else ""


@contextmanager
def catching_signals() -> Iterator[Interruption]:
    """Turn the first SIGINT or SIGTERM into a flag; a second SIGINT interrupts at once.

    Outside the main thread, where Python allows no handlers, the flag is never set.
    """
    interruption = Interruption()

    def remember(number, frame):
        if interruption and number == signal.SIGINT:
            raise KeyboardInterrupt
        interruption.number = number

    previous = {}
    try:
        for number in (signal.SIGINT, signal.SIGTERM):
            previous[number] = signal.signal(number, remember)
    except ValueError:
        pass
    try:
        yield interruption
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


# Metrics of steps that were dispatched: fetched a call late, summed, and written line by line.

Metrics = dict[str, Any]
IN_FLIGHT = 4
"""Calls that the host may be ahead of the devices: enough that they never wait for it."""


class DivergenceError(RuntimeError):
    """The training loss or gradient is no longer finite."""


class Call(NamedTuple):
    """One call of `train_step` whose metrics are still on the devices."""

    metrics: Metrics
    tokens: Sequence[int]
    """Real tokens of each of its steps."""
    data_seconds: float
    """What the loop waited for its inputs."""


class Window:
    """Calls whose metrics are still on the devices, and the figures of the line that they will fill."""

    def __init__(self, cursor: "Cursor", schedule: "Schedule", actions: "Actions", reporter: "Reporter"):
        """A line begins where the cursor's totals say."""
        self.cursor = cursor
        self.schedule = schedule
        self.actions = actions
        self.reporter = reporter
        self.calls: deque[Call] = deque()
        self.settled = cursor.step
        """Steps whose metrics were fetched."""
        self.latest_loss: float | None = None
        self.start_line()
        self.restart_clock()

    def start_line(self) -> None:
        """No step is in the line yet."""
        self.steps, self.tokens = 0, 0
        self.seconds = self.data_seconds = self.device_seconds = 0.0

    def restart_clock(self) -> None:
        """What went before is no part of the steps' time."""
        self.counted_to = time.perf_counter()
        self.waited = 0.0

    def let_devices_catch_up(self) -> None:
        """Wait until fewer than `IN_FLIGHT` calls are not done."""
        if len(self.calls) >= IN_FLIGHT:
            asked = time.perf_counter()
            jax.block_until_ready(self.calls[-IN_FLIGHT].metrics)
            self.waited += time.perf_counter() - asked

    def add(self, call: Call) -> None:
        """Take a call that was just dispatched; the ones before it are settled if they fill a line."""
        done = self.settled + sum(len(earlier.tokens) for earlier in self.calls)
        self.calls.append(call)
        if done >= self.next_line(self.settled):
            self.settle(all_but=1)

    def next_line(self, step: int) -> int:
        """The first step after `step` with a line in metrics.jsonl."""
        log_every = self.schedule.log_every
        return min((step // log_every + 1) * log_every, self.schedule.next_validation(step))

    def settle(self, all_but: int = 0) -> None:
        """Fetch the metrics of all calls, or all but the latest, and write the lines that are full."""
        calls = [self.calls.popleft() for _ in range(len(self.calls) - all_but)]
        asked = time.perf_counter()
        fetched = jax.device_get([call.metrics for call in calls])
        now = time.perf_counter()
        steps = max(sum(len(call.tokens) for call in calls), 1)
        # The clock says nothing of single steps: each has an equal part.
        seconds = (now - self.counted_to) / steps
        device_seconds = (self.waited + now - asked) / steps
        for call, metrics in zip(calls, fetched, strict=True):
            for index, tokens in enumerate(call.tokens):
                self.seconds += seconds
                self.device_seconds += device_seconds
                self.data_seconds += call.data_seconds / len(call.tokens)
                self.tokens += tokens
                self.steps += 1
                self.count({name: values[index] for name, values in metrics.items()})
        self.counted_to, self.waited = now, 0.0

    def count(self, metrics: Metrics) -> None:
        """Add the metrics of the next step to the cursor's totals, and write its line if it has one."""
        norm = float(metrics.pop("gradient_norm"))
        squares = metrics.pop("gradient_squares", None)
        if not (math.isfinite(metrics["loss"]) and math.isfinite(norm)):
            rates = {g: float(f"{r:.3g}") for g, r in self.actions.learning_rates(self.settled).items()}
            raise DivergenceError(
                f"Loss {metrics['loss']:.4g} and gradient norm {norm:.4g} at step {self.settled + 1}, "
                f"learning rates {rates}. First not finite: {self.actions.offender(squares)}. "
                "The last good checkpoint is kept. "
                "Lower optimizer.learning_rate or optimizer.clip_norm."
            )
        self.cursor.totals = add_totals(self.cursor.totals, {k: float(v) for k, v in metrics.items()})
        self.latest_loss = float(metrics["loss"]) / max(float(metrics["targets"]), 1.0)
        self.settled += 1
        if self.settled == self.next_line(self.settled - 1):
            self.write_line(norm, squares)

    def write_line(self, gradient_norm: float, squares: np.ndarray | None) -> None:
        """Write the line that ends with the last settled step, whose gradients are given."""
        seconds = max(self.seconds, 1e-9)
        line = {
            "step": self.settled,
            "epoch": self.settled / self.schedule.steps_per_epoch,
            "split": "train",
            **mean_metrics(self.cursor.totals),
            "learning_rate": self.actions.learning_rates(self.settled - 1),
            "gradient_norm": gradient_norm,
            "steps_per_second": self.steps / seconds,
            "tokens_per_second": self.tokens / seconds,
            "data_share": self.data_seconds / seconds,
            "device_share": self.device_seconds / seconds,
        }
        if (compilations := self.actions.compilations()) is not None:
            line["compilations"] = compilations
        if squares is not None:
            line |= self.actions.gradients(squares)
        self.reporter.record(line)
        self.cursor.totals = {}
        self.start_line()


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
