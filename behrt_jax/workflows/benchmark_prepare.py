"""How fast data preparation is, and how much memory it takes, beside plain tools on the same table.

The events are made up (`benchmark_events`). Each stage runs in a fresh process (`benchmark_stages`), which
measures itself: wall time without imports, and the largest resident size, imports included.
"""

import importlib.util
import json
import os
import platform
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa

import behrt_jax
from behrt_jax.errors import InputError
from behrt_jax.workflows.benchmark_events import Order

STAGES = ("parquet", "source", "polars", "prepare")
"""Reading the three columns; reading them as a source does; polars streaming; all of the preparation."""


@dataclass(frozen=True)
class PrepareBenchmark:
    """Time the preparation of made-up events, and what it takes in memory, beside plain tools."""

    events: int = 20_000_000
    """Rows of the table, a birth for each subject included."""
    subjects: int = 300_000
    """Subjects, with long-tailed numbers of events."""
    codes: int = 20_000
    """Distinct codes, with the frequencies of Zipf's law."""
    order: Literal["sorted", "shuffled", "both"] = "both"
    """Rows by subject and time, or in no order at all."""
    directory: Path | None = None
    """Where to keep the tables, for further runs; a temporary folder where not given."""
    stages: tuple[Literal["parquet", "source", "polars", "prepare"], ...] = STAGES
    """What to measure, in this order."""
    workers: int = 1
    """Processes of the preparation."""
    output: Path | None = None
    """File for the figures as JSON."""


def benchmark_prepare(config: PrepareBenchmark) -> dict[str, Any]:
    """Make the tables, run every stage on each, print the figures side by side, and return them.

    Returns:
        ``settings``, ``machine`` and ``runs``. The load average in ``machine`` is that of the minute
        before: figures taken beside other busy processes say little. ``runs`` has a dict for each order
        and stage: ``order``, ``stage``, ``events``, ``subjects`` (where the stage counts them),
        ``seconds``, ``events_per_second``, ``peak_mib``, ``parts`` (part of the stage -> seconds, where it
        tells) and ``speed_by_polars`` (null without polars); or ``skipped``, a reason.

    Raises:
        InputError: sizes that make no table, or a stage that failed.
    """
    if config.subjects < 1 or config.codes < 1 or config.events < 2 * config.subjects:
        raise InputError(
            f"--events is {config.events}, --subjects {config.subjects} and --codes {config.codes}: give at "
            "least one code, one subject, and two events for each subject."
        )
    orders: tuple[Order, ...] = ("sorted", "shuffled") if config.order == "both" else (config.order,)
    runs, machine = [], _machine()
    with tempfile.TemporaryDirectory(prefix="benchmark-prepare-") as scratch:
        directory = config.directory or Path(scratch)
        directory.mkdir(parents=True, exist_ok=True)
        for order in orders:
            folder = directory / f"{order}-{config.events}-{config.subjects}-{config.codes}"
            if not folder.exists():
                _in_fresh_process("make", config, order, folder)
            of_order = [_in_fresh_process(stage, config, order, folder) for stage in config.stages]
            runs += _with_ratios(of_order)
    report = {"settings": _settings(config), "machine": machine, "runs": runs}
    print(as_table(report))
    if config.output is not None:
        config.output.parent.mkdir(parents=True, exist_ok=True)
        config.output.write_text(json.dumps(report, indent=2) + "\n")
    return report


def as_table(report: Mapping[str, Any]) -> str:
    """The figures of :func:`benchmark_prepare` as aligned text."""
    lines = [f"{'order':<9} {'stage':<20} {'seconds':>8} {'events/s':>12} {'peak MiB':>9} {'/ polars':>8}"]
    for run in report["runs"]:
        start = f"{run['order']:<9} {run['stage']:<20} "
        if "skipped" in run:
            lines.append(f"{start}skipped: {run['skipped']}")
            continue
        ratio = run["speed_by_polars"]
        lines.append(
            f"{start}{run['seconds']:>8.2f} {run['events_per_second']:>12,.0f} {run['peak_mib']:>9,.0f} "
            + (f"{ratio:>7.2f}x" if ratio else f"{'':>8}")
        )
        lines += [f"{'':<9}   {part:<18} {seconds:>8.2f}" for part, seconds in run["parts"].items()]
    return "\n".join(lines)


def _in_fresh_process(stage: str, config: PrepareBenchmark, order: Order, folder: Path) -> dict[str, Any]:
    """Run one stage as ``python -m`` of `benchmark_stages` and take its figures from its last line."""
    start = {"order": order, "stage": stage}
    if stage == "polars" and importlib.util.find_spec("polars") is None:
        return {**start, "skipped": "polars is not installed"}
    task = {"stage": stage, "order": order, "folder": str(folder.absolute()), **_settings(config)}
    root = Path(behrt_jax.__file__).parents[1]
    path = os.pathsep.join([str(root), *filter(None, [os.environ.get("PYTHONPATH")])])
    done = subprocess.run(
        [sys.executable, "-m", "behrt_jax.workflows.benchmark_stages", json.dumps(task)],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
    )
    if done.returncode:
        reason = (done.stderr.strip() or f"exit status {done.returncode}").splitlines()[-1]
        raise InputError(f"The stage {stage} failed on {order} events: {reason}")
    figures = json.loads(done.stdout.splitlines()[-1])
    return {**start, **figures, "events_per_second": figures["events"] / figures["seconds"]}


def _with_ratios(runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Add each stage's speed as a multiple of polars', where that was measured."""
    polars = next((run for run in runs if run["stage"] == "polars" and "seconds" in run), None)
    for run in runs:
        run["speed_by_polars"] = polars["seconds"] / run["seconds"] if polars and "seconds" in run else None
    return runs


def _settings(config: PrepareBenchmark) -> dict[str, Any]:
    settings = asdict(config)
    return {name: settings[name] for name in ("events", "subjects", "codes", "workers")}


def _machine() -> dict[str, Any]:
    versions = {"python": platform.python_version(), "numpy": np.__version__, "pyarrow": pa.__version__}
    return {
        "cores": os.cpu_count(),
        "load_average": os.getloadavg()[0],
        "machine": platform.machine(),
        **versions,
    }
