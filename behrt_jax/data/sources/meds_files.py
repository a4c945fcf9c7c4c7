"""The shards of a MEDS folder: found, opened, checked and turned into columns of the events table."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pyarrow.types as pt

from behrt_jax.data.events import EVENT_SCHEMA, VISIT_FIELD, EventCounts
from behrt_jax.data.sources.meds_markers import with_standard_markers
from behrt_jax.data.sources.source import CHUNK_ROWS
from behrt_jax.errors import InputError

_TEXT = EVENT_SCHEMA.field("code").type
_REQUIRED = ("subject_id", "time", "code")


def find_shards(path: Path) -> list[Path]:
    """Every shard below ``path/data``, at any depth, in order of its name.

    Raises:
        InputError: no such folder, or no shard in it.
    """
    if not (path / "data").is_dir():
        what = "has no folder data/ in it" if path.is_dir() else "is not a folder"
        raise InputError(
            f"{path} {what}: set data.path (or --input of prepare) to a MEDS folder, which holds data/ and "
            "metadata/."
        )
    files = sorted((path / "data").rglob("*.parquet"))
    shards = [file for file in files if file.is_file() and not file.name.startswith(".")]
    if not shards:
        raise InputError(f"{path / 'data'} holds no .parquet file: put the data set's shards there.")
    return shards


def open_parquet(file: Path) -> pq.ParquetFile:
    """Open a file whose texts are read dictionary-encoded; its columns are in ``schema_arrow``.

    Raises:
        InputError: cut short, or no Parquet file.
    """
    try:
        columns = [field.name for field in pq.read_schema(file) if not pt.is_nested(field.type)]
        texts = [name for name in columns if name in ("code", "split", "description")]
        return pq.ParquetFile(file, read_dictionary=texts)
    except (pa.ArrowException, OSError) as error:
        raise _unreadable(file) from error


def check_shard(file: Path, opened: pq.ParquetFile, visit_column: str | None) -> None:
    """Refuse a shard without the columns that MEDS requires, or with types that cannot be events."""
    require_columns(file, opened, _REQUIRED)
    _convert(file, opened.schema_arrow.empty_table(), visit_column)


def read_events(
    file: Path, row_groups: tuple[int, ...], visit_column: str | None, counts: EventCounts
) -> Iterator[pa.Table]:
    """Read row groups of a shard as events, in tables of at most ``CHUNK_ROWS`` rows.

    Only the columns of the events table are read. Rows with a null code are dropped, and other names
    of the markers of birth and death changed to the standard's; ``counts`` has them all.

    Raises:
        InputError: damage, a null subject id, or a value that does not fit.
    """
    with open_parquet(file) as opened:
        wanted = [*_REQUIRED, "numeric_value", *([visit_column] if visit_column is not None else [])]
        columns = [column for column in dict.fromkeys(wanted) if column in opened.schema_arrow.names]
        for table in _tables(file, opened, row_groups, columns):
            counts.read += table.num_rows
            events = _convert(file, table, visit_column)
            if events["subject_id"].null_count:
                refuse_nulls(file, "subject_id", read_columns(file, opened, ["subject_id"])["subject_id"])
            nulls = events["code"].null_count
            counts.drop("null code", nulls)
            if nulls:
                events = events.filter(events["code"].is_valid())
            yield with_standard_markers(file, events.unify_dictionaries(), counts)


def read_subject_ids(file: Path, row_groups: tuple[int, ...] | None = None) -> Iterator[np.ndarray]:
    """Subject ids of a shard's rows, int64 arrays of at most ``CHUNK_ROWS``; nulls are left out."""
    with open_parquet(file) as opened:
        chosen = tuple(range(opened.num_row_groups)) if row_groups is None else row_groups
        for table in _tables(file, opened, chosen, ["subject_id"]):
            yield cast_column(file, "subject_id", table["subject_id"], pa.int64()).drop_null().to_numpy()


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
    try:
        return opened.read(columns=columns)
    except (pa.ArrowException, OSError) as error:
        raise _unreadable(file) from error


def _tables(
    file: Path, opened: pq.ParquetFile, row_groups: tuple[int, ...], columns: list[str]
) -> Iterator[pa.Table]:
    """Read row groups at once where they fit into one table, else in pieces."""
    rows = sum(opened.metadata.row_group(group).num_rows for group in row_groups)
    try:
        if rows <= CHUNK_ROWS:
            yield opened.read_row_groups(list(row_groups), columns=columns)
            return
        for batch in opened.iter_batches(CHUNK_ROWS, row_groups=list(row_groups), columns=columns):
            yield pa.Table.from_batches([batch])
    except (pa.ArrowException, OSError) as error:
        raise _unreadable(file) from error


def _unreadable(file: Path) -> InputError:
    return InputError(f"{file} is no readable Parquet file (cut short, or another format): write it again.")


def _convert(file: Path, table: pa.Table, visit_column: str | None) -> pa.Table:
    """The columns of the events table, in its types; null where the shard has none."""
    wanted = {field.name: (field.name, field.type) for field in EVENT_SCHEMA}
    if visit_column is not None:
        wanted[VISIT_FIELD.name] = (visit_column, VISIT_FIELD.type)
    return pa.table(
        {
            name: cast_column(file, column, table[column], kind)
            if column in table.column_names
            else pa.nulls(table.num_rows, kind)
            for name, (column, kind) in wanted.items()
        }
    )


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
        fits, meant = kind == _TEXT, "strings"
    if not fits and not pt.is_null(kind):
        raise InputError(f"{file} has {kind} in the column {column}: write it as {meant}.")
    # Values and nanoseconds may lose their last digits; anything else must come through exactly.
    safe = not (pt.is_float32(target) or (pt.is_timestamp(kind) and kind.unit == "ns"))
    try:
        return values.cast(target, safe=safe)
    except pa.ArrowInvalid as error:
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
