"""The training loop's parts: where a run is, when what is due, its steps and their figures, signals.

A recipe (`workflows.pretrain`, `workflows.finetune`) goes through :meth:`Steps.dispatch`, and validates,
saves and reports where :class:`Schedule` says so.
"""

import math
import signal
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple

import jax
import numpy as np

from behrt_jax.config.training import TaskTrainConfig, TrainConfig
from behrt_jax.errors import DivergenceError
from behrt_jax.files import JsonObject
from behrt_jax.models.losses import add_totals, mean_metrics
from behrt_jax.training.step import Totals, TrainState
from behrt_jax.training.telemetry import Telemetry, compilations

Metrics = JsonObject
"""A line of metrics.jsonl, or a part of it."""
IN_FLIGHT = 4
"""Calls that the host may be ahead of the devices: enough that they never wait for it."""


USUAL_EPOCHS, LEAST_STEPS, LEAST_BETWEEN = 20, 800, 40
"""Of a fine-tuning run whose epochs are not given: few labels take more of them, with validations that are no
less than so many steps apart, lest early stopping ends the run at the first rise of a few labels' loss."""


@dataclass
class Cursor:
    """The place of a run, beside its arrays; saved with each checkpoint."""

    step: int = 0
    best_step: int | None = None
    best_loss: float = math.inf
    validations_without_gain: int = 0
    totals: dict[str, float] = field(default_factory=dict)
    """Training totals since the last line in metrics.jsonl."""
    seconds: float = 0.0
    """Wall time of the run so far, all its parts together."""

    def note_validation(self, loss: float) -> None:
        """Take the loss of a validation after the current step into account."""
        if loss < self.best_loss:
            self.best_loss, self.best_step, self.validations_without_gain = loss, self.step, 0
        else:
            self.validations_without_gain += 1

    def to_json(self) -> JsonObject:
        """As JSON: no infinity."""
        return {**asdict(self), "best_loss": None if math.isinf(self.best_loss) else self.best_loss}

    @classmethod
    def from_json(cls, value: JsonObject) -> "Cursor":
        """Inverse of :meth:`to_json`."""
        return cls(**{**value, "best_loss": math.inf if value["best_loss"] is None else value["best_loss"]})


@dataclass(frozen=True)
class Schedule:
    """Steps at which something is due."""

    total_steps: int
    steps_per_epoch: int
    validate_every: int
    log_every: int
    patience: int | None

    @classmethod
    def of(cls, config: TrainConfig | TaskTrainConfig, steps_per_epoch: int) -> "Schedule":
        """The schedule of a run whose epochs have so many steps."""
        epochs = config.epochs or max(USUAL_EPOCHS, -(-LEAST_STEPS // steps_per_epoch))
        total = epochs * steps_per_epoch
        apart = steps_per_epoch if config.epochs else max(steps_per_epoch, LEAST_BETWEEN)
        return cls(
            min(total, config.max_steps or total),
            steps_per_epoch,
            config.validate_every or apart,
            config.log_every,
            config.patience,
        )

    def next_validation(self, step: int) -> int:
        """The first step after `step` that is followed by a validation."""
        return min(self.total_steps, (step // self.validate_every + 1) * self.validate_every)

    def validates(self, step: int) -> bool:
        """Tell whether a validation follows this step."""
        return step == self.next_validation(step - 1)

    def next_line(self, step: int) -> int:
        """The first step after `step` with a line in metrics.jsonl."""
        return min((step // self.log_every + 1) * self.log_every, self.next_validation(step))

    def line(self, step: int, split: str) -> Metrics:
        """The beginning of a line in metrics.jsonl after this step."""
        return {"step": step, "epoch": step / self.steps_per_epoch, "split": split}


@dataclass(frozen=True)
class Feed:
    """The next steps' inputs, and the program that trains on them; `feeding.open_feed` opens one."""

    next_inputs: Callable[[int, int], tuple[Any, Sequence[int]]]
    """(step, limit) -> inputs of that step and maybe some after it, at most `limit`, and the real tokens of
    each. Steps are asked for in order, without gaps."""
    train_step: Callable[[TrainState, Any], tuple[TrainState, Totals]]
    """(state, inputs) -> state after these steps, and the figures of each, stacked: `[steps, ...]`."""
    programs: tuple[Any, ...]
    """The jitted functions behind `train_step`."""

    def compilations(self) -> int | None:
        """Compilations of the program that was compiled most often; None where JAX does not tell."""
        counts = [compilations(program) for program in self.programs]
        return max((count for count in counts if count is not None), default=None)


class Call(NamedTuple):
    """One call of a feed's `train_step`, whose figures are still on the devices."""

    totals: Totals
    tokens: Sequence[int]
    """Real tokens of each of its steps."""
    data_seconds: float
    """Time for which the loop waited for its inputs."""


class Steps:
    """The steps of a run: dispatched call by call, their figures fetched a call late and written in lines.

    The devices never wait for the host, except where a validation is due: figures stay on them until a line
    of the log is full, and are fetched when the call after that is already under way. Nor does the host run
    further than `IN_FLIGHT` calls ahead of them.
    """

    stop_reason = ""
    """Reason why :meth:`dispatch` came to its end: ``finished``, ``early stopping`` or ``interrupted``."""
    latest_loss: float | None = None
    """The latest loss that is known."""
    latest_tokens = 0
    """Real tokens of the latest call."""

    def __init__(
        self,
        feed: Feed,
        cursor: Cursor,
        schedule: Schedule,
        telemetry: Telemetry,
        record: Callable[[Metrics], None],
    ):
        """Go on from the cursor, which is updated in place; `record` takes the lines of metrics.jsonl."""
        self._feed = feed
        self._cursor = cursor
        self._schedule = schedule
        self._telemetry = telemetry
        self._record = record
        self._calls: deque[Call] = deque()
        self._settled = cursor.step
        """Steps whose figures were fetched."""
        self._start_line()
        self.restart_clock()

    def dispatch(self, state: TrainState, interrupted: Callable[[], bool]) -> Iterator[TrainState]:
        """Dispatch one call after the other until there is a reason to stop; the state after each.

        Raises:
            DivergenceError: loss or gradient is not finite; names step, learning rates and the leaf where
                it began.
        """
        cursor, schedule = self._cursor, self._schedule
        while True:
            self.stop_reason = self._reason_to_stop(interrupted)
            if self.stop_reason:
                return
            self._let_devices_catch_up()
            asked = time.perf_counter()
            inputs, tokens = self._feed.next_inputs(
                cursor.step, schedule.next_validation(cursor.step) - cursor.step
            )
            data_seconds = time.perf_counter() - asked
            state, totals = self._feed.train_step(state, inputs)
            cursor.step += len(tokens)
            self._add(Call(totals, tokens, data_seconds))
            yield state

    def _reason_to_stop(self, interrupted: Callable[[], bool]) -> str:
        cursor, schedule = self._cursor, self._schedule
        if cursor.step >= schedule.total_steps:
            return "finished"
        if schedule.patience is not None and cursor.validations_without_gain >= schedule.patience:
            return "early stopping"
        if interrupted():
            self.settle()
            return "interrupted"
        return ""

    def restart_clock(self) -> None:
        """Leave what went before out of the steps' time."""
        self._counted_to = time.perf_counter()
        self._waited = 0.0

    def _let_devices_catch_up(self) -> None:
        if len(self._calls) >= IN_FLIGHT:
            asked = time.perf_counter()
            jax.block_until_ready(self._calls[-IN_FLIGHT].totals)
            self._waited += time.perf_counter() - asked

    def _add(self, call: Call) -> None:
        """Take a call that was just dispatched; the ones before it are settled if they fill a line."""
        done = self._settled + sum(len(earlier.tokens) for earlier in self._calls)
        self._calls.append(call)
        self.latest_tokens = sum(call.tokens)
        if done >= self._schedule.next_line(self._settled):
            self.settle(all_but=1)

    def settle(self, all_but: int = 0) -> None:
        """Fetch the figures of all calls, or all but the latest, and write the lines that are full.

        Raises:
            DivergenceError: see :meth:`dispatch`.
        """
        calls = [self._calls.popleft() for _ in range(len(self._calls) - all_but)]
        asked = time.perf_counter()
        fetched = jax.device_get([call.totals for call in calls])
        now = time.perf_counter()
        steps = max(sum(len(call.tokens) for call in calls), 1)
        # The clock says nothing of single steps: each has an equal part.
        seconds = (now - self._counted_to) / steps
        device_seconds = (self._waited + now - asked) / steps
        for call, totals in zip(calls, fetched, strict=True):
            for index, tokens in enumerate(call.tokens):
                self._seconds += seconds
                self._device_seconds += device_seconds
                self._data_seconds += call.data_seconds / len(call.tokens)
                self._tokens += tokens
                self._steps += 1
                self._count({name: values[index] for name, values in totals.items()})
        self._counted_to, self._waited = now, 0.0

    def _count(self, totals: dict[str, np.ndarray]) -> None:
        """Add the figures of the next step to the cursor's totals, and write its line if it has one."""
        norm = float(totals.pop("gradient_norm"))
        squares = totals.pop("gradient_squares", None)
        loss = float(totals["loss"])
        if not (math.isfinite(loss) and math.isfinite(norm)):
            rates = {g: float(f"{r:.3g}") for g, r in self._telemetry.learning_rates(self._settled).items()}
            raise DivergenceError(
                f"Loss {loss:.4g} and gradient norm {norm:.4g} at step {self._settled + 1}, "
                f"learning rates {rates}. First not finite: {self._telemetry.offender(squares)}. "
                "The last good checkpoint is kept. "
                "Lower optimizer.learning_rate or optimizer.clip_norm."
            )
        self._cursor.totals = add_totals(self._cursor.totals, {k: float(v) for k, v in totals.items()})
        self.latest_loss = loss / max(float(totals["targets"]), 1.0)
        self._settled += 1
        if self._settled == self._schedule.next_line(self._settled - 1):
            self._write_line(norm, squares)

    def _write_line(self, gradient_norm: float, squares: np.ndarray | None) -> None:
        """Write the line that ends with the last settled step, whose gradients are given."""
        seconds = max(self._seconds, 1e-9)
        line = {
            **self._schedule.line(self._settled, "train"),
            **mean_metrics(self._cursor.totals),
            "learning_rate": self._telemetry.learning_rates(self._settled - 1),
            "gradient_norm": gradient_norm,
            "steps_per_second": self._steps / seconds,
            "tokens_per_second": self._tokens / seconds,
            "data_share": self._data_seconds / seconds,
            "device_share": self._device_seconds / seconds,
        }
        if (times := self._feed.compilations()) is not None:
            line["compilations"] = times
        if squares is not None:
            line |= self._telemetry.gradients(squares)
        self._record(line)
        self._cursor.totals = {}
        self._start_line()

    def _start_line(self) -> None:
        self._steps, self._tokens = 0, 0
        self._seconds = self._data_seconds = self._device_seconds = 0.0


STOPS = [
    getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1") if hasattr(signal, name)
]
"""Signals that ask a run to stop: of a user, a scheduler, a terminal that is closed, a batch system."""


class Interruption:
    """A stop that the user or a scheduler asked for by a signal; read between two steps."""

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
    """Turn the first signal of :data:`STOPS` into a flag; a second SIGINT interrupts at once.

    A hangup that the caller ignores, as under nohup, stays ignored. Outside the main thread, where Python
    allows no handlers, the flag is never set.
    """
    interruption = Interruption()

    def remember(number, frame):
        if interruption and number == signal.SIGINT:
            raise KeyboardInterrupt
        interruption.number = number

    previous = {}
    try:
        for number in STOPS:
            if number.name == "SIGHUP" and signal.getsignal(number) is signal.SIG_IGN:
                continue
            previous[number] = signal.signal(number, remember)
    except ValueError:
        pass
    try:
        yield interruption
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
