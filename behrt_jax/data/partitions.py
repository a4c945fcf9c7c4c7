"""Events of a source, cut into ranges of subjects that fit in memory: written to spill files and read back.

A bucket is a fine range of subject ids; its selected events are appended to a file of its own while the
source is read. A partition is a run of neighbouring buckets, chosen when their sizes are known.
"""

import contextlib
import json
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa

from behrt_jax.data.events import EventCounts
from behrt_jax.data.filtering import EventColumns
from behrt_jax.data.routing import Buckets, CodeNumbers, SubjectSet, select_rows
from behrt_jax.data.sources.source import Source

PARTITION_EVENTS = 262_144
"""Selected events of a partition, unless a single bucket has more; so few that its columns stay in the
processor's cache, which is faster than fewer, larger partitions."""
BUCKETS = 256
"""Most buckets: each costs an open file."""
_BUCKET_BYTES = 2 << 20  # of input: about 200,000 events of Parquet
_COMPRESSED = 8  # what a byte of gzip weighs


@dataclass(frozen=True)
class Reading:
    """What decides how events are read; the same for all shards."""

    boundaries: np.ndarray
    """int64 ``[buckets - 1]``, ascending: bucket i has the subjects below ``boundaries[i]``."""
    select: Callable[[Sequence[str]], np.ndarray]
    """Code names -> bool: which are selected (markers of birth and death always are)."""
    values: bool
    """Numeric values are kept."""
    subjects: bool
    """All subjects seen are listed, those without a selected event too."""


@dataclass(frozen=True)
class Spill:
    """The selected events of one shard, on disk."""

    folder: Path
    counts: EventCounts
    """Of the source, and ``code not selected``."""
    codes: list[str]
    """Names of the codes that the files hold as numbers."""
    prefixes: dict[str, int]
    """Start of a code, up to the first ``//`` -> events read, markers aside."""
    bucket_events: list[int]
    """Events of each bucket."""

    @classmethod
    def load(cls, folder: Path) -> "Spill":
        """Read what :func:`spill_units` left in a folder."""
        stored = json.loads((folder / "spill.json").read_text())
        return cls(folder=folder, counts=EventCounts(**stored.pop("counts")), **stored)

    def subjects(self) -> np.ndarray:
        """int64 ids of all subjects seen, ascending, where they were listed; else none."""
        file = self.folder / "subjects.arrow"
        if not file.exists():
            return np.empty(0, np.int64)
        with pa.memory_map(str(file)) as mapped:
            return pa.ipc.open_stream(mapped).read_all()["subject_id"].to_numpy()


def choose_boundaries(source: Source) -> np.ndarray:
    """Where to cut the subjects into buckets, by the size of the input and the source's sample of ids.

    Returns:
        int64 ``[buckets - 1]``, ascending.
    """
    sizes = (file.stat().st_size * (_COMPRESSED if file.suffix == ".gz" else 1) for file in source.files())
    buckets = min(BUCKETS, sum(sizes) // _BUCKET_BYTES)
    sample = np.sort(source.sample_subjects()) if buckets > 1 else np.empty(0, np.int64)
    if not len(sample):
        return np.empty(0, np.int64)
    return np.unique(sample[np.arange(1, buckets) * len(sample) // buckets])


def spill_units(
    source: Source,
    units: Sequence[int],
    reading: Reading,
    folder: Path,
    progress: Callable[[int], None] = lambda done: None,
) -> Spill:
    """Read units of a source, drop codes that are not selected, and write the rest into spill files.

    Memory: two chunks of the source (one is read while the other is written), a copy of the selected
    rows of one, and the list of subjects.

    Args:
        source: what to read.
        units: which of its units.
        reading: how.
        folder: new folder to write into.
        progress: called with the number of units done.
    """
    folder.mkdir(parents=True)
    counts, unselected = EventCounts(), EventCounts()  # one for each thread
    codes = CodeNumbers(reading.select)
    seen = SubjectSet()
    buckets = Buckets(reading.boundaries)
    events = np.zeros(len(reading.boundaries) + 1, np.int64)
    with contextlib.ExitStack() as stack:
        pool = stack.enter_context(ThreadPoolExecutor(1))
        writers: dict[tuple[int, bool], pa.RecordBatchStreamWriter] = {}
        for done, unit in enumerate(units, start=1):
            for table in _ahead(source.read(unit, counts), pool):
                if not table.num_rows:
                    continue
                if reading.subjects:
                    seen.add(table["subject_id"].to_numpy())
                batch = select_rows(table, codes, reading.values, unselected)
                visits = "visit_id" in batch.schema.names
                for bucket, part in buckets.cut(batch):
                    key = (bucket, visits)
                    if key not in writers:
                        file = folder / f"{bucket:04}{'-visits' if visits else ''}.arrow"
                        sink = stack.enter_context(pa.OSFile(str(file), "wb"))
                        writers[key] = stack.enter_context(pa.ipc.new_stream(sink, part.schema))
                    writers[key].write_batch(part)
                    events[bucket] += part.num_rows
            progress(done)
    for rule, dropped in unselected.dropped.items():
        counts.drop(rule, dropped)
    if reading.subjects:
        _write(folder / "subjects.arrow", pa.table({"subject_id": seen.all()}))
    spill = Spill(folder, counts, codes.names, codes.prefixes(), events.tolist())
    stored = {name: value for name, value in vars(spill).items() if name != "folder"}
    (folder / "spill.json").write_text(json.dumps(stored | {"counts": vars(counts)}))
    return spill


def choose_partitions(spills: Sequence[Spill], most: int = PARTITION_EVENTS) -> list[range]:
    """Join neighbouring buckets into partitions of at most ``most`` events, or of one bucket."""
    sizes = np.sum([spill.bucket_events for spill in spills], axis=0).tolist()
    partitions, start, held = [], 0, 0
    for bucket, size in enumerate(sizes):
        if held and held + size > most:
            partitions.append(range(start, bucket))
            start, held = bucket, 0
        held += size
    return [*partitions, range(start, len(sizes))]


def code_lookups(spills: Sequence[Spill], names: Sequence[str]) -> list[np.ndarray]:
    """Place in ``names`` of each code of each shard, int32 ``[codes]``."""
    place = {name: index for index, name in enumerate(names)}
    return [np.array([place[name] for name in spill.codes], np.int32) for spill in spills]


def load_partition(
    spills: Sequence[Spill],
    buckets: range,
    names: Sequence[str],
    lookups: Sequence[np.ndarray] | None = None,
) -> tuple[EventColumns, np.ndarray | None]:
    """Read the events of a partition back.

    Args:
        spills: all shards.
        buckets: those of the partition.
        names: all codes of all shards, ascending.
        lookups: what :func:`code_lookups` gives for these; to compute it once for all partitions.

    Returns:
        The events, and their numeric values (float32, NaN where null), where they were kept.
    """
    lookups = code_lookups(spills, names) if lookups is None else lookups
    parts: list[tuple[pa.Table, np.ndarray]] = []
    for spill, lookup in zip(spills, lookups, strict=True):
        for bucket in buckets:
            for file in (f"{bucket:04}.arrow", f"{bucket:04}-visits.arrow"):
                if (spill.folder / file).exists():
                    with pa.memory_map(str(spill.folder / file)) as mapped:
                        parts.append((pa.ipc.open_stream(mapped).read_all(), lookup))
    tables = [table for table, _ in parts]

    def column(name: str) -> np.ndarray:
        return np.concatenate([np.empty(0, np.int64), *(table[name].to_numpy() for table in tables)])

    def flag(name: str) -> np.ndarray:
        return np.concatenate([_valid(table, name) for table in tables])

    timed = visits = named = None
    if any(table["time"].null_count for table in tables):
        timed = flag("time")
    if any("visit_id" in table.column_names for table in tables):
        named = flag("visit_id")
        visits = np.concatenate([_filled(table, "visit_id") for table in tables])
    codes = [lookup[chunk.to_numpy()] for table, lookup in parts for chunk in table["code"].chunks]
    events = EventColumns(
        subject_ids=column("subject_id"),
        codes=np.concatenate([np.empty(0, np.int32), *codes]),
        times=np.concatenate([np.empty(0, np.int64), *(_filled(table, "time") for table in tables)]),
        names=names,
        timed=timed,
        visits=visits,
        named=named,
    )
    values = None
    if tables and "numeric_value" in tables[0].column_names:
        values = np.concatenate([table["numeric_value"].to_numpy() for table in tables])
    return events, values


def _ahead(tables: Iterator[pa.Table], pool: ThreadPoolExecutor) -> Iterator[pa.Table]:
    """Read the next table while the one before it is worked on."""
    coming = pool.submit(next, tables, None)
    while (table := coming.result()) is not None:
        coming = pool.submit(next, tables, None)
        yield table


def _valid(table: pa.Table, name: str) -> np.ndarray:
    if name not in table.column_names:
        return np.zeros(table.num_rows, bool)
    if not table[name].null_count:
        return np.ones(table.num_rows, bool)
    return table[name].is_valid().to_numpy()


def _filled(table: pa.Table, name: str) -> np.ndarray:
    """int64 ``[rows]``, 0 where null."""
    if name not in table.column_names:
        return np.zeros(table.num_rows, np.int64)
    return (table[name].fill_null(0) if table[name].null_count else table[name]).to_numpy()


def _write(file: Path, table: pa.Table) -> None:
    with pa.OSFile(str(file), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
