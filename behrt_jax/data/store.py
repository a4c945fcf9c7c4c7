"""The prepared data set on disk: sequences by split as memory-mapped Arrow files, vocabulary, manifest.

A folder holds ``vocabulary.parquet``, ``manifest.json`` and, for each split, ``subjects.arrow`` (columns
subject_id and start, the place of the subject's first event) and ``events.arrow`` (columns code, age,
visit and time: one record batch, so that each column is one array on disk). Beside them lie what is known of
the subjects themselves, ``static.parquet``, ``deaths.parquet`` and ``births.parquet``, see `subject_facts`.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from behrt_jax.data.arrow_columns import read_columns
from behrt_jax.data.event_columns import Births
from behrt_jax.data.events import SPLITS, EventCounts
from behrt_jax.data.sequences import Sequences, SequenceSet, set_fingerprint, with_separators
from behrt_jax.data.subject_facts import BIRTHS, DEATHS, STATIC
from behrt_jax.data.vocabulary import Vocabulary
from behrt_jax.errors import InputError

FORMAT_VERSION = 1
MANIFEST = "manifest.json"
VOCABULARY = "vocabulary.parquet"
EVENTS = pa.schema([("code", pa.int32()), ("age", pa.float32()), ("visit", pa.int32()), ("time", pa.int64())])
SUBJECTS = pa.schema([("subject_id", pa.int64()), ("start", pa.int64())])


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
    return SequenceSet(vocabulary, splits, counts, fingerprint, without, births)


def read_split(folder: Path) -> Sequences:
    """One split; see `read_prepared`."""
    codes, ages, visits, times = read_columns(folder / "events.arrow", EVENTS)
    subject_ids, starts = read_columns(folder / "subjects.arrow", SUBJECTS)
    return Sequences(subject_ids, np.append(starts, len(codes)), codes, ages, visits, times)


def read_static(folder: Path, split: str) -> pa.Table:
    """Static facts of a split's subjects: subject_id (int64) and code (string), sorted, none twice.

    None where the folder was prepared by an older version.

    Raises:
        InputError: the file is damaged.
    """
    return _read_facts(folder, split, "static.parquet", STATIC)


def read_deaths(folder: Path, split: str) -> pa.Table | None:
    """Deaths of a split's subjects: subject_id (int64, ascending, none twice) and time (microseconds).

    The time is what the source has, often the day alone. None where the folder was prepared by an older
    version, so that it is not known who died.

    Raises:
        InputError: the file is damaged.
    """
    if not (Path(folder) / split / "deaths.parquet").is_file():
        return None
    return _read_facts(folder, split, "deaths.parquet", DEATHS)


def read_births(folder: Path, split: str) -> Births:
    """Births of a split's subjects without any event left; none where an older version prepared the folder.

    Raises:
        InputError: the file is damaged.
    """
    table = _read_facts(folder, split, "births.parquet", BIRTHS)
    return Births(table["subject_id"].to_numpy(), table["time"].cast(pa.int64()).to_numpy())


def _read_facts(folder: Path, split: str, name: str, schema: pa.Schema) -> pa.Table:
    file = Path(folder) / split / name
    if not file.is_file():
        return schema.empty_table()
    try:
        return pq.ParquetFile(file).read().cast(schema)
    except (pa.ArrowException, OSError, ValueError) as error:
        raise InputError(f"{file} is damaged: run prepare again, with another output.") from error
