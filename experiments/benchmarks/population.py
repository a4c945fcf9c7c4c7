"""How long a population takes beside its members trained one after the other, in processes of their own.

All runs are the command itself, with the same data, labels, base and number of steps. The single runs share a
cache of compiled programs, as they would by default, so that only the first of them compiles.
"""

import json
import os
import platform
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from behrt_jax.config.data import DataConfig, MakeLabelsConfig, PrepareConfig
from behrt_jax.errors import InputError
from behrt_jax.records.load import load_events
from behrt_jax.tracking.console import table_text
from experiments.benchmarks.harness import run_script


@dataclass(frozen=True)
class PopulationBenchmark:
    """Time a population of adapters beside the same adapters trained one by one."""

    members: int = 8
    """Members of the population, and single runs."""
    steps: int = 100
    """Steps of each."""
    config: str = "lora"
    """Named configuration of finetune.py (lora or probe)."""
    base: str = "small"
    """Named configuration of pretrain.py; a base of one step will do, since only time is asked for."""
    subjects: int = 3000
    """Generated subjects."""
    output: Path | None = None
    """File for the figures as JSON."""


def benchmark_population(config: PopulationBenchmark) -> dict[str, Any]:
    """Run the population, then each single run, print the ratio, and return the figures.

    Returns:
        ``settings``, ``machine``, ``population_seconds``, ``single_seconds`` (of each run, the first one
        compiles), ``ratio`` (of the population to all single runs) and ``ratio_without_compiling`` (as if
        no single run had to: to the median of the others times the members; the population's compiling
        counts).

    Raises:
        InputError: wrong options, or a run that failed.
    """
    if config.members < 2 or config.steps < 1:
        raise InputError("give --members 2 or more, and --steps 1 or more.")
    with tempfile.TemporaryDirectory(prefix="benchmark-population-") as scratch:
        folder = Path(scratch)
        given = make_task(folder, config.subjects, config.base)
        population = _finetune(
            config, folder, given, "population", ["--population.size", str(config.members)]
        )
        single = [
            _finetune(config, folder, given, f"single-{k}", ["--train.seed", str(k)])
            for k in range(config.members)
        ]
    warm = sorted(single[1:])[len(single[1:]) // 2]
    report = {
        "settings": {name: value for name, value in asdict(config).items() if name != "output"},
        "machine": {
            "cores": os.cpu_count(),
            "machine": platform.machine(),
            "python": platform.python_version(),
            "load_average": os.getloadavg()[0],
        },
        "population_seconds": population,
        "single_seconds": single,
        "ratio": population / sum(single),
        "ratio_without_compiling": population / (warm * config.members),
    }
    rows = [
        ("population", f"{population:.1f}", f"{report['ratio']:.2f}"),
        (f"{config.members} single runs", f"{sum(single):.1f}", "1.00"),
        ("the first of them, which compiles", f"{single[0]:.1f}", ""),
        ("median of the others", f"{warm:.1f}", ""),
    ]
    print(table_text(f"{config.steps} steps, whole processes", ["", "seconds", "ratio"], rows))
    if config.output is not None:
        config.output.parent.mkdir(parents=True, exist_ok=True)
        config.output.write_text(json.dumps(report, indent=2) + "\n")
    return report


def make_task(folder: Path, subjects: int, base: str) -> list[str]:
    """Prepared data, labels and a base, of a step, in a folder; the options of finetune that name them.

    Args:
        folder: gets ``data``, ``labels.parquet`` and ``base``.
        subjects: generated.
        base: named configuration of pretraining.
    """
    from behrt_jax.workflows.make_labels import make_labels
    from behrt_jax.workflows.prepare import prepare_records

    data = DataConfig(subjects=subjects)
    pq.write_table(load_events(data).events, folder / "events.parquet")
    prepare_records(PrepareConfig(source="table", input=folder / "events.parquet", output=folder / "data"))
    labels = folder / "labels.parquet"
    make_labels(MakeLabelsConfig(task="next_visit", data=folder / "data", output=folder / "all.parquet"))
    _binary(folder / "all.parquet", labels)
    options = ["--config", base, "--data", str(folder / "data"), "--train.max_steps", "1"]
    run_script("pretrain.py", [*options, "--output", str(folder / "base"), "--compilation_cache", "off"])
    return ["--data", str(folder / "data"), "--labels", str(labels), "--init", str(folder / "base")]


def _binary(codes: Path, output: Path) -> None:
    """Labels of a binary task from those of the next visit: whether it has more than two codes."""
    table = pq.read_table(codes)
    more = [len(codes) > 2 for codes in table["categorical_values"].to_pylist()]
    columns = {name: table[name] for name in ("subject_id", "prediction_time")}
    pq.write_table(pa.table({**columns, "boolean_value": more}), output)


def _finetune(
    config: PopulationBenchmark, folder: Path, given: list[str], name: str, options: list[str]
) -> float:
    """Seconds of a whole process."""
    cache = folder / f"compiled-{name.split('-')[0]}"
    # One validation, at the end.
    steps = ["--train.max_steps", str(config.steps), "--train.validate_every", str(config.steps)]
    steps += ["--train.batch_size", "128", "--task.pooling", "mean", "--search.size", "0"]
    places = ["--output", str(folder / name), "--compilation_cache", str(cache)]
    started = time.perf_counter()
    run_script("finetune.py", ["--config", config.config, *given, *steps, *options, *places])
    return time.perf_counter() - started
