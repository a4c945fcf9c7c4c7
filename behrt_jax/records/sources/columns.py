"""Columns of text, or of the types that Parquet files have, turned into codes, ids, times and numbers."""

import hashlib
import re
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.types as pt

from behrt_jax.data.parquet import plain_times, whole_numbers
from behrt_jax.data.sorting import find_ids
from behrt_jax.errors import InputError
from behrt_jax.records.sources.files import Piece

# pyarrow.compute makes its functions on import, where pyright does not see them.
# pyright: reportAttributeAccessIssue=false

_INTEGER = r"^(0|-?[1-9][0-9]{0,17})$"
WHOLE_FLOAT = r"^(0|-?[1-9][0-9]{0,14})\.0+$"
"""A whole number as pandas writes it where its column has gaps, of so few digits that it is exact."""
_LONG_INTEGER = re.compile(r"-?[1-9][0-9]{18}")
_ZONE = r"(\d) ?(Z|z|UTC|GMT)$"
_OFFSET = r"(:\d\d(?:\.\d+)?) ?[+-](?:0\d|1[0-4])(?::?[0-5]\d)?$"
_NUMBER = r"^[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?$"
_MICROS = pa.timestamp("us")
_NO_TEXT = pa.scalar(None, pa.string())

# Codes, and ids that are text.


def encode_text(values: pa.Array) -> pa.DictionaryArray:
    """Text as a dictionary of its distinct values, without the blanks around them.

    What is blank altogether becomes null. The dictionary is of strings with int32 indices, holds no null
    and no value twice; some of its values may be unused.
    """
    coded = values if pa.types.is_dictionary(values.type) else values.cast(pa.string()).dictionary_encode()
    again = _trimmed(coded.dictionary.cast(pa.string())).dictionary_encode()
    indices = pc.take(again.indices, coded.indices)
    return pa.DictionaryArray.from_arrays(indices.cast(pa.int32()), again.dictionary)


def prefixed(prefix: str, texts: pa.DictionaryArray) -> pa.DictionaryArray:
    """``<prefix>//<text>`` of each text."""
    words = pc.binary_join_element_wise(pa.scalar(prefix), texts.dictionary, "//")
    return pa.DictionaryArray.from_arrays(texts.indices, words)


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


def text_ids(values: pa.Array, ids_of: Callable[[pa.Array], np.ndarray] = integer_or_hashed_ids) -> pa.Array:
    """Ids of a column of text, int64 with nulls; blanks around a text do not count, and 123.0 is 123."""
    coded = encode_text(values)
    words = pc.replace_substring_regex(coded.dictionary, WHOLE_FLOAT, r"\1")
    return pc.take(pa.array(ids_of(words)), coded.indices)


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
        """Ids of texts: int64 ``[texts]``.

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


def find(ids: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """Place of each wanted id in the ascending ``ids``, -1 where it is not there: int64 ``[wanted]``.

    For many ids in any order: they are searched in ascending order, which goes through memory once, several
    times faster than in random order.
    """
    order = np.argsort(wanted)
    place = np.empty(len(wanted), np.int64)
    place[order] = find_ids(ids, wanted[order])
    return place


def extremes(
    ids: np.ndarray, first: np.ndarray, last: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Distinct ids, ascending, with the smallest ``first`` and the largest ``last`` of each.

    All are int64, the arguments ``[rows]`` and what is returned ``[ids]``.
    """
    distinct, place = np.unique(ids, return_inverse=True)
    least = np.full(len(distinct), np.iinfo(np.int64).max)
    most = np.full(len(distinct), np.iinfo(np.int64).min)
    np.minimum.at(least, place, first)
    np.maximum.at(most, place, last)
    return distinct, least, most


# Numbers written as text.


def parse_numbers(piece: Piece, name: str) -> tuple[pa.Array, np.ndarray]:
    """Text to float32, null where it is no finite number, and where that is: bool ``[rows]``."""
    text = _trimmed(piece.column(name))
    matches = pc.fill_null(pc.match_substring_regex(text, _NUMBER), False)
    values = finite(pc.if_else(matches, text, _NO_TEXT).cast(pa.float64()))
    return values, text.is_valid().to_numpy(False) & values.is_null().to_numpy(False)


def finite(values: pa.Array) -> pa.Array:
    """Numbers as float32, null where they are not finite in it."""
    small = values.cast(pa.float32(), safe=False)
    return pc.if_else(pc.fill_null(pc.is_finite(small), False), small, pa.scalar(None, pa.float32()))


def _trimmed(text: pa.Array, nulls: tuple[str, ...] = ("",)) -> pa.Array:
    """Without the blanks around it; null where it is one of ``nulls`` then."""
    text = pc.utf8_trim_whitespace(text)
    return pc.if_else(pc.is_in(text, pa.array(nulls)), _NO_TEXT, text)


def _or_refuse(
    piece: Piece, name: str, parse: Callable[[pa.Array], pa.Array], values: pa.Array, problem: str
) -> pa.Array:
    """Values parsed by ``parse``, or the error that names the first row for which it raises."""
    try:
        return parse(values)
    except pa.ArrowInvalid:
        raise piece.error(name, _first_wrong(values, parse), problem) from None  # Arrow's quotes the value


def _first_wrong(values: pa.Array, parse: Callable[[pa.Array], pa.Array]) -> int:
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


# Values of any type turned exactly into the one that a reader expects.

Kind = Literal["integer", "number", "text", "time"]
ARROW_TYPES: dict[Kind, pa.DataType] = {
    "integer": pa.int64(),
    "number": pa.float64(),
    "text": pa.string(),
    "time": _MICROS,
}
_MEANT: dict[Kind, str] = {
    "integer": "whole numbers of at most 64 bits (int64)",
    "number": "numbers",
    "text": "text",
    "time": "dates or timestamps",
}


def is_text(kind: pa.DataType) -> bool:
    """A column is of text, or of nulls alone; its dictionary, where it has one."""
    kind = kind.value_type if pt.is_dictionary(kind) else kind
    return pt.is_string(kind) or pt.is_large_string(kind) or pt.is_string_view(kind) or pt.is_null(kind)


def is_whole(kind: pa.DataType) -> bool:
    """A column is of whole numbers by its type."""
    return pt.is_integer(kind) or (pt.is_decimal(kind) and kind.scale == 0)


def is_number(kind: pa.DataType) -> bool:
    """A column is of numbers."""
    return pt.is_integer(kind) or pt.is_floating(kind) or pt.is_decimal(kind)


def is_time(kind: pa.DataType) -> bool:
    """A column is of timestamps or dates."""
    return pt.is_timestamp(kind) or pt.is_date(kind)


_FITS: dict[Kind, Callable[[pa.DataType], bool]] = {
    "integer": is_number,
    "number": is_number,
    "text": is_number,
    "time": is_time,
}


def cast_column(piece: Piece, column: str, kind: Kind) -> pa.Array:
    """Cast a column ``[rows]``, of any type, to `ARROW_TYPES[kind]`.

    Integers come through exactly, in text too, and so do whole numbers in floating point (123.0, which pandas
    makes of a column with gaps) while it is exact, below 2^53. Times are those that clocks of their zone show
    (`parquet.plain_times`), also in text: ``2019-07-08 23:38:03-04`` is 23:38 of that day, so a file should
    keep to one clock. What is finer than a microsecond is cut off. Where a text stands for a number or a
    time, blank and ``NA`` (which R writes) are null; a text that is asked for as text may be ``NA``.

    Raises:
        InputError: the type is not fit, or a value is not; the message names file, column and row.
    """
    values = piece.column(column)
    if pt.is_dictionary(values.type):
        values = values.cast(values.type.value_type)
    if not (is_text(values.type) or _FITS[kind](values.type)):
        raise InputError(
            f"{piece.file} has {values.type} in the column {column}: write it as {_MEANT[kind]}."
        )
    problem = f"a value that does not fit: write {_MEANT[kind]} or leave it empty."
    if kind == "time":
        problem = (
            "a value that is no date or time: write dates like 2019-07-08, 20190708 or 2019-07-08T23:38:03Z."
        )
    return _or_refuse(piece, column, lambda some: _cast(some, kind), values, problem)


def _cast(values: pa.Array, kind: Kind) -> pa.Array:
    target, found = ARROW_TYPES[kind], values.type
    if found == target or pt.is_null(found):
        return values.cast(target)
    if is_text(found):
        return _cast_text(values.cast(pa.string()), kind)
    if kind == "time":
        return plain_times(values)
    return whole_numbers(values) if kind == "integer" else values.cast(target)


def _cast_text(texts: pa.Array, kind: Kind) -> pa.Array:
    """Plain numbers and ISO times, as most files have them, at once; other spellings after a clean-up."""
    if kind == "time":
        texts = pc.utf8_rtrim(texts, "Zz")  # parsing it takes ten times as long
    try:
        return texts.cast(ARROW_TYPES[kind])
    except pa.ArrowInvalid:
        texts = _trimmed(texts, ("", "NA"))
    if kind == "integer":
        texts = pc.replace_substring_regex(texts, WHOLE_FLOAT, r"\1")
    if kind == "time":
        clean_up = (
            (r"^(\d{4})(\d{2})(\d{2})($|[ T])", r"\1-\2-\3\4"),
            (_ZONE, r"\1"),
            (_OFFSET, r"\1"),
            (r"(\.\d{6})\d+$", r"\1"),
        )
        for pattern, plain in clean_up:
            texts = pc.replace_substring_regex(texts, pattern, plain)
    return texts.cast(ARROW_TYPES[kind])
