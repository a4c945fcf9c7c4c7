"""One stage of the preparation's benchmark, run and measured in the process it is called in.

``python -m`` of this module runs the stage that its one argument, JSON, tells, and prints the figures as
JSON in its last line.
"""

import json
import resource
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from behrt_jax.data.events import EventCounts
from behrt_jax.workflows.benchmark_events import write_events


def run_stage(task: Mapping[str, Any]) -> dict[str, Any]:
    """Run one stage and give its figures.

    Args:
        task: ``stage`` (one of `benchmark_prepare.STAGES`, or ``make`` to write the table), ``order``,
            ``folder`` of the table, ``events``, ``subjects``, ``codes`` and ``workers``.

    Returns:
        ``seconds``, ``events``, ``subjects`` (None where the stage does not count them), ``parts`` (part of
        the stage -> seconds) and ``peak_mib``.
    """
    folder = Path(task["folder"])
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        run = {
            "make": _make,
            "parquet": _read_parquet,
            "source": _read_source,
            "polars": _polars,
            "prepare": _prepare,
        }[task["stage"]]
        figures = run(task, folder, Path(scratch))
    return {"parts": {}, **figures, "peak_mib": _peak_mib(task["workers"])}


def _make(task: Mapping[str, Any], folder: Path, scratch: Path) -> dict[str, Any]:
    start = time.perf_counter()
    write_events(folder, task["events"], task["subjects"], task["codes"], task["order"])
    return _figures(start, task["events"], task["subjects"])


def _read_parquet(task: Mapping[str, Any], folder: Path, scratch: Path) -> dict[str, Any]:
    """Decode the three columns shard by shard, codes as dictionaries, and drop them."""
    start = time.perf_counter()
    events = 0
    for shard in sorted((folder / "data").glob("*.parquet")):
        with pq.ParquetFile(shard, read_dictionary=["code"]) as file:
            events += file.read(columns=["subject_id", "time", "code"]).num_rows
    return _figures(start, events)


def _read_source(task: Mapping[str, Any], folder: Path, scratch: Path) -> dict[str, Any]:
    from behrt_jax.data.sources.meds import open_meds

    start = time.perf_counter()
    source, counts = open_meds(folder), EventCounts()
    for unit in range(source.units()):
        for _ in source.read(unit, counts):
            pass
    return _figures(start, counts.kept)


def _polars(task: Mapping[str, Any], folder: Path, scratch: Path) -> dict[str, Any]:
    """Encode the codes, sort by subject and time, group by subject, and write the lists as Arrow."""
    import polars as pl

    start = time.perf_counter()
    (
        pl.scan_parquet(folder / "data" / "*.parquet")
        .select("subject_id", "time", pl.col("code").cast(pl.Categorical).to_physical())
        .sort("subject_id", "time")
        .group_by("subject_id", maintain_order=True)
        .agg("time", "code")
        .sink_ipc(scratch / "grouped.arrow")
    )
    figures = _figures(start, 0)
    written = pl.scan_ipc(scratch / "grouped.arrow").select(
        pl.col("code").list.len().sum(), subjects=pl.len()
    )
    events, subjects = written.collect().row(0)
    return {**figures, "events": events, "subjects": subjects}


def _prepare(task: Mapping[str, Any], folder: Path, scratch: Path) -> dict[str, Any]:
    """All of the preparation, from MEDS shards to the finished data set, with the time of its stages."""
    from behrt_jax.config import PrepareConfig
    from behrt_jax.data.preparation import prepare
    from behrt_jax.data.sources.meds import DEFAULT_CODES, open_meds

    config = PrepareConfig(input=folder, output=scratch / "prepared", workers=task["workers"])
    parts: dict[str, float] = {}
    start = last = time.perf_counter()

    def progress(stage: str, done: int, total: int) -> None:
        nonlocal last
        now = time.perf_counter()
        parts[stage] = parts.get(stage, 0.0) + now - last
        last = now

    manifest = prepare(open_meds(folder), config, progress, default_codes=DEFAULT_CODES)
    subjects = sum(split["subjects"] for split in manifest["splits"].values())
    figures = _figures(start, manifest["events"]["read"], subjects)
    parts["finish"] = time.perf_counter() - last
    return {**figures, "parts": parts}


def _figures(start: float, events: int, subjects: int | None = None) -> dict[str, Any]:
    return {"seconds": time.perf_counter() - start, "events": events, "subjects": subjects}


def _peak_mib(workers: int) -> float:
    """Largest resident size of this process; with workers, plus that of the largest for each of them.

    Linux counts the size before ``exec`` in ``ru_maxrss``, so that a large parent would show: there
    VmHWM is right.
    """
    unit = 1 if sys.platform == "darwin" else 1024
    own = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    status = Path("/proc/self/status")
    if status.is_file():
        own = next(int(line.split()[1]) * 1024 for line in status.open() if line.startswith("VmHWM"))
    of_workers = (
        resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * unit * (workers if workers > 1 else 0)
    )
    return (own + of_workers) / 2**20


if __name__ == "__main__":
    print(json.dumps(run_stage(json.loads(sys.argv[1]))))
