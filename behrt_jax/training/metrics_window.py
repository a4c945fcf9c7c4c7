"""Metrics of steps that were dispatched: fetched a call late, summed, and written line by line."""

import math
import time
from collections import deque
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import numpy as np

from behrt_jax.evaluation.metrics import add_totals, mean_metrics

if TYPE_CHECKING:
    from behrt_jax.training.loop import Actions, Cursor, Reporter, Schedule

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
