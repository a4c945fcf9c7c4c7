"""Events of a source, cut by ranges of subjects, written to spill files while they are read, and read back.

A bucket is a fine range of subject ids; its selected events are appended to a file of its own. One process,
several, or independent jobs (shards) write such files; partitions of neighbouring buckets are loaded again.
"""

import contextlib
import json
import multiprocessing
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from behrt_jax.config.data import PrepareConfig
from behrt_jax.data.event_rules import code_prefix
from behrt_jax.data.events import BIRTH_CODE, DEATH_CODE, EventColumns, EventCounts
from behrt_jax.data.sorting import ascending, distinct
from behrt_jax.errors import InputError
from behrt_jax.files import (
    JsonObject,
    check_files,
    digests_of,
    is_sealed,
    read_json,
    sealed,
    work_folder,
    write_json,
)
from behrt_jax.records.prepare.manifest import describe_counts, input_files
from behrt_jax.records.sources.source import Source

Told = Callable[[int, int], None]
"""Called with how much is done, and how much there is."""

# What happens to each chunk of events as it is read: codes numbered and selected, subjects noted, rows cut.

_MANY_SUBJECTS = 1 << 22
_MARKS = 1 << 25  # bytes of a table with a mark for each subject
_CELLS = 1 << 16  # of a table that gives the bucket of most ids


class CodeNumbers:
    """Numbers of codes, given in the order in which they are met."""

    def __init__(self, select: Callable[[Sequence[str]], np.ndarray]):
        self._select = select
        self._place: dict[str, int] = {}
        self._known = pa.array([], pa.string())
        self._ascending: tuple[str, ...] = ()
        self._place_ascending = np.empty(0, np.int32)
        self.selected = np.empty(0, bool)
        self.events = np.empty(0, np.int64)

    @property
    def names(self) -> list[str]:
        """In the order of their numbers."""
        return list(self._place)

    def numbers(self, dictionary: pa.Array) -> np.ndarray:
        """The number of each of some codes, int32 ``[codes]``; new ones get the next."""
        places = _places(dictionary, self._known)
        if places.null_count:
            new = dictionary.filter(places.is_null()).unique().to_pylist()
            chosen = self._select(new)
            markers = [name in (BIRTH_CODE, DEATH_CODE) for name in new]
            self.selected = np.concatenate([self.selected, chosen | markers])
            self.events = np.concatenate([self.events, np.zeros(len(new), np.int64)])
            self._place |= {name: index for index, name in enumerate(new, start=len(self._place))}
            self._known = pa.array(list(self._place), pa.string())
            places = _places(dictionary, self._known)
        return places.to_numpy()

    def ascending(self) -> tuple[tuple[str, ...], np.ndarray]:
        """The names met so far, ascending, and the place among them of each number, int32 ``[names]``."""
        new = list(self._place)[len(self._ascending) :]
        if new:
            self._ascending = tuple(sorted([*self._ascending, *new]))
            self._place_ascending = np.argsort([self._place[name] for name in self._ascending]).astype(
                np.int32
            )
        return self._ascending, self._place_ascending

    def prefixes(self) -> dict[str, int]:
        """Start of a code, of `event_rules.code_prefix` -> events read, markers aside."""
        found = Counter()
        for name, events in zip(self._place, self.events.tolist(), strict=True):
            if name not in (BIRTH_CODE, DEATH_CODE):
                found[code_prefix(name)] += events
        return dict(found)


def _places(names: pa.Array, known: pa.Array) -> pa.Array:
    """Place of each name in ``known``, int32; null where it is not there."""
    return pc.call_function("index_in", [names], pc.SetLookupOptions(known))


class SubjectSet:
    """The distinct subjects of many chunks: marks in a table while the ids lie close together."""

    def __init__(self):
        self._least = 0
        self._marks = np.zeros(0, bool)
        self._parts: list[np.ndarray] = []
        self._held = 0

    def add(self, ids: np.ndarray) -> None:
        """Note int64 ids ``[n]``, n at least 1."""
        if ascending(ids):
            ids = distinct(ids)
        least, most = int(ids.min()), int(ids.max())
        if len(self._marks):
            least, most = min(least, self._least), max(most, self._least + len(self._marks) - 1)
        if most - least < _MARKS:
            self._cover(least, most)
            self._marks[ids - self._least] = True
            return
        self._parts.append(pa.array(ids).unique().to_numpy())
        self._held += len(self._parts[-1])
        if self._held > _MANY_SUBJECTS:
            self._parts = [self.all()]
            self._held = len(self._parts[0]) // 2  # grows, so that merging stays rare

    def _cover(self, least: int, most: int) -> None:
        """Let the table reach from ``least`` to ``most``, and further, so that it rarely grows."""
        known = self._marks
        if len(known) and self._least <= least and most < self._least + len(known):
            return
        size = min(_MARKS, 2 * (most - least + 1))
        start = least if not len(known) or least == self._least else most - size + 1
        start = max(start, np.iinfo(np.int64).min)
        self._marks = np.zeros(max(size, most - start + 1), bool)
        if len(known):
            self._marks[self._least - start :][: len(known)] = known
        self._least = start

    def all(self) -> np.ndarray:
        """int64, ascending."""
        marked = np.flatnonzero(self._marks) + self._least
        return distinct(np.concatenate([marked, *self._parts])) if self._parts else marked


def select_rows(table: pa.Table, codes: CodeNumbers, values: bool, counts: EventCounts) -> pa.RecordBatch:
    """The rows with a selected code, with that code's number."""
    code = table["code"].combine_chunks()
    lookup = codes.numbers(code.dictionary)
    indices = code.indices.to_numpy()
    np.add.at(codes.events, lookup, np.bincount(indices, minlength=len(lookup)))
    columns = {
        "subject_id": table["subject_id"],
        "time": table["time"].cast(pa.int64()),
        "code": lookup[indices],
    }
    if "visit_id" in table.column_names and table["visit_id"].null_count < table.num_rows:
        columns["visit_id"] = table["visit_id"]
    if values:
        columns["numeric_value"] = table["numeric_value"]
    rows = pa.table(columns)
    wanted = codes.selected[lookup]
    if not wanted.all():
        rows = rows.filter(pa.array(wanted[indices]))
        counts.drop("code not selected", table.num_rows - rows.num_rows)
    batches = rows.combine_chunks().to_batches()
    return batches[0] if batches else pa.RecordBatch.from_pylist([], rows.schema)


class Buckets:
    """Cuts rows by bucket of their subject."""

    def __init__(self, boundaries: np.ndarray):
        self._boundaries = boundaries
        self._kind = np.uint8 if len(boundaries) < 256 else np.uint16  # narrow ones are sorted by radix
        self._shift = 0
        self._of_cell = self._cut = None
        if len(boundaries) and (span := int(boundaries[-1]) - int(boundaries[0])) < 1 << 62:
            # Cells are runs of ids, of equal length: only those that a boundary cuts must be searched.
            self._shift = max(0, (span // _CELLS).bit_length())
            starts = int(boundaries[0]) + (np.arange((span >> self._shift) + 1) << self._shift)
            lowest, highest = (
                np.searchsorted(boundaries, ids, side="right")
                for ids in (starts, starts + (1 << self._shift) - 1)
            )
            self._of_cell = lowest.astype(self._kind)
            self._cut = lowest != highest

    def cut(self, batch: pa.RecordBatch) -> list[tuple[int, pa.RecordBatch]]:
        """Bucket and rows; buckets without rows are left out."""
        boundaries = self._boundaries
        subject = batch["subject_id"].to_numpy()
        if ascending(subject):
            cuts = np.searchsorted(subject, boundaries)
        else:
            bucket = self._of(subject)
            cuts = np.cumsum(np.bincount(bucket, minlength=len(boundaries) + 1))[:-1]
            if len(boundaries):
                order = np.argsort(bucket, kind="stable")
                batch = batch.take(pa.array(order))
        edges = [0, *cuts.tolist(), batch.num_rows]
        return [
            (bucket, batch.slice(edges[bucket], edges[bucket + 1] - edges[bucket]))
            for bucket in range(len(edges) - 1)
            if edges[bucket + 1] > edges[bucket]
        ]

    def _of(self, subject: np.ndarray) -> np.ndarray:
        """Bucket of each subject ``[rows]``."""
        boundaries = self._boundaries
        if self._of_cell is None or self._cut is None:
            return np.searchsorted(boundaries, subject, side="right").astype(self._kind)
        cell = np.clip(subject, boundaries[0], boundaries[-1])
        cell -= boundaries[0]
        cell >>= self._shift
        bucket = self._of_cell[cell]
        doubtful = np.flatnonzero(self._cut[cell])
        bucket[doubtful] = np.searchsorted(boundaries, subject[doubtful], side="right")
        below = subject < boundaries[0]
        bucket[below] = 0
        return bucket


BUCKETS = 256
"""Most buckets: each costs an open file."""
_BUCKET_BYTES = 2 << 20  # of input: about 200,000 events of Parquet
_COMPRESSED = 8  # what a byte of gzip weighs


@dataclass(frozen=True)
class Reading:
    """Choices that decide how events are read; the same for all shards."""

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
    """Names of the codes that were read; the files hold numbers of the selected ones."""
    prefixes: dict[str, int]
    """Start of a code, of `event_rules.code_prefix` -> events read, markers aside."""
    bucket_events: list[int]
    """Events of each bucket."""
    learned: JsonObject = field(default_factory=dict)
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
    """Cuts of the subjects into buckets, by the size of the input and the source's sample of ids.

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
    """Read units of a source, drop codes that are not selected, and write the rest into a new folder.

    Memory: two chunks of the source (one is read while the other is written), a copy of the selected
    rows of one, and the list of subjects. ``progress`` is called with the number of units done.
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
    add_counts(counts, unselected)
    if reading.subjects:
        listed = pa.table({"subject_id": seen.all()})
        file = str(folder / "subjects.arrow")
        with pa.OSFile(file, "wb") as sink, pa.ipc.new_stream(sink, listed.schema) as writer:
            writer.write_table(listed)
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


def add_counts(counts: EventCounts, more: EventCounts) -> None:
    """Add one account of events to another."""
    counts.read += more.read
    for count, rules in ((counts.drop, more.dropped), (counts.change, more.changed)):
        for rule, events in rules.items():
            count(rule, events)


# Reading on several processes of one machine, and by independent jobs that are merged afterwards.


def spill_in_parallel(
    source: Source, units: Sequence[int], reading: Reading, folder: Path, workers: int, told: Told
) -> list[Spill]:
    """Read units with as many processes as ``workers``; each of them takes every n-th unit.

    With several a copy of the source goes to each; one reads in this process. Each makes a folder of its
    own in the new ``folder``. ``told`` gets the units done.
    """
    workers = max(1, min(workers, len(units)))
    folder.mkdir()
    if workers == 1:
        return [spill_units(source, units, reading, folder / "0", lambda done: told(done, len(units)))]
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool:
        jobs = {
            pool.submit(spill_units, source, units[worker::workers], reading, folder / str(worker)): worker
            for worker in range(workers)
        }
        done = 0
        for job in as_completed(jobs):
            job.result()
            done += len(units[jobs[job] :: workers])
            told(done, len(units))
    return [job.result() for job in jobs]


def parse_shard(shard: str) -> tuple[int, int]:
    """Index and number of shards of ``i/n``.

    Raises:
        InputError: it is not of that form, or out of range.
    """
    found = re.fullmatch(r"(\d+)/(\d+)", shard)
    if not found or not int(found[1]) < int(found[2]):
        raise InputError(f"shard is {shard!r}: give i/n, with i from 0 to n - 1.")
    return int(found[1]), int(found[2])


def shards_folder(output: Path) -> Path:
    """The folder in which jobs with ``shard`` leave what they have read."""
    return output.with_name(f"{output.name}.shards")


def read_shard(
    source: Source, config: PrepareConfig, reading: Reading, options: JsonObject, told: Told
) -> JsonObject:
    """Do the shard of ``config.shard``: units i, i + n, i + 2n ... of the source.

    Returns:
        Its counts, ready for JSON.

    Raises:
        InputError: the shard is there already; no output is given.
    """
    if config.shard is None or config.output is None:
        raise InputError("shard needs an output: give the folder that merge is to write.")
    index, shards = parse_shard(config.shard)
    folder = shards_folder(config.output)
    place = folder / f"{index}-of-{shards}"
    if place.exists():
        raise InputError(f"{place} is there already: remove it to read this shard again.")
    folder.mkdir(parents=True, exist_ok=True)
    with work_folder(folder, f"reading-{place.name}") as temporary:
        work = temporary / "shard"
        units = range(source.units())[index::shards]
        spills = spill_in_parallel(source, units, reading, work, config.workers, told)
        record = _identity(source, config, reading, options) | {"digests": digests_of(work)}
        write_json(work / "reading.json", sealed(record))
        work.replace(place)
    counts = [describe_counts(spill.counts) for spill in spills]
    return {"shard": config.shard, "units": len(units), "events": counts}


def load_shards(source: Source, config: PrepareConfig, reading: Reading, options: JsonObject) -> list[Spill]:
    """Spill files that the jobs with ``shard`` have left beside the output.

    Raises:
        InputError: a shard is missing or damaged, or was read with other options or of another input.
    """
    if config.output is None:
        raise InputError("merge needs an output: give the one that the shards were read for.")
    folder = shards_folder(config.output)
    found = [re.fullmatch(r"(\d+)-of-(\d+)", place.name) for place in folder.glob("*-of-*")]
    pairs = {(int(match[1]), int(match[2])) for match in found if match}
    if not pairs:
        raise InputError(f"{folder} holds no shards: run prepare with shard 0/n, 1/n ... first.")
    numbers = sorted({shards for _, shards in pairs})
    if len(numbers) > 1:
        cuts = " and ".join(map(str, numbers))
        raise InputError(f"{folder} holds shards of different cuts ({cuts}): remove those of all but one.")
    shards = numbers[0]
    missing = [str(index) for index in range(shards) if (index, shards) not in pairs]
    if missing:
        raise InputError(
            f"{folder} has no shard {', '.join(missing)} of {shards}: run prepare with shard "
            f"{missing[0]}/{shards}, then merge again."
        )
    identity = json.loads(json.dumps(_identity(source, config, reading, options)))
    spills = []
    for index in range(shards):
        place = folder / f"{index}-of-{shards}"
        record, mend = read_json(place / "reading.json"), f"remove {place} and read this shard again."
        if not (isinstance(record, dict) and is_sealed(record)):
            raise InputError(f"{place / 'reading.json'} is damaged: {mend}")
        if {name: record.get(name) for name in identity} != identity:
            raise InputError(
                f"{place} was read with other options or of another input: remove it and read it again."
            )
        check_files(place, record["digests"], mend, at_most=None)
        spills += [Spill.load(part) for part in sorted(place.iterdir()) if part.is_dir()]
    return spills


def _identity(source: Source, config: PrepareConfig, reading: Reading, options: JsonObject) -> JsonObject:
    """All that must be the same for all shards."""
    boundaries = reading.boundaries.tolist()
    return {"options": options, "input": input_files(source, config.input), "boundaries": boundaries}


# Spill files read back in partitions: runs of neighbouring buckets, chosen when their sizes are known.

PARTITION_EVENTS = 262_144
"""Selected events of a partition, unless a single bucket has more; so few that its columns stay in the
processor's cache, which is faster than fewer, larger partitions."""


class Partitions:
    """The events of all shards' spill files: neighbouring buckets joined, loaded one partition at a time.

    Loading is safe in several threads.
    """

    def __init__(self, spills: Sequence[Spill], most: int = PARTITION_EVENTS):
        """Join buckets into partitions of at most ``most`` events, or of one bucket."""
        self._spills = spills
        self.names = tuple(sorted({name for spill in spills for name in spill.codes}))
        """All codes, ascending."""
        place = {name: index for index, name in enumerate(self.names)}
        # Place in the names of each code of each shard, int32 [codes].
        self._lookups = [np.array([place[name] for name in spill.codes], np.int32) for spill in spills]
        sizes = np.sum([spill.bucket_events for spill in spills], axis=0).tolist()
        self.buckets: list[range] = []
        """Those of each partition."""
        start, held = 0, 0
        for bucket, size in enumerate(sizes):
            if held and held + size > most:
                self.buckets.append(range(start, bucket))
                start, held = bucket, 0
            held += size
        self.buckets.append(range(start, len(sizes)))

    def load(self, buckets: range) -> tuple[EventColumns, np.ndarray | None]:
        """The events of some buckets, and their numeric values; see `columns_of`."""
        parts: list[tuple[pa.Table, np.ndarray]] = []
        for spill, lookup in zip(self._spills, self._lookups, strict=True):
            for bucket in buckets:
                for file in (f"{bucket:04}.arrow", f"{bucket:04}-visits.arrow"):
                    if (spill.folder / file).exists():
                        with pa.memory_map(str(spill.folder / file)) as mapped:
                            parts.append((pa.ipc.open_stream(mapped).read_all(), lookup))
        return columns_of(parts, self.names)


def columns_of(
    parts: Sequence[tuple[pa.Table, np.ndarray]], names: Sequence[str]
) -> tuple[EventColumns, np.ndarray | None]:
    """Events as columns.

    Args:
        parts: tables as `select_rows` gives them, with the place in ``names`` of each of their
            numbers of codes, int32.
        names: codes, ascending.

    Returns:
        The events of all parts, and their numeric values (float32, NaN where null), where there are any.
    """
    tables = [table for table, _ in parts]
    timed = visits = named = values = None
    if any(table["time"].null_count for table in tables):
        timed = _joined([_valid(table, "time") for table in tables], bool)
    if any("visit_id" in table.column_names for table in tables):
        named = _joined([_valid(table, "visit_id") for table in tables], bool)
        visits = _joined([_filled(table, "visit_id") for table in tables], np.int64)
    if tables and "numeric_value" in tables[0].column_names:
        values = _joined([table["numeric_value"].to_numpy() for table in tables], np.float32)
    codes = [lookup[chunk.to_numpy()] for table, lookup in parts for chunk in table["code"].chunks]
    events = EventColumns(
        subject_ids=_joined([table["subject_id"].to_numpy() for table in tables], np.int64),
        codes=_joined(codes, np.int32),
        times=_joined([_filled(table, "time") for table in tables], np.int64),
        names=names,
        timed=timed,
        visits=visits,
        named=named,
    )
    return events, values


def _joined(arrays: Sequence[np.ndarray], dtype: type) -> np.ndarray:
    """End to end; a single one as it is."""
    return arrays[0] if len(arrays) == 1 else np.concatenate([np.empty(0, dtype), *arrays])


def _valid(table: pa.Table, name: str) -> np.ndarray:
    if name not in table.column_names:
        return np.zeros(table.num_rows, bool)
    return table[name].is_valid().to_numpy()


def _filled(table: pa.Table, name: str) -> np.ndarray:
    """int64 ``[rows]``, 0 where null."""
    if name not in table.column_names:
        return np.zeros(table.num_rows, np.int64)
    return (table[name].fill_null(0) if table[name].null_count else table[name]).to_numpy()
