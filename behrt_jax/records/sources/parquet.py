"""Row groups of a plain table in Parquet, in pieces."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from behrt_jax.data.parquet import CHUNK_ROWS
from behrt_jax.errors import InputError
from behrt_jax.records.sources.csv_files import Piece

# What the footer of a Parquet file tells about a column.


def column_range(metadata: pq.FileMetaData, row_groups: Iterable[int], column: str) -> tuple[int, int] | None:
    """Smallest and largest integer of a column in some row groups; None where the footer does not tell."""
    found = []
    for group in row_groups:
        part = metadata.row_group(group)
        names = [part.column(place).path_in_schema for place in range(part.num_columns)]
        if column not in names:
            return None
        statistics = part.column(names.index(column)).statistics
        if statistics is None or not statistics.has_min_max or not isinstance(statistics.min, int):
            return None
        found += [statistics.min, statistics.max]
    return (min(found), max(found)) if found else None


# The shards of a MEDS folder cut into units that are read by themselves.


@dataclass(frozen=True)
class Unit:
    """Some row groups of a shard, about ``CHUNK_ROWS`` rows together."""

    shard: Path
    row_groups: tuple[int, ...]
    rows: int
    subjects: tuple[int, int] | None
    """Smallest and largest id, where the footer tells."""


def cut_units(shard: Path, metadata: pq.FileMetaData) -> list[Unit]:
    """Cut a shard into runs of row groups that fill ``CHUNK_ROWS`` as far as they can."""
    runs: list[list[int]] = []
    rows = CHUNK_ROWS  # of the last run
    for group in range(metadata.num_row_groups):
        more = metadata.row_group(group).num_rows
        if rows + more > CHUNK_ROWS:
            runs.append([])
            rows = 0
        runs[-1].append(group)
        rows += more
    return [
        Unit(
            shard,
            tuple(run),
            sum(metadata.row_group(group).num_rows for group in run),
            column_range(metadata, run, "subject_id"),
        )
        for run in runs
    ]


UNIT_ROWS = 4 * CHUNK_ROWS
"""Rows of a Parquet file's unit, about: whole row groups, one at least."""


def cut_runs(groups: list[int]) -> list[list[int]]:
    """Row groups in runs of `UNIT_ROWS` rows or more, from the rows in each."""
    runs, rows = [], UNIT_ROWS
    for group, size in enumerate(groups):
        if rows >= UNIT_ROWS:
            runs.append([])
            rows = 0
        runs[-1].append(group)
        rows += size
    return runs


def read_groups(path: Path, groups: Sequence[int], columns: list[str], text: str) -> Iterator[Piece]:
    """Columns of some row groups in pieces of at most `CHUNK_ROWS` rows; ``text`` as a dictionary."""
    with open_parquet(path, [text]) as file:
        sizes = [file.metadata.row_group(group).num_rows for group in range(file.metadata.num_row_groups)]
        for group in groups:
            row = sum(sizes[:group]) + 1
            try:
                for batch in file.iter_batches(CHUNK_ROWS, row_groups=[group], columns=columns):
                    yield Piece(path, row, pa.Table.from_batches([batch]))
                    row += batch.num_rows
            except (pa.ArrowException, OSError) as error:
                raise _unreadable(path) from error


def open_parquet(path: Path, texts: list[str] | None = None) -> pq.ParquetFile:
    try:
        return pq.ParquetFile(path, read_dictionary=texts)
    except (pa.ArrowException, OSError) as error:
        raise _unreadable(path) from error


def _unreadable(path: Path) -> InputError:
    return InputError(f"{path} is no readable Parquet file (cut short, or another format): write it again.")
