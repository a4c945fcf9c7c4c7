"""How long a pretraining run takes from the start of its process to its first finished step.

Each run is the command itself in a fresh process, which notes the time of each part in its
summary.json: cold with no compiled programs on disk, warm with those of a run before.
"""

import json
import os
import platform
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

import behrt_jax
from behrt_jax.errors import InputError
from behrt_jax.tracking.console import table_text

PARTS = ("imported", "data read", "baselines counted", "compiled", "first step")
"""Marks of a run. The step is compiled while the baselines are counted: the two may come in any order."""


@dataclass(frozen=True)
class StartupBenchmark:
    """Time the start of pretraining, with and without compiled programs on disk."""

    config: str = "small"
    """Named configuration."""
    options: tuple[str, ...] = ()
    """Further options of the command, each as one word: --data.subjects=500."""
    rounds: int = 3
    """Runs of each kind."""
    output: Path | None = None
    """File for the figures as JSON."""


def benchmark_startup(config: StartupBenchmark) -> dict[str, Any]:
    """Run all rounds, print a table of medians, and return the figures.

    Returns:
        ``settings``, ``machine`` and ``runs``: a dict for each run, with ``cache`` (cold or warm),
        ``round``, ``entries`` (programs that were compiled and kept) and, for each of :data:`PARTS`, the
        seconds from the start of the process until it was done.

    Raises:
        InputError: no rounds, or a run that failed.
    """
    if config.rounds < 1:
        raise InputError(f"--rounds is {config.rounds}: give 1 or more.")
    machine = {
        "cores": os.cpu_count(),
        "load_average": os.getloadavg()[0],
        "machine": platform.machine(),
        "python": platform.python_version(),
    }
    runs = []
    with tempfile.TemporaryDirectory(prefix="benchmark-startup-") as scratch:
        for number in range(config.rounds):
            cache = Path(scratch) / f"compiled-{number}"
            for kind in ("cold", "warm"):
                runs.append({"cache": kind, "round": number, **_run(config, Path(scratch), cache)})
    settings = {name: value for name, value in asdict(config).items() if name != "output"}
    report = {"settings": settings, "machine": machine, "runs": runs}
    print(as_table(report))
    if config.output is not None:
        config.output.parent.mkdir(parents=True, exist_ok=True)
        config.output.write_text(json.dumps(report, indent=2) + "\n")
    return report


def as_table(report: Mapping[str, Any]) -> str:
    """Medians over the rounds as aligned text."""
    rows = []
    for kind in ("cold", "warm"):
        runs = [run for run in report["runs"] if run["cache"] == kind]
        figures = [f"{median(run[part] for run in runs):.2f}" for part in PARTS]
        rows.append([kind, *figures, str(max(run["entries"] for run in runs))])
    title = "Seconds from the start of the process until this was done, median"
    return table_text(title, ["cache", *PARTS, "programs kept anew"], rows)


def _run(config: StartupBenchmark, scratch: Path, cache: Path) -> dict[str, Any]:
    script = Path(behrt_jax.__file__).parents[1] / "experiments" / "pretrain.py"
    before = _entries(cache)
    environment = {k: v for k, v in os.environ.items() if k != "JAX_COMPILATION_CACHE_DIR"}
    path = [str(script.parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])]
    with tempfile.TemporaryDirectory(prefix="run-", dir=scratch) as output:
        options = ["--config", config.config, "--train.max_steps", "1", *config.options]
        places = ["--output", f"{output}/run", "--compilation_cache", str(cache)]
        done = subprocess.run(
            [sys.executable, str(script), *options, *places],
            env={**environment, "PYTHONPATH": os.pathsep.join(path)},
            capture_output=True,
            text=True,
        )
        if done.returncode:
            reason = (done.stderr.strip() or f"exit status {done.returncode}").splitlines()[-1]
            raise InputError(f"The run failed: {reason}")
        marks = json.loads(Path(output, "run", "summary.json").read_text())["startup_seconds"]
    return {"entries": _entries(cache) - before, **marks}


def _entries(cache: Path) -> int:
    return len(list(cache.rglob("*-cache")))
