"""Row groups of a plain table in Parquet, in pieces."""

from collections.abc import Iterator, Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from behrt_jax.data.sources.csv_reading import Piece
from behrt_jax.data.sources.source import CHUNK_ROWS
from behrt_jax.errors import InputError

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
