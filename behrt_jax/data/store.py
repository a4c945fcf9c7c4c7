"""The prepared data set on disk: sequences by split as memory-mapped Arrow files, vocabulary, manifest.

A folder holds ``vocabulary.parquet``, ``manifest.json`` and, for each split, ``subjects.arrow`` (columns
subject_id and start, the place of the subject's first event) and ``events.arrow`` (columns code, age,
visit and time: one record batch, so that each column is one array on disk).
"""

import json
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from behrt_jax.data.events import SPLITS, EventCounts
from behrt_jax.data.sequences import Sequences, SequenceSet, set_fingerprint, with_separators
from behrt_jax.data.vocabulary import Vocabulary
from behrt_jax.errors import InputError

FORMAT_VERSION = 1
MANIFEST = "manifest.json"
VOCABULARY = "vocabulary.parquet"
_EVENTS = pa.schema(
    [("code", pa.int32()), ("age", pa.float32()), ("visit", pa.int32()), ("time", pa.int64())]
)
_SUBJECTS = pa.schema([("subject_id", pa.int64()), ("start", pa.int64())])
_LOOKUP_ROWS = 1 << 20


class SplitWriter:
    """Appends subjects, ascending by id, to the raw columns of one split; memory is that of the ids.

    Codes are any numbers at first: the vocabulary, which gives their ids, is only fitted at the end.
    """

    def __init__(self, folder: Path, name: str):
        self.name = name
        self._raw = {field.name: folder / f"{name}-{field.name}.raw" for field in _EVENTS}
        self._stack = ExitStack()
        self._files = {
            column: self._stack.enter_context(file.open("wb")) for column, file in self._raw.items()
        }
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
        for file, column in zip(self._files.values(), (codes, ages, visits, times), strict=True):
            file.write(np.ascontiguousarray(column).data)

    def __enter__(self) -> "SplitWriter":
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    def finish(self, folder: Path, ids: np.ndarray) -> Sequences:
        """Write the split into the data set, once the writer is closed, and give it back memory-mapped.

        Args:
            folder: the data set's.
            ids: vocabulary id of each code's number, int32.
        """
        lengths = np.concatenate([np.empty(0, np.int64), *self._lengths])
        columns = [
            _map(file, field.type.to_pandas_dtype())
            for field, file in zip(_EVENTS, self._raw.values(), strict=True)
        ]
        codes = columns[0]
        for start in range(0, len(codes), _LOOKUP_ROWS):
            part = codes[start : start + _LOOKUP_ROWS]
            part[:] = ids[part]
        split = folder / self.name
        split.mkdir()
        _write(split / "events.arrow", _EVENTS, columns)
        ends = np.cumsum(lengths)
        subjects = np.concatenate([np.empty(0, np.int64), *self._subjects])
        _write(split / "subjects.arrow", _SUBJECTS, [subjects, ends - lengths])
        for file in self._raw.values():
            file.unlink()
        return _read_split(split)


def write_json(file: Path, content: Mapping[str, Any]) -> None:
    """Write JSON, indented, in the order given."""
    file.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def read_manifest(path: Path) -> dict[str, Any]:
    """Read the manifest of a prepared data set.

    Raises:
        InputError: the folder is none, or is of another version.
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
    return manifest


def read_prepared(path: Path, sep_token: bool = False) -> SequenceSet:
    """Open a prepared data set.

    The arrays are views of memory-mapped files, so that opening reads almost nothing, and several
    processes share them; with ``sep_token`` they are new arrays in memory.

    Args:
        path: the folder that ``prepare`` wrote.
        sep_token: put a [SEP] after each run of events of one visit.

    Raises:
        InputError: the folder is no prepared data set, or one of another version, or incomplete.
    """
    path = Path(path)
    manifest = read_manifest(path)
    vocabulary = Vocabulary.read(path / VOCABULARY)
    splits = {name: _read_split(path / name) for name in SPLITS}
    try:
        matches = vocabulary.fingerprint() == manifest["vocabulary"]["fingerprint"] and all(
            len(part) == manifest["splits"][name]["subjects"]
            and len(part.codes) == manifest["splits"][name]["events"]
            for name, part in splits.items()
        )
        counts = EventCounts(**manifest["events"])
        fingerprint = manifest["fingerprint"]
        without = manifest["subjects_without_events"]
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
    return SequenceSet(vocabulary, splits, counts, fingerprint, without)


def _read_split(folder: Path) -> Sequences:
    codes, ages, visits, times = _read(folder / "events.arrow", _EVENTS)
    subject_ids, starts = _read(folder / "subjects.arrow", _SUBJECTS)
    return Sequences(subject_ids, np.append(starts, len(codes)), codes, ages, visits, times)


def _map(file: Path, dtype: type) -> np.ndarray:
    """A raw file as an array that writes through to it; an empty file cannot be mapped."""
    return np.memmap(file, dtype, "r+") if file.stat().st_size else np.empty(0, dtype)


def _write(file: Path, schema: pa.Schema, columns: list[np.ndarray]) -> None:
    arrays = [
        # Buffers, not values: a memory-mapped column is never held in memory as a whole.
        pa.Array.from_buffers(field.type, len(column), [None, pa.py_buffer(column)])
        for field, column in zip(schema, columns, strict=True)
    ]
    with pa.OSFile(str(file), "wb") as sink, pa.ipc.new_file(sink, schema) as writer:
        writer.write_batch(pa.RecordBatch.from_arrays(arrays, schema=schema))


def _read(file: Path, schema: pa.Schema) -> list[np.ndarray]:
    """Columns as read-only views of the file."""
    try:
        reader = pa.ipc.open_file(pa.memory_map(str(file)))
        if reader.schema != schema or reader.num_record_batches != 1:
            raise pa.ArrowInvalid("another schema")
        return [column.to_numpy(zero_copy_only=True) for column in reader.get_batch(0).columns]
    except (pa.ArrowException, OSError) as error:
        raise InputError(
            f"{file} is missing, cut short or of another format: run prepare again, with another output."
        ) from error
