"""Events of a source, cut by ranges of subjects and written to spill files while they are read.

A bucket is a fine range of subject ids; its selected events are appended to a file of its own.
"""

import contextlib
import json
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from behrt_jax.data.events import EventCounts
from behrt_jax.data.routing import Buckets, CodeNumbers, SubjectSet, select_rows
from behrt_jax.data.sources.source import Source

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
    learned: dict[str, Any] = field(default_factory=dict)
    """See `sources.source.Source.learned`."""

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
            for table in read_ahead(source.read(unit, counts), pool):
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
    spill = Spill(folder, counts, codes.names, codes.prefixes(), events.tolist(), source.learned())
    stored = {name: value for name, value in vars(spill).items() if name != "folder"}
    (folder / "spill.json").write_text(json.dumps(stored | {"counts": vars(counts)}))
    return spill


def read_ahead(tables: Iterator[pa.Table], pool: ThreadPoolExecutor) -> Iterator[pa.Table]:
    """Read the next table while the one before it is worked on."""
    coming = pool.submit(next, tables, None)
    while (table := coming.result()) is not None:
        coming = pool.submit(next, tables, None)
        yield table


def _write(file: Path, table: pa.Table) -> None:
    with pa.OSFile(str(file), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
