"""How fast data preparation is, and how much memory it takes, beside plain tools on the same table.

The events are made up (`benchmark_events`). Each stage runs in a fresh process (`benchmark_stages`), which
measures itself: wall time without imports, and the largest resident size, imports included.
"""

import importlib.util
import json
import os
import platform
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

import behrt_jax
from behrt_jax.data.events import BIRTH_CODE, DAY, EVENT_SCHEMA, EventCounts
from behrt_jax.data.parquet import CHUNK_ROWS
from behrt_jax.errors import InputError

# Made-up events for benchmarks, as MEDS shards.

Order = Literal["sorted", "shuffled"]
_KINDS = ("DIAGNOSIS", "MEDICATION", "PROCEDURE")
_EVENTS_A_VISIT = 4
_ROW_GROUP = 1 << 18


def write_events(folder: Path, events: int, subjects: int, codes: int, order: Order) -> None:
    """Write the made-up events as MEDS shards of about ``CHUNK_ROWS`` rows; ``folder`` appears when whole.

    A subject's first event is the birth; the others come in visits of four, a month apart at most, up to
    the age of 80. The same rows, whatever the order; if sorted, a subject is in one shard. Memory is
    bounded by a shard and three numbers for each subject.
    """
    offsets = _offsets(events, subjects)
    unfinished = folder.with_name(f".{folder.name}.unfinished-{os.getpid()}")
    (unfinished / "data").mkdir(parents=True)
    names = pa.array([BIRTH_CODE, *(f"{_KINDS[code % 3]}//{code:06d}" for code in range(codes))])
    places = _sorted_places(offsets) if order == "sorted" else _shuffled_places(events)
    try:
        for shard, place in enumerate(places):
            table = _events_at(place, offsets, codes, names)
            # Without Arrow's own schema the codes are plain strings, as other writers leave them.
            pq.write_table(
                table, unfinished / f"data/{shard:04d}.parquet", row_group_size=_ROW_GROUP, store_schema=False
            )
        unfinished.replace(folder)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def _offsets(events: int, subjects: int) -> np.ndarray:
    """Subject i has the events from ``offsets[i]`` to ``offsets[i + 1]``: int64 ``[subjects + 1]``."""
    weights = np.random.default_rng(0).lognormal(sigma=0.9, size=subjects)
    # Two events for each; the others by weight.
    return np.round(
        np.concatenate([[0], np.cumsum(weights) / weights.sum()]) * (events - 2 * subjects)
    ).astype(np.int64) + 2 * np.arange(subjects + 1)


def _sorted_places(offsets: np.ndarray) -> Iterator[np.ndarray]:
    """Runs of places that hold whole subjects, about ``CHUNK_ROWS`` each."""
    cuts = offsets[np.searchsorted(offsets, np.arange(0, offsets[-1], CHUNK_ROWS))]
    cuts = np.unique(np.append(cuts, offsets[-1]))
    for start, end in pairwise(cuts):
        yield np.arange(start, end)


def _shuffled_places(events: int) -> Iterator[np.ndarray]:
    """Every place once, in an order that looks random: int64 arrays of up to ``CHUNK_ROWS``.

    Odd multiples and xor-shifts permute the numbers of a fixed width, and dropping those that are too
    large leaves a permutation of the rest.
    """
    bits = max(events - 1, 1).bit_length()
    mask, half = np.uint64((1 << bits) - 1), np.uint64(bits // 2 + 1)
    for start in range(0, 1 << bits, CHUNK_ROWS):
        place = np.arange(start, min(start + CHUNK_ROWS, 1 << bits), dtype=np.uint64)
        for odd in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB):
            place = (place * np.uint64(odd)) & mask
            place ^= place >> half
        place = place[place < events].astype(np.int64)
        if len(place):
            yield place


def _events_at(place: np.ndarray, offsets: np.ndarray, codes: int, names: pa.Array) -> pa.Table:
    """The events at some places, int64 ``[N]``, of the sorted table."""
    subject = np.searchsorted(offsets, place, side="right") - 1  # [N]
    ordinal = place - offsets[subject]  # [N], 0 is the birth
    visits = (offsets[subject + 1] - offsets[subject]) // _EVENTS_A_VISIT + 1
    days = np.minimum(30, 60 * 365 // visits)  # between visits
    birth = -20_000 + (subject * 7919) % 14_000  # days since 1970
    random = _random(place)  # [N]
    moment = (ordinal % _EVENTS_A_VISIT + random) * 3_600_000_000  # later events of a visit in later hours
    time = (birth + 20 * 365 + ordinal // _EVENTS_A_VISIT * np.maximum(days, 1)) * DAY + moment.astype(
        np.int64
    )
    # Zipf's law: code k of n has the range from log(k) to log(k + 1) of log(n + 1).
    code = np.minimum((codes + 1.0) ** _random(place + (1 << 40)), codes).astype(np.int32)  # 1 .. codes
    born = ordinal == 0
    columns = {
        "subject_id": subject,
        "time": pa.array(np.where(born, birth * DAY, time), pa.timestamp("us")),
        "code": pa.DictionaryArray.from_arrays(np.where(born, 0, code).astype(np.int32), names),
    }
    return pa.table(columns, schema=pa.schema([EVENT_SCHEMA.field(name) for name in columns]))


def _random(keys: np.ndarray) -> np.ndarray:
    """Numbers in [0, 1), float64 ``[N]``, one for each key, int64 ``[N]``."""
    words = keys.astype(np.uint64) + np.uint64(0x9E3779B97F4A7C15)
    words = (words ^ (words >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    words = (words ^ (words >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return ((words ^ (words >> np.uint64(31))) >> np.uint64(11)).astype(np.float64) * 2.0**-53


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
        [sys.executable, "-m", "experiments.benchmarks.prepare", json.dumps(task)],
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


# One stage of the preparation's benchmark, run and measured in the process it is called in.


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
    from behrt_jax.records.sources.meds import open_meds

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
    from behrt_jax.config.data import PrepareConfig
    from behrt_jax.records.prepare.pipeline import prepare
    from behrt_jax.records.sources.meds import open_meds

    config = PrepareConfig(input=folder, output=scratch / "prepared", workers=task["workers"])
    parts: dict[str, float] = {}
    start = last = time.perf_counter()

    def progress(stage: str, done: int, total: int) -> None:
        nonlocal last
        now = time.perf_counter()
        parts[stage] = parts.get(stage, 0.0) + now - last
        last = now

    manifest = prepare(open_meds(folder), config, progress)
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
