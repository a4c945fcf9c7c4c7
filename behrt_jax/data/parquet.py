"""Parquet files read, and their columns checked and cast, with an error that says how to mend them."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pyarrow.types as pt

from behrt_jax.data.events import EVENT_SCHEMA
from behrt_jax.errors import InputError

# pyarrow.compute makes its functions on import, where pyright does not see them.
# pyright: reportAttributeAccessIssue=false

CHUNK_ROWS = 1 << 20
INT96_UNIT = "us"
"""Unit in which Spark's timestamps (INT96) are read: nanoseconds, the library's own choice, hold no time
after 2262 and turn 9999-12-31 into another."""

TEXT = EVENT_SCHEMA.field("code").type


@contextmanager
def readable(file: Path, message: str | None = None) -> Iterator[None]:
    """Turn errors of reading a file within the block into an InputError that says how to mend it."""
    try:
        yield
    except InputError:
        raise
    except (pa.ArrowException, OSError, ValueError, OverflowError) as error:
        problem = (
            message or f"{file} is no readable Parquet file (cut short, or another format): write it again."
        )
        if "UTF8" in str(error):  # Arrow looks into dictionaries while it reads
            problem = f"{file} holds text that is not UTF-8: write it again as UTF-8."
        raise InputError(problem) from error


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
    opened = pq.ParquetFile(
        file, page_checksum_verification=True, coerce_int96_timestamp_unit=INT96_UNIT, **options
    )
    metadata = opened.metadata
    counts = [metadata.row_group(group).num_rows for group in range(metadata.num_row_groups)]
    if min(counts, default=0) < 0 or sum(counts) != metadata.num_rows:
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
        table = sound(file, opened.read(columns=columns))
        check_rows(table.num_rows, opened.metadata.num_rows)
        return table


def read_tables(
    file: Path, opened: pq.ParquetFile, row_groups: tuple[int, ...], columns: list[str]
) -> Iterator[pa.Table]:
    """Read row groups at once where they fit into one table, else in pieces."""
    rows = sum(opened.metadata.row_group(group).num_rows for group in row_groups)
    with readable(file):
        if rows <= CHUNK_ROWS:
            table = sound(file, opened.read_row_groups(list(row_groups), columns=columns))
            check_rows(table.num_rows, rows)
            yield table
            return
        read = 0
        for batch in opened.iter_batches(CHUNK_ROWS, row_groups=list(row_groups), columns=columns):
            yield sound(file, pa.Table.from_batches([batch]))
            read += batch.num_rows
        check_rows(read, rows)


def check_rows(read: int, rows: int) -> None:
    """Raise ValueError where pages gave other rows than the footer has: a page's own count may be damaged."""
    if read != rows:
        raise ValueError(f"{read} rows in place of {rows}")


def sound(file: Path, table: pa.Table, first_row: int = 1) -> pa.Table:
    """A table as it was read, once `refuse_broken` has looked at all of its columns."""
    for name in table.column_names:
        refuse_broken(file, name, table[name], first_row)
    return table


def refuse_broken(file: Path, column: str, values: pa.Array | pa.ChunkedArray, first_row: int = 1) -> None:
    """Refuse what its type cannot hold, such as text that is not UTF-8 (Parquet holds any bytes).

    ``first_row`` is the number of the first value's row in the file.
    """
    try:
        values.validate(full=True)
    except pa.ArrowException as error:
        if "UTF8" not in str(error):
            raise InputError(f"{file} is damaged in the column {column}: write it again.") from error
        raise InputError(
            f"{file} has in the column {column}, row {first_row + _first_broken(values)} (counted from 1), "
            "text that is not UTF-8: write the column again as UTF-8."
        ) from error


def _first_broken(values: pa.Array | pa.ChunkedArray) -> int:
    """Place of the first text that is not UTF-8."""
    row = 0
    for chunk in values.chunks if isinstance(values, pa.ChunkedArray) else [values]:
        coded = pt.is_dictionary(chunk.type)
        texts = chunk.dictionary if coded else chunk
        listed = pt.is_list(texts.type) or pt.is_large_list(texts.type)
        texts = texts.cast(pa.list_(pa.binary()) if listed else pa.binary())
        broken = [place for place, text in enumerate(texts) if not _is_utf8(text.as_py())]
        if coded:  # whose indices may be damaged too
            indices = chunk.indices.to_numpy(zero_copy_only=False)
            broken = np.flatnonzero(np.isin(indices, broken)).tolist()
        if broken:
            return row + broken[0]
        row += len(chunk)
    return 0


def _is_utf8(text: bytes | list[bytes | None] | None) -> bool:
    try:
        return all(
            isinstance((one or b"").decode(), str) for one in (text if isinstance(text, list) else [text])
        )
    except UnicodeDecodeError:
        return False


def is_whole_or_float(kind: pa.DataType) -> bool:
    """A type that may hold whole numbers; where it has gaps, pandas makes floating point of them."""
    return pt.is_integer(kind) or pt.is_floating(kind) or pt.is_decimal(kind)


def whole_numbers(values: pa.Array) -> pa.Array:
    """Whole numbers in any type as int64, exactly; NaN, which stands for a missing one, becomes null.

    Raises:
        pyarrow.ArrowInvalid: a number that is not whole, has more than 64 bits, or is so large that numbers
            of floating point have lost its last digits (from 2^53 on in 64 bits).
    """
    if pt.is_floating(values.type):
        numbers = values.to_numpy(zero_copy_only=False)  # null becomes NaN
        if (np.abs(numbers) >= 2.0 ** (np.finfo(numbers.dtype).nmant + 1)).any():
            raise pa.ArrowInvalid(f"numbers so large are not exact in {values.type}")
        values = pa.array(numbers.astype(np.float64), mask=np.isnan(numbers))
    return values.cast(pa.int64())


def cast_column(file: Path, column: str, values: pa.ChunkedArray, target: pa.DataType) -> pa.ChunkedArray:
    """A column in a type of the events table; InputError where its type or a value does not fit.

    Times with a zone become those that clocks there show; see `plain_times`.
    """
    kind = values.type
    if pt.is_int64(target):
        fits, meant = is_whole_or_float(kind), "integers"
    elif pt.is_timestamp(target):
        fits, meant = pt.is_timestamp(kind) or pt.is_date(kind), "timestamps or dates"
    elif pt.is_float32(target):
        fits, meant = is_whole_or_float(kind), "numbers"
    else:
        fits, meant = kind == TEXT, "strings"
    if not fits and not pt.is_null(kind):
        raise InputError(f"{file} has {kind} in the column {column}: write it as {meant}.")
    # Values may lose their last digits; anything else must come through exactly.
    return cast_or_refuse(file, column, values, target, safe=not pt.is_float32(target))


def plain_times(values: pa.ChunkedArray | pa.Array) -> pa.ChunkedArray | pa.Array:
    """Timestamps or dates in microseconds without a zone.

    Of times with a zone those that clocks there show, so that a calendar day is the local one; where clocks
    are set back, the hour that comes twice is the same both times. Finer parts are cut off.

    Raises:
        pyarrow.ArrowInvalid: a time that no 64-bit count of microseconds holds.
    """
    if pt.is_timestamp(values.type):
        if values.type.unit == "ns":  # towards the past, also before 1970
            values = pc.floor_temporal(values, unit="microsecond")
        if values.type.tz not in (None, "UTC", "Etc/UTC", "Z", "+00:00"):  # for which no table is needed
            values = pc.local_timestamp(values)
        values = values.cast(pa.timestamp("us", values.type.tz))
    return values.cast(pa.timestamp("us"))


def cast_or_refuse(
    file: Path, column: str, values: pa.ChunkedArray, target: pa.DataType, safe: bool = True
) -> pa.ChunkedArray:
    """A column in another type; InputError where a value does not fit, or text is not UTF-8."""
    refuse_broken(file, column, values)
    try:
        if pt.is_int64(target) and not pt.is_null(values.type):
            return pa.chunked_array([whole_numbers(chunk) for chunk in values.chunks], target)
        return plain_times(values) if pt.is_timestamp(target) else values.cast(target, safe=safe)
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
