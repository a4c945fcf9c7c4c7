"""Parquet files in parts of whole row groups, each read by itself in bounded pieces."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from behrt_jax.data.parquet import readable
from behrt_jax.records.sources.csv_files import Piece

Damage = Callable[[Path, int | None], str]
"""Says what to do about a damaged file, given the rows read so far; None where it cannot even be opened."""


@dataclass(frozen=True)
class Part:
    """What can be read by itself: a whole file, or some row groups of a Parquet file."""

    file: Path
    row_groups: tuple[int, ...] = ()
    """None for the whole file, of whatever format."""
    first_row: int = 0
    """Rows of the file before this part."""
    rows: int = 0
    """Of the row groups."""


def cut_parts(file: Path, metadata: pq.FileMetaData, rows: int, beyond: bool = False) -> list[Part]:
    """Cut a file into runs of row groups, each of at most ``rows`` rows, or of one group where it has more.

    With ``beyond`` a run is full once it has that many rows, so that its last group may pass them.
    """
    runs: list[list[int]] = []
    sizes, held = row_counts(metadata), 0
    for group, size in enumerate(sizes):
        if not runs or (held >= rows if beyond else held + size > rows):
            runs.append([])
            held = 0
        runs[-1].append(group)
        held += size
    return [Part(file, tuple(run), sum(sizes[: run[0]]), sum(sizes[group] for group in run)) for run in runs]


def row_counts(metadata: pq.FileMetaData) -> list[int]:
    """Rows of each row group."""
    return [metadata.row_group(group).num_rows for group in range(metadata.num_row_groups)]


def column_ranges(metadata: pq.FileMetaData, parts: Sequence[Part], column: str) -> list[tuple[int, int]]:
    """Smallest and largest int64 of a column in each part; none where the footer does not tell all."""
    ranges = []
    for part in parts:
        found = []
        for group in map(metadata.row_group, part.row_groups):
            names = [group.column(place).path_in_schema for place in range(group.num_columns)]
            statistics = group.column(names.index(column)).statistics if column in names else None
            if statistics is None or not statistics.has_min_max or not isinstance(statistics.min, int):
                return []
            found += [statistics.min, statistics.max]
        ranges.append((min(found), max(found)))
    return ranges if all(most < 1 << 63 for _, most in ranges) else []  # reading refuses larger ids


def open_parquet(file: Path, texts: list[str] | None = None, damage: Damage | None = None) -> pq.ParquetFile:
    """Open a file; the columns ``texts`` come as dictionaries.

    Raises:
        InputError: cut short, or no Parquet file; ``damage`` makes another message of it.
    """
    with readable(file, damage and damage(file, None)):
        # Pages come one by one, so that a file of one huge row group needs little memory.
        return pq.ParquetFile(file, read_dictionary=texts, buffer_size=1 << 20, pre_buffer=False)


def read_part(
    opened: pq.ParquetFile, part: Part, columns: list[str], rows: int, damage: Damage | None = None
) -> Iterator[Piece]:
    """Columns of a part in pieces of at most ``rows`` rows; `InputError` where the file is damaged."""
    row, batches = part.first_row, opened.iter_batches(rows, part.row_groups or None, columns)
    while True:
        with readable(part.file, damage and damage(part.file, row)):
            batch = next(batches, None)
        if batch is None:
            return
        yield Piece(part.file, row + 1, pa.Table.from_batches([batch]))
        row += batch.num_rows
