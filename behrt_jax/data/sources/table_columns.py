"""What the columns of a table may be, in CSV (text) and in Parquet (types)."""

# pyarrow.compute makes its functions on import, where pyright does not see them.
# pyright: reportAttributeAccessIssue=false

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.types as pt

from behrt_jax.config import TableColumns
from behrt_jax.data.sources.csv_reading import Piece
from behrt_jax.data.sources.text_columns import encode_text, finite, parse_numbers, parse_times
from behrt_jax.errors import InputError


def _is_text(kind: pa.DataType) -> bool:
    kind = kind.value_type if pt.is_dictionary(kind) else kind
    return pt.is_string(kind) or pt.is_large_string(kind) or pt.is_string_view(kind) or pt.is_null(kind)


def _is_time(kind: pa.DataType) -> bool:
    return pt.is_timestamp(kind) or pt.is_date(kind) or _is_text(kind)


def _is_id(kind: pa.DataType) -> bool:
    return pt.is_integer(kind) or (pt.is_decimal(kind) and kind.scale == 0) or _is_text(kind)


def _is_number(kind: pa.DataType) -> bool:
    return pt.is_integer(kind) or pt.is_floating(kind) or pt.is_decimal(kind) or pt.is_null(kind)


_MEANT = {
    "subject": (_is_id, "integers or text"),
    "visit": (_is_id, "integers or text"),
    "time": (_is_time, "timestamps, dates or ISO text"),
    "birth": (_is_time, "timestamps, dates or ISO text"),
    "code": (_is_id, "text or integers"),
    "value": (_is_number, "numbers"),
}


def check_types(path: Path, schema: pa.Schema, columns: TableColumns) -> None:
    """Refuse columns of a Parquet file whose type cannot be meant."""
    for option, name in vars(columns).items():
        fits, meant = _MEANT[option]
        if name is not None and not fits(schema.field(name).type):
            raise InputError(
                f"{path} has {schema.field(name).type} in the column {name}, which table.{option} names: "
                f"write it as {meant}."
            )


def read_text(piece: Piece, name: str) -> pa.Array:
    """Text, or integers as their digits; a dictionary stays one."""
    values = piece.column(name)
    return values if pt.is_dictionary(values.type) else values.cast(pa.string())


def read_ids(piece: Piece, name: str, ids_of: Callable[[pa.Array], np.ndarray]) -> pa.Array:
    """Ids as int64: integers exactly, distinct texts by ``ids_of``.

    Raises:
        InputError: an integer has more than 64 bits.
    """
    values = piece.column(name)
    if _is_text(values.type):
        coded = encode_text(read_text(piece, name))
        return pc.take(pa.array(ids_of(coded.dictionary)), coded.indices)
    try:
        return values.cast(pa.int64())
    except pa.ArrowInvalid as error:
        raise InputError(
            f"{piece.file} has ids in the column {name} that do not fit into a signed 64-bit integer: "
            "write them as text."
        ) from error


def read_times(piece: Piece, name: str) -> pa.Array:
    """Times in microseconds (UTC where there is a zone; finer parts cut off).

    Raises:
        InputError: a text is no time, or a time does not fit.
    """
    values = piece.column(name)
    if not _is_text(values.type):
        if pt.is_timestamp(values.type) and values.type.unit == "ns":
            return _from_nanoseconds(values)
        return _exact(piece, name, values)
    texts = piece.table.select([name]).cast(pa.schema([pa.field(name, pa.string())]))
    return parse_times(piece._replace(table=texts), name)


def _from_nanoseconds(values: pa.Array) -> pa.Array:
    """To microseconds, towards the past, also before 1970."""
    floor = pc.floor_temporal(values, unit="microsecond")
    return floor.cast(pa.timestamp("us", values.type.tz)).cast(pa.timestamp("us"))


def _exact(piece: Piece, name: str, values: pa.Array) -> pa.Array:
    try:
        if pt.is_timestamp(values.type):
            values = values.cast(pa.timestamp("us", values.type.tz))
        return values.cast(pa.timestamp("us"))
    except pa.ArrowInvalid as error:
        raise InputError(
            f"{piece.file} has times in the column {name} that no 64-bit count of microseconds holds: "
            "mend them."
        ) from error


def read_numbers(piece: Piece, name: str) -> tuple[pa.Array, pa.Array]:
    """Numbers as float32, and whether each is lost (null now) since float32 has no finite number for it.

    Raises:
        InputError: a text is no number.
    """
    values = piece.column(name)
    if not _is_text(values.type):
        numbers = finite(values.cast(pa.float64()))
        return numbers, pc.and_(values.is_valid(), numbers.is_null())
    numbers, wrong = parse_numbers(piece, name)
    for row in np.flatnonzero(wrong)[:1]:
        problem = "text that is no finite number: empty it, or leave the option table.value out."
        raise piece.error(name, int(row), problem)
    return numbers, pa.array(wrong)
