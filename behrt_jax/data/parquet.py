"""Parquet files read, and their columns checked and cast, with an error that says how to mend them."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pyarrow.types as pt

from behrt_jax.data.events import EVENT_SCHEMA
from behrt_jax.errors import InputError

CHUNK_ROWS = 1 << 20

TEXT = EVENT_SCHEMA.field("code").type


@contextmanager
def readable(file: Path, message: str | None = None) -> Iterator[None]:
    """Turn errors of reading a file within the block into an InputError that says how to mend it."""
    try:
        yield
    except InputError:
        raise
    except (pa.ArrowException, OSError, ValueError, OverflowError, MemoryError) as error:
        problem = f"{file} is no readable Parquet file (cut short, or another format): write it again."
        raise InputError(message or problem) from error


def open_parquet(file: Path) -> pq.ParquetFile:
    """Open a file whose texts are read dictionary-encoded; its columns are in ``schema_arrow``.

    Raises:
        InputError: cut short, or no Parquet file.
    """
    with readable(file):
        columns = [field.name for field in pq.read_schema(file) if not pt.is_nested(field.type)]
        texts = [name for name in columns if name in ("code", "split", "description")]
        return open_whole(file, read_dictionary=texts)


def open_whole(file: Path, **options: Any) -> pq.ParquetFile:
    """Open a file whose footer is whole; checksums of pages, where it has them, are compared on reading.

    Args:
        file: to be opened within `readable`.
        options: of ``pyarrow.parquet.ParquetFile``.

    Raises:
        ValueError: counts of rows that contradict each other.
    """
    opened = pq.ParquetFile(file, page_checksum_verification=True, **options)
    metadata, flat = opened.metadata, not any(map(pt.is_nested, opened.schema_arrow.types))
    groups = [metadata.row_group(group) for group in range(metadata.num_row_groups)]
    counts = [group.num_rows for group in groups]
    chunks = [[group.column(place).num_values for place in range(group.num_columns)] for group in groups]
    agree = all(set(values) <= {count} for count, values in zip(counts, chunks, strict=True)) or not flat
    if not (agree and min(counts, default=0) >= 0 and sum(counts) == metadata.num_rows):
        raise ValueError("counts of rows that differ")
    return opened


def require_columns(file: Path, opened: pq.ParquetFile, required: tuple[str, ...]) -> None:
    """Refuse a file without these columns."""
    names = opened.schema_arrow.names
    for column in required:
        if column not in names:
            raise InputError(
                f"{file} has no column {column}, which MEDS requires: add or rename it; the columns are "
                f"{', '.join(names)}."
            )


def read_columns(file: Path, opened: pq.ParquetFile, columns: list[str]) -> pa.Table:
    """All rows of some columns, at once; InputError where the file is damaged."""
    with readable(file):
        return sound(file, opened.read(columns=columns))


def read_tables(
    file: Path, opened: pq.ParquetFile, row_groups: tuple[int, ...], columns: list[str]
) -> Iterator[pa.Table]:
    """Read row groups at once where they fit into one table, else in pieces."""
    rows = sum(opened.metadata.row_group(group).num_rows for group in row_groups)
    with readable(file):
        if rows <= CHUNK_ROWS:
            yield sound(file, opened.read_row_groups(list(row_groups), columns=columns))
            return
        for batch in opened.iter_batches(CHUNK_ROWS, row_groups=list(row_groups), columns=columns):
            yield sound(file, pa.Table.from_batches([batch]))


def sound(file: Path, table: pa.Table) -> pa.Table:
    """A table as it was read; InputError where a column holds what its type cannot be."""
    for name in table.column_names:
        try:
            table[name].validate(full=True)
        except pa.ArrowException as error:
            kind = "text that is not UTF-8" if "UTF8" in str(error) else f"damaged {table[name].type}"
            raise InputError(f"{file} has {kind} in the column {name}: write this column again.") from error
    return table


def cast_column(file: Path, column: str, values: pa.ChunkedArray, target: pa.DataType) -> pa.ChunkedArray:
    """A column in a type of the events table; InputError where its type or a value does not fit."""
    kind = values.type
    if pt.is_int64(target):
        fits, meant = pt.is_integer(kind), "integers"
    elif pt.is_timestamp(target):
        fits, meant = pt.is_timestamp(kind) or pt.is_date(kind), "timestamps or dates"
    elif pt.is_float32(target):
        fits, meant = pt.is_floating(kind) or pt.is_integer(kind), "numbers"
    else:
        fits, meant = kind == TEXT, "strings"
    if not fits and not pt.is_null(kind):
        raise InputError(f"{file} has {kind} in the column {column}: write it as {meant}.")
    # Values and nanoseconds may lose their last digits; anything else must come through exactly.
    safe = not (pt.is_float32(target) or (pt.is_timestamp(kind) and kind.unit == "ns"))
    return cast_or_refuse(file, column, values, target, safe)


def cast_or_refuse(
    file: Path, column: str, values: pa.ChunkedArray, target: pa.DataType, safe: bool = True
) -> pa.ChunkedArray:
    """A column in another type; InputError where a value does not fit."""
    try:
        return values.cast(target, safe=safe)
    except pa.ArrowException as error:
        raise InputError(
            f"{file} has values in the column {column} that do not fit into {target}: mend or drop them."
        ) from error


def refuse_nulls(file: Path, column: str, values: pa.ChunkedArray) -> None:
    """Refuse a column with nulls, naming the row of the first."""
    if values.null_count:
        row = int(np.argmax(values.is_null().to_numpy())) + 1
        raise InputError(
            f"{file} has no {column} in row {row} (the first of {values.null_count} such rows, counted "
            "from 1): fill it in or leave the row out."
        )
