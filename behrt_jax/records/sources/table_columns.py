"""What the columns of a table may be, in CSV (text) and in Parquet (types)."""

import hashlib
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.types as pt

from behrt_jax.config import TableColumns
from behrt_jax.data.sorting import find_ids
from behrt_jax.errors import InputError
from behrt_jax.records.sources.csv_files import Piece

# What text columns mean: codes, ids, times and numbers, each parsed by one stated rule.

# pyarrow.compute makes its functions on import, where pyright does not see them.
# pyright: reportAttributeAccessIssue=false


_INTEGER = r"^(0|-?[1-9][0-9]{0,17})$"
_LONG_INTEGER = re.compile(r"-?[1-9][0-9]{18}")
_ZONED = r":\d\d(\.\d+)?[+-]\d\d(:?\d\d)?$"
_NUMBER = r"^[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?$"
_MICROS = pa.timestamp("us")


def encode_text(values: pa.Array) -> pa.DictionaryArray:
    """Text as a dictionary of its distinct values, without the blanks around them.

    What is blank altogether becomes null. The dictionary is of strings with int32 indices, holds no null
    and no value twice; some of its values may be unused.
    """
    coded = values if pa.types.is_dictionary(values.type) else values.cast(pa.string()).dictionary_encode()
    words = coded.dictionary.cast(pa.string())
    trimmed = pc.utf8_trim_whitespace(words)
    trimmed = pc.if_else(pc.equal(trimmed, ""), pa.scalar(None, pa.string()), trimmed)
    again = trimmed.dictionary_encode()
    indices = pc.take(again.indices, coded.indices)
    return pa.DictionaryArray.from_arrays(indices.cast(pa.int32()), again.dictionary)


def hashed_id(text: str) -> int:
    """A signed 64-bit id for a text: the first eight bytes, big-endian, of the SHA-256 of its UTF-8.

    It depends on nothing but the text, so ids stay as they are when a data set grows. Two of n texts share
    one with a chance of about n² / 2^65 (one in 370,000 for ten million).
    """
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big", signed=True)


def hashed_ids(texts: pa.Array) -> np.ndarray:
    """`hashed_id` of each text: int64 ``[texts]``."""
    starts = [hashlib.sha256(text.encode()).digest()[:8] for text in texts.to_pylist()]
    return np.frombuffer(b"".join(starts), ">i8").astype(np.int64)


def integer_or_hashed_ids(texts: pa.Array) -> np.ndarray:
    """Ids of texts, int64 ``[texts]``: the integer itself, where a text is one of 64 bits in its plain form
    (no sign +, no leading zero), else `hashed_id`.
    """
    plain = pc.match_substring_regex(texts, _INTEGER)  # 18 digits always fit
    ids = pc.if_else(plain, texts, "0").cast(pa.int64()).to_numpy().copy()
    for place in np.flatnonzero(~plain.to_numpy(zero_copy_only=False)):
        text = texts[place].as_py()
        fits = _LONG_INTEGER.fullmatch(text) and -(2**63) <= int(text) < 2**63
        ids[place] = int(text) if fits else hashed_id(text)
    return ids


class TextIds:
    """Ids of texts, with a check that no two texts get the same.

    It holds 16 bytes for each.
    """

    def __init__(self, file: Path, ids_of: Callable[[pa.Array], np.ndarray] = hashed_ids) -> None:
        self._file = file
        self._ids_of = ids_of
        self.ids = np.empty(0, np.int64)
        """Every id given so far, ascending."""
        self._checks = np.empty(0, np.int64)

    def __call__(self, texts: pa.Array) -> np.ndarray:
        """Ids of distinct texts: int64 ``[texts]``.

        Raises:
            InputError: two texts, of this call or of any before, have one id.
        """
        ids = self._ids_of(texts)  # [T]
        # Another hash of the same text: equal ids with unequal checks are two texts.
        checks = np.array([hash(text) for text in texts.to_pylist()], dtype=np.int64)  # [T]
        new, first, place = np.unique(ids, return_index=True, return_inverse=True)
        clash = (checks[first][place] != checks).any()
        known = find_ids(self.ids, new)
        old = known >= 0
        clash = clash or (self._checks[known[old]] != checks[first[old]]).any()
        if clash:
            raise InputError(
                f"{self._file} has two subject ids in text that get the same 64-bit number: number its "
                "subjects with integers of your own."
            )
        at = np.searchsorted(self.ids, new[~old])
        self._checks = np.insert(self._checks, at, checks[first[~old]])
        self.ids = np.insert(self.ids, at, new[~old])
        return ids


def parse_times(piece: Piece, name: str) -> pa.Array:
    """ISO 8601 text to timestamps in microseconds, null where it is null or blank.

    A date alone is its midnight. Times with a zone (Z, UTC or +hh:mm) are turned into UTC; times without
    one are taken as they are, so a file should keep to one clock. Finer parts than microseconds are cut
    off.

    Raises:
        InputError: a value is no such text; the message names file, column and row.
    """
    text = piece.column(name)
    try:
        return _times(text)
    except pa.ArrowInvalid:
        text = _trimmed(text)
        text = pc.replace_substring_regex(text, r" ?UTC$", "Z")
        text = pc.replace_substring_regex(text, r"(\.\d{6})\d+", r"\1")
    try:
        return _times(text)
    except pa.ArrowInvalid as error:
        row = first_wrong(text, _times)
        problem = "text that is no date or time: write it like 2019-07-08 or 2019-07-08T23:38:03Z."
        raise piece.error(name, row, problem) from error


def parse_numbers(piece: Piece, name: str) -> tuple[pa.Array, np.ndarray]:
    """Text to float32, null where it is no finite number, and where that is: bool ``[rows]``."""
    text = _trimmed(piece.column(name))
    matches = pc.fill_null(pc.match_substring_regex(text, _NUMBER), False)
    values = pc.if_else(matches, text, pa.scalar(None, pa.string())).cast(pa.float64())
    values = finite(values)
    return values, text.is_valid().to_numpy(False) & values.is_null().to_numpy(False)


def finite(values: pa.Array) -> pa.Array:
    """Numbers as float32, null where they are not finite in it."""
    small = values.cast(pa.float32(), safe=False)
    return pc.if_else(pc.fill_null(pc.is_finite(small), False), small, pa.scalar(None, pa.float32()))


def _trimmed(text: pa.Array) -> pa.Array:
    text = pc.utf8_trim_whitespace(text)
    return pc.if_else(pc.equal(text, ""), pa.scalar(None, pa.string()), text)


def _times(text: pa.Array) -> pa.Array:
    # Z says what is assumed anyway; parsing it takes ten times as long.
    text = pc.utf8_rtrim(text, "Zz")
    try:
        return text.cast(_MICROS)
    except pa.ArrowInvalid:
        null = pa.scalar(None, pa.string())
    zoned = pc.match_substring_regex(text, _ZONED)
    zoned_times = pc.if_else(zoned, text, null).cast(pa.timestamp("us", "UTC")).cast(_MICROS)
    return pc.coalesce(zoned_times, pc.if_else(zoned, null, text).cast(_MICROS))


def first_wrong(values: pa.Array, parse: Callable[[pa.Array], pa.Array]) -> int:
    """Place of the first value for which ``parse`` raises pyarrow.ArrowInvalid, by halving; one must be."""
    low, high = 0, len(values)  # everything before low parses; something before high does not
    while high - low > 1:
        middle = (low + high) // 2
        try:
            parse(values.slice(low, middle - low))
            low = middle
        except pa.ArrowInvalid:
            high = middle
    return low


# pyarrow.compute makes its functions on import, where pyright does not see them.
# pyright: reportAttributeAccessIssue=false


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
