"""The prepared data set on disk: sequences by split as memory-mapped Arrow files, vocabulary, manifest.

A folder holds ``vocabulary.parquet``, ``manifest.json`` and, for each split, ``subjects.arrow`` (columns
subject_id and start, the place of the subject's first event) and ``events.arrow`` (columns code, age,
visit and time: one record batch, so that each column is one array on disk). Beside them lies what is known of
the subjects themselves: ``static.parquet``, ``deaths.parquet`` and ``births.parquet``. The manifest has size
and SHA-256 of each file, and of itself; what a reader opens is checked against them.
"""

import json
import mmap
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import BinaryIO

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from behrt_jax.data.event_rules import Preparation
from behrt_jax.data.events import SPLITS, EventCounts, SubjectTimes
from behrt_jax.data.facts import CodedFacts, FactCounts, FactTable, SubjectFacts, fact_rows
from behrt_jax.data.parquet import readable, sound
from behrt_jax.data.sequences import Sequences, SequenceSet, set_fingerprint, with_separators
from behrt_jax.data.vocabulary import Vocabulary
from behrt_jax.errors import InputError
from behrt_jax.files import (
    READ_THROUGH,
    SEAL,
    JsonObject,
    check_files,
    digest_of,
    is_sealed,
    json_text,
    read_json,
    say_unrecorded,
    sealed,
)
from behrt_jax.run_folder import CONFIG_FILE, PREPARATION_FILE, checked

FORMAT_VERSION = 1
MANIFEST = "manifest.json"
VOCABULARY = "vocabulary.parquet"
EVENTS = pa.schema([("code", pa.int32()), ("age", pa.float32()), ("visit", pa.int32()), ("time", pa.int64())])
SUBJECTS = pa.schema([("subject_id", pa.int64()), ("start", pa.int64())])
STATIC = pa.schema([("subject_id", pa.int64()), ("code", pa.string())])
DEATHS = pa.schema([("subject_id", pa.int64()), ("time", pa.timestamp("us"))])
BIRTHS = DEATHS
_MEND = "run prepare again, with another output."


def read_manifest(path: Path) -> JsonObject:
    """Read the manifest of a prepared data set.

    Raises:
        InputError: the folder is none, or is of another version; the manifest is damaged.
    """
    path = Path(path)
    file = path / MANIFEST
    if not file.is_file():
        what = f"has no {MANIFEST}" if path.is_dir() else "is not a folder"
        raise InputError(f"{path} is no prepared data set (it {what}): give the folder that prepare wrote.")
    try:
        manifest = json.loads(file.read_text(encoding="utf-8"))
        version = manifest["format_version"]
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"{file} is not the manifest of a prepared data set, or is damaged: run prepare again."
        ) from error
    if version != FORMAT_VERSION:
        raise InputError(
            f"{path} was prepared in format {version}, but this version reads {FORMAT_VERSION}: run prepare "
            "again, with another output."
        )
    if SEAL in manifest or "files" in manifest:
        if not (is_sealed(manifest) and "files" in manifest):
            raise InputError(f"{file} is damaged (it is not what prepare wrote): {_MEND}")
    else:
        say_unrecorded(path)
    return manifest


def read_rules(folder: Path, option: str) -> tuple[Vocabulary, Preparation]:
    """What events of other subjects need to become the tokens of prepared data, of a run or of an adapter.

    Args:
        folder: of any of them.
        option: that names it, for messages.

    Raises:
        InputError: it is none of them, or a run or adapter that does not keep its rules (an older version
            made it, or its data were made in memory).
    """
    folder = Path(folder)
    if (folder / MANIFEST).is_file():
        manifest = read_manifest(folder)
        preparation = Preparation.from_json(manifest, folder / MANIFEST)
        if VOCABULARY in (records := manifest.get("files", {})):
            check_files(folder, {VOCABULARY: records[VOCABULARY]}, _MEND)
    elif (preparation := read_preparation(folder)) is None:
        raise InputError(
            f"{option}: {folder} does not tell how its data were prepared (neither {MANIFEST} nor "
            f"{PREPARATION_FILE} is there; runs of older versions have none): give the folder of the "
            "prepared data that it was trained on."
        )
    return Vocabulary.read(folder / VOCABULARY), preparation


def read_preparation(folder: Path) -> Preparation | None:
    """The rules that a run or an adapter keeps; None where it has none.

    Raises:
        InputError: the file, or the vocabulary beside it, is damaged.
    """
    file = folder / PREPARATION_FILE
    if (folder / CONFIG_FILE).is_file():
        checked(folder, PREPARATION_FILE)  # of a run, whose files are recorded
    if not file.is_file():
        return None
    stored = read_json(file)
    if not isinstance(stored, dict) or not is_sealed(stored) or VOCABULARY not in stored:
        raise InputError(f"{file} is damaged (it is not what the run wrote): copy it from the run again.")
    check_files(folder, {VOCABULARY: stored[VOCABULARY]}, "copy it from the run again.")
    return Preparation.from_json(stored, file)


def rule_files(vocabulary: Vocabulary, preparation: Preparation | None) -> dict[str, bytes]:
    """Name -> content of the files that :func:`read_rules` reads; of the vocabulary alone where there is no
    more to tell.
    """
    files = {VOCABULARY: vocabulary.to_bytes()}
    if preparation is not None:
        rules = sealed({**preparation.to_json(), VOCABULARY: digest_of(files[VOCABULARY])})
        files[PREPARATION_FILE] = json_text(rules, 2).encode()
    return files


def check_prepared(path: Path, manifest: JsonObject, at_most: int | None = READ_THROUGH) -> None:
    """Check the files of a prepared data set against its manifest, see `files.check_files`.

    Raises:
        InputError: one is missing or damaged.
    """
    check_files(Path(path), manifest.get("files", {}), _MEND, at_most)


def read_prepared(path: Path, sep_token: bool = False, verify: bool = False) -> SequenceSet:
    """Open a prepared data set.

    The arrays are views of memory-mapped files, which several processes share; with ``sep_token`` they are
    new arrays in memory. Sizes of all files are checked, and contents as far as `files.READ_THROUGH` goes,
    once in a process.

    Args:
        path: the folder that ``prepare`` wrote.
        sep_token: put a [SEP] after each run of events of one visit.
        verify: check the contents of all files, however large.

    Raises:
        InputError: the folder is no prepared data set, or one of another version, incomplete or damaged.
    """
    path = Path(path)
    manifest = read_manifest(path)
    check_prepared(path, manifest, None if verify else READ_THROUGH)
    vocabulary = Vocabulary.read(path / VOCABULARY)
    splits = {name: read_split(path / name) for name in SPLITS}
    try:
        matches = vocabulary.fingerprint() == manifest["vocabulary"]["fingerprint"] and all(
            len(part) == manifest["splits"][name]["subjects"]
            and len(part.codes) == manifest["splits"][name]["events"]
            for name, part in splits.items()
        )
        counts = EventCounts(**manifest["events"])
        fingerprint = manifest["fingerprint"]
        without = manifest["subjects_without_events"]
        unknown = {row["code"]: row["events"] for row in manifest.get("unknown_codes", ())}
    except (KeyError, TypeError) as error:
        raise InputError(f"{path / MANIFEST} is damaged: run prepare again, with another output.") from error
    if not matches:
        raise InputError(
            f"{path} holds a vocabulary or events that are not those of its {MANIFEST}: files were changed "
            "or mixed up; run prepare again, with another output."
        )
    if sep_token:
        splits = {name: with_separators(part) for name, part in splits.items()}
        fingerprint = set_fingerprint(vocabulary, splits)
    births = {name: read_births(path, name) for name in SPLITS}
    deaths = {name: _subject_times(read_deaths(path, name)) for name in SPLITS}
    return SequenceSet(
        vocabulary,
        splits,
        counts,
        fingerprint,
        without,
        births,
        deaths,
        preparation=Preparation.from_json(manifest, path / MANIFEST),
        unknown_codes=unknown,
        static=FactTable(lambda: read_facts(path), lambda: read_fact_rows(path)),
    )


def read_facts(folder: Path) -> dict[str, CodedFacts]:
    """Split -> its static facts; see :func:`read_static`."""
    tables = {name: read_static(folder, name) for name in SPLITS}
    return {
        name: CodedFacts.of(table["subject_id"].to_numpy(), table["code"]) for name, table in tables.items()
    }


def read_fact_rows(folder: Path) -> tuple[str, ...]:
    """Codes of static facts that have a row of the vocabulary of a model that reads them.

    They are fitted on the train split where an older version prepared the folder.
    """
    manifest = read_manifest(folder)
    if "fact_rows" in manifest:
        return tuple(manifest["fact_rows"])
    train = read_split(folder / "train").subject_ids
    return fact_rows(read_facts(folder)["train"].counts(train), manifest["options"]["min_count"])


def read_split(folder: Path) -> Sequences:
    """One split; see `read_prepared`."""
    codes, ages, visits, times = read_columns(folder / "events.arrow", EVENTS)
    subject_ids, starts = read_columns(folder / "subjects.arrow", SUBJECTS)
    return Sequences(subject_ids, np.append(starts, len(codes)), codes, ages, visits, times)


def read_static(folder: Path, split: str) -> pa.Table:
    """Static facts of a split's subjects: subject_id (int64) and code (string), sorted, none twice.

    No row where the folder was prepared by a version that did not keep them.

    Raises:
        InputError: the file is damaged, or is missing in a folder that had one.
    """
    return _read_facts(folder, split, "static.parquet", STATIC) or STATIC.empty_table()


def read_deaths(folder: Path, split: str) -> pa.Table | None:
    """Deaths of a split's subjects: subject_id (int64, ascending, none twice) and time (microseconds).

    The time is what the source has, often the day alone. None where the folder was prepared by an older
    version, so that it is not known who died.

    Raises:
        InputError: the file is damaged, or is missing in a folder that had one.
    """
    return _read_facts(folder, split, "deaths.parquet", DEATHS)


def read_births(folder: Path, split: str) -> SubjectTimes:
    """Births of a split's subjects without any event left; none where an older version prepared the folder.

    Raises:
        InputError: the file is damaged, or is missing in a folder that had one.
    """
    return _subject_times(_read_facts(folder, split, "births.parquet", BIRTHS))


def _subject_times(table: pa.Table | None) -> SubjectTimes:
    if table is None:
        return SubjectTimes()
    return SubjectTimes(table["subject_id"].to_numpy(), table["time"].cast(pa.int64()).to_numpy())


_COUNTED = {"static.parquet": "facts", "deaths.parquet": "deaths", "births.parquet": "births_without_events"}
"""File -> its count in the manifest, by which an older folder that never had the file is told."""


def _read_facts(folder: Path, split: str, name: str, schema: pa.Schema) -> pa.Table | None:
    folder = Path(folder)
    manifest, file = read_manifest(folder), folder / split / name
    records = manifest.get("files", {})
    check_files(folder, {key: record for key, record in records.items() if key == f"{split}/{name}"}, _MEND)
    if not file.is_file():
        if _COUNTED[name] in manifest.get("subject_facts", {}).get(split, {}):
            raise InputError(f"{file} is missing: {_MEND}")
        return None
    with readable(file, f"{file} is damaged: run prepare again, with another output."):
        return sound(file, pq.ParquetFile(file).read()).cast(schema)


# Arrow files of one record batch, whose columns may be written part by part and are read as views.

_FEW_ROWS = 1 << 16


def write_columns(file: Path, schema: pa.Schema, rows: int, columns: Sequence[Iterable[np.ndarray]]) -> None:
    """Write an Arrow file of one record batch, with no column in memory as a whole.

    ``columns`` are parts of each column, numbers of its type in the schema, with ``rows`` values together.
    """
    if rows <= _FEW_ROWS:
        whole = [
            pa.array(np.concatenate([np.empty(0, field.type.to_pandas_dtype()), *parts]))
            for field, parts in zip(schema, columns, strict=True)
        ]
        batch = pa.RecordBatch.from_arrays(whole, schema=schema)
        with pa.OSFile(str(file), "wb") as sink, pa.ipc.new_file(sink, schema) as writer:
            writer.write_batch(batch)
        return
    sizes = [rows * field.type.bit_width // 8 for field in schema]
    with file.open("wb", buffering=0) as opened:
        filling = _Filling(opened, sizes, columns)
        # Never touched, so that it takes no memory: it only tells Arrow where columns are and how long.
        blank = pa.py_buffer(mmap.mmap(-1, max(sizes)))
        arrays = [
            pa.Array.from_buffers(field.type, rows, [None, blank.slice(0, size)], null_count=0)
            for field, size in zip(schema, sizes, strict=True)
        ]
        with pa.PythonFile(filling, mode="w") as sink, pa.ipc.new_file(sink, schema) as writer:
            writer.write_batch(pa.RecordBatch.from_arrays(arrays, schema=schema))
    filling.check()


class _Filling:
    """A file in which the buffers of Arrow's columns are replaced by parts."""

    closed = False

    def __init__(self, file: BinaryIO, sizes: Sequence[int], columns: Sequence[Iterable[np.ndarray]]):
        self._file = file
        self._columns = list(zip(sizes, columns, strict=True))

    def write(self, piece: bytes | pa.Buffer) -> int:
        size = len(piece)
        # What belongs to the format comes as short bytes, and the columns in their order.
        if size <= _FEW_ROWS:
            return self._all(piece)
        expected, parts = self._columns.pop(0)
        if size != expected or expected != sum(self._all(np.ascontiguousarray(part).data) for part in parts):
            raise ValueError("parts of a column that are not as long as the column")
        return size

    def _all(self, piece: bytes | memoryview | pa.Buffer) -> int:
        left = memoryview(piece).cast("B")
        size = len(left)
        while left:
            left = left[self._file.write(left) :]
        return size

    def check(self) -> None:
        if self._columns:
            raise ValueError("columns that were not written")

    def flush(self) -> None:
        self._file.flush()

    def close(self) -> None:
        self.closed = True


def read_columns(file: Path, schema: pa.Schema) -> list[np.ndarray]:
    """Columns as read-only views of the file, which is memory-mapped.

    Raises:
        InputError: no such file, or another one.
    """
    problem = f"{file} is missing, cut short or of another format: run prepare again, with another output."
    with readable(file, problem):
        reader = pa.ipc.open_file(pa.memory_map(str(file)))
        if reader.schema != schema or reader.num_record_batches != 1:
            raise pa.ArrowInvalid("another schema")
        return [column.to_numpy(zero_copy_only=True) for column in reader.get_batch(0).columns]


# Static facts, births and deaths of subjects, collected and written.

_ROWS = 1 << 20  # of a row group


class FactWriter:
    """Writes the facts of one split, subjects ascending; row groups do not depend on how they come."""

    def __init__(self, folder: Path):
        folder.mkdir(parents=True, exist_ok=True)
        schemas = {"static": STATIC, "deaths": DEATHS, "births": BIRTHS}
        self._tables = [_Rows(folder / f"{name}.parquet", schema) for name, schema in schemas.items()]
        self.static = FactCounts()

    def append(self, facts: SubjectFacts, with_events: np.ndarray) -> None:
        """Add the facts of further subjects; of them, int64 ``[n]`` ascending have events."""
        self.static.add(facts.static, with_events)
        columns = [
            (facts.static.subject_ids, np.array(facts.static.names, object)[facts.static.codes]),
            (facts.deaths.subject_ids, facts.deaths.times.astype("datetime64[us]")),
            (facts.births.subject_ids, facts.births.times.astype("datetime64[us]")),
        ]
        for rows, (ids, values) in zip(self._tables, columns, strict=True):
            if len(ids):
                columns = [pa.array(ids), pa.array(values, rows.schema.field(1).type)]
                rows.append(pa.table(columns, schema=rows.schema))

    def counts(self) -> dict[str, int]:
        """Static facts, subjects with any and with several of a kind, deaths, and births of subjects without
        any event left.
        """
        static, deaths, births = (table.rows for table in self._tables)
        return {
            "facts": static,
            "subjects": self.static.subjects,
            "several": self.static.several,
            "deaths": deaths,
            "births_without_events": births,
        }

    def __enter__(self) -> "FactWriter":
        return self

    def __exit__(self, *error: object) -> None:
        for rows in self._tables:
            rows.close()


class _Rows:
    """A Parquet file, written in row groups of `_ROWS`."""

    def __init__(self, file: Path, schema: pa.Schema):
        self.schema, self.rows = schema, 0
        self._writer = pq.ParquetWriter(file, schema)
        self._held: list[pa.Table] = []

    def append(self, table: pa.Table) -> None:
        before, self.rows = self.rows, self.rows + table.num_rows
        self._held.append(table)
        if before // _ROWS < self.rows // _ROWS:
            held = pa.concat_tables(self._held)
            whole = held.num_rows // _ROWS * _ROWS
            self._write(held.slice(0, whole))
            self._held = [held.slice(whole).combine_chunks()]

    def close(self) -> None:
        if self.rows % _ROWS:
            self._write(pa.concat_tables(self._held))
        self._writer.close()

    def _write(self, table: pa.Table) -> None:
        self._writer.write_table(table.combine_chunks(), row_group_size=_ROWS)


# The sequences of one split, collected and written.

_PART_ROWS = 1 << 20


class SplitWriter:
    """Collects the subjects of one split, ascending by id.

    Events are held in memory, or in raw files after a `flush`. Codes are any numbers at first: the
    vocabulary, which gives their ids, is only fitted when all are there.
    """

    def __init__(self, folder: Path, name: str):
        self._name = name
        self._raw = {field.name: folder / f"{name}-{field.name}.raw" for field in EVENTS}
        self.held = 0
        """Bytes of events in memory."""
        self._parts: dict[str, list[np.ndarray]] = {field.name: [] for field in EVENTS}
        self._stack = ExitStack()
        self._files: dict[str, BinaryIO] = {}
        self._subjects: list[np.ndarray] = []
        self._lengths: list[np.ndarray] = []

    def append(
        self,
        subject_ids: np.ndarray,
        lengths: np.ndarray,
        codes: np.ndarray,
        ages: np.ndarray,
        visits: np.ndarray,
        times: np.ndarray,
    ) -> None:
        """Add subjects: ids and lengths int64 ``[subjects]``, the rest ``[events]`` as in `Sequences`."""
        self._subjects.append(subject_ids)
        self._lengths.append(lengths)
        for name, column in zip(self._parts, (codes, ages, visits, times), strict=True):
            # A view would keep all of what it is a part of.
            self._parts[name].append(column if column.base is None else column.copy())
            self.held += column.nbytes

    def flush(self) -> None:
        """Move what is held in memory to raw files."""
        for name, parts in self._parts.items():
            if name not in self._files:
                self._files[name] = self._stack.enter_context(self._raw[name].open("wb"))
            for part in parts:
                self._files[name].write(part.data)
            parts.clear()
        self.held = 0

    def __enter__(self) -> "SplitWriter":
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    def finish(self, folder: Path, ids: np.ndarray) -> Sequences:
        """Write all that was added into the data set's folder, once, and give it back memory-mapped.

        ``ids`` are the vocabulary ids of the codes' numbers, int32.
        """
        lengths = np.concatenate([np.zeros(1, np.int64), *self._lengths])
        subjects = np.concatenate([np.empty(0, np.int64), *self._subjects])
        offsets = np.cumsum(lengths)
        self._stack.close()
        kinds = (field.type.to_pandas_dtype() for field in EVENTS)
        columns = [self._events(name, kind) for name, kind in zip(self._parts, kinds, strict=True)]
        columns[0] = (ids[part] for part in columns[0])
        split = folder / self._name
        split.mkdir(parents=True, exist_ok=True)
        write_columns(split / "events.arrow", EVENTS, int(offsets[-1]), columns)
        write_columns(split / "subjects.arrow", SUBJECTS, len(subjects), [[subjects], [offsets[:-1]]])
        for file in self._raw.values():
            file.unlink(missing_ok=True)
        return read_split(split)

    def _events(self, name: str, kind: type) -> Iterator[np.ndarray]:
        """One column in parts; each leaves memory when the next one comes."""
        if self._files:
            with self._raw[name].open("rb") as file:
                while len(part := np.fromfile(file, kind, _PART_ROWS)):
                    yield part
        parts = self._parts[name]
        for place, part in enumerate(parts):
            parts[place] = np.empty(0, kind)
            yield part
