"""Values of a column turned exactly into the one type a reader expects, or an error that names the row."""

# pyarrow.compute makes its functions on import, where pyright does not see them.
# pyright: reportAttributeAccessIssue=false

from typing import Literal

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.types as pt

from behrt_jax.data.sources.csv_reading import Piece
from behrt_jax.data.sources.text_columns import first_wrong
from behrt_jax.errors import InputError

Kind = Literal["integer", "number", "text", "time"]
ARROW_TYPES: dict[Kind, pa.DataType] = {
    "integer": pa.int64(),
    "number": pa.float64(),
    "text": pa.string(),
    "time": pa.timestamp("us"),
}
_MEANT: dict[Kind, str] = {
    "integer": "whole numbers of at most 64 bits (int64)",
    "number": "numbers",
    "text": "text",
    "time": "dates or timestamps (2001-02-03, 2001-02-03 04:05:06 or 20010203)",
}


def cast_column(piece: Piece, column: str, kind: Kind) -> pa.Array:
    """Cast a column ``[rows]``, of any type, to `ARROW_TYPES[kind]`.

    Integers come through exactly, in text too: a column of floats is refused, since it has lost the last
    digits of long ids. Times with a zone become UTC; what is finer than a microsecond is cut off. Where a
    text stands for a number or a time, blank and ``NA`` (which R writes) are null; a text that is asked
    for as text may be ``NA``.

    Raises:
        InputError: the type is not fit, or a value is not; the message names file, column and row.
    """
    values = piece.column(column)
    if pt.is_dictionary(values.type):
        values = values.cast(values.type.value_type)
    if not _fits(values.type, kind):
        raise InputError(
            f"{piece.file} has {values.type} in the column {column}: write it as {_MEANT[kind]}."
        )
    try:
        return _cast(values, kind)
    except pa.ArrowInvalid:
        row = first_wrong(values, lambda some: _cast(some, kind))
        problem = f"a value that does not fit: write {_MEANT[kind]} or leave it empty."
        raise piece.error(column, row, problem) from None


def _fits(found: pa.DataType, kind: Kind) -> bool:
    whole = pt.is_integer(found) or (pt.is_decimal(found) and found.scale == 0)
    return (
        pt.is_null(found)
        or _is_text(found)
        or {
            "integer": whole,
            "number": whole or pt.is_floating(found) or pt.is_decimal(found),
            "text": whole or pt.is_floating(found) or pt.is_decimal(found),
            "time": pt.is_timestamp(found) or pt.is_date(found),
        }[kind]
    )


def _is_text(found: pa.DataType) -> bool:
    return pt.is_string(found) or pt.is_large_string(found) or found == pa.string_view()


def _cast(values: pa.Array, kind: Kind) -> pa.Array:
    target = ARROW_TYPES[kind]
    found = values.type
    if values.type == target or pt.is_null(found):
        return values.cast(target)
    if _is_text(found):
        return _cast_text(values.cast(pa.string()), kind)
    if pt.is_timestamp(found):
        return values.cast(target, safe=found.unit != "ns")
    if kind == "integer" and pt.is_decimal(found):
        return values.cast(pa.decimal128(38, 0)).cast(target)
    return values.cast(target)


def _cast_text(texts: pa.Array, kind: Kind) -> pa.Array:
    """Plain numbers and ISO times, as most files have them, at once; other spellings after a clean-up."""
    target = ARROW_TYPES[kind]
    try:
        return texts.cast(target)
    except pa.ArrowInvalid:
        texts = pc.utf8_trim_whitespace(texts)
        texts = pc.if_else(pc.is_in(texts, pa.array(["", "NA"])), None, texts)
        return _times_of(texts) if kind == "time" else texts.cast(target)


def _times_of(texts: pa.Array) -> pa.Array:
    """Times of texts without blanks around them, in any spelling that is understood."""
    texts = pc.replace_substring_regex(texts, r"^(\d{4})(\d{2})(\d{2})($|[ T])", r"\1-\2-\3\4")
    texts = pc.replace_substring_regex(texts, r"(\.\d{6})\d+", r"\1")
    zoned = pc.match_substring_regex(texts, r":.*(Z|[+-]\d{2}:?(\d{2})?)$").fill_null(False)
    plain = pc.if_else(zoned, None, texts).cast(pa.timestamp("us"))
    # A cast of the zone away keeps the instant: the time is UTC.
    return pc.coalesce(
        plain, pc.if_else(zoned, texts, None).cast(pa.timestamp("us", "UTC")).cast(pa.timestamp("us"))
    )
