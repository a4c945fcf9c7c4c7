"""Tables of a folder, found and streamed: CSV, CSV.gz and Parquet, file and column names in any case."""

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pyarrow.types as pt

from behrt_jax.data.parquet import CHUNK_ROWS
from behrt_jax.errors import InputError
from behrt_jax.records.sources.csv_files import Piece, csv_columns, csv_separator, read_csv
from behrt_jax.records.sources.table_columns import first_wrong

# Values of a column turned exactly into the one type a reader expects, or an error that names the row.

# pyarrow.compute makes its functions on import, where pyright does not see them.
# pyright: reportAttributeAccessIssue=false


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


PART_ROWS = 1 << 23
"""A Parquet file with more rows is cut, between row groups, into parts of about so many."""

Form = Literal[".csv", ".csv.gz", ".parquet"]
_FORMS: tuple[Form, ...] = (".csv.gz", ".csv", ".parquet")
_PART_OF = re.compile(r"(.+?)[_.-](?:part[_.-]?)?\d.*")
_BATCH_ROWS = min(CHUNK_ROWS, 1 << 18)


@dataclass(frozen=True)
class Part:
    """What can be read by itself: a whole file, or some row groups of a Parquet file."""

    file: Path
    row_groups: tuple[int, ...] | None = None
    """None for the whole file."""
    first_row: int = 0
    """Rows of the file before this part."""


def find_tables(folder: Path, wanted: Callable[[str], bool]) -> dict[str, list[Path]]:
    """Lower-case table name -> its files, sorted.

    A table is one file (``person.csv``, ``PERSON.parquet``), files of parts (``person_0001.csv.gz``,
    ``person-part-0.parquet``) or a folder of parts (``person/*.parquet``, at any depth).

    Args:
        folder: where the tables are.
        wanted: whether a table of that lower-case name is to be looked for.

    Raises:
        InputError: not a folder, or a table is there twice (in two forms, or whole and in parts).
    """
    if not folder.is_dir():
        raise InputError(f"{folder} is not a folder: set input to the folder that holds the tables.")
    found: dict[str, dict[str, list[Path]]] = {}
    for entry in sorted(folder.iterdir()):
        if entry.is_dir():
            if wanted(name := entry.name.lower()):
                for file in sorted(entry.rglob("*")):
                    hidden = any(part[0] in "._" for part in file.relative_to(entry).parts)
                    if file.is_file() and not hidden and (form := _form(file)):
                        found.setdefault(name, {}).setdefault(f"{entry.name}/*{form}", []).append(file)
        elif form := _form(entry):
            stem = entry.name.lower().removesuffix(form)
            part = _PART_OF.fullmatch(stem)
            if wanted(stem):
                found.setdefault(stem, {}).setdefault(entry.name, []).append(entry)
            elif part and wanted(part[1]):
                found.setdefault(part[1], {}).setdefault(f"{part[1]}_*{form}", []).append(entry)
    for name, ways in found.items():
        if len(ways) > 1:
            raise InputError(
                f"{folder} holds the table {name} more than once ({', '.join(sorted(ways))}): keep one."
            )
    return {name: files for name, ways in found.items() for files in ways.values()}


def _form(file: Path) -> Form | None:
    return next((form for form in _FORMS if file.name.lower().endswith(form)), None)


def parts_of(file: Path) -> list[Part]:
    """The parts of a file: one, or for a large Parquet file runs of row groups of about `PART_ROWS` rows."""
    if _form(file) != ".parquet":
        return [Part(file)]
    with _opened(file) as opened:
        sizes = [opened.metadata.row_group(i).num_rows for i in range(opened.num_row_groups)]
    parts, run, before, rows = [], [], 0, 0
    for group, size in enumerate(sizes):
        if run and rows + size > PART_ROWS:
            parts.append(Part(file, tuple(run), before))
            run, before, rows = [], before + rows, 0
        run.append(group)
        rows += size
    return [*parts, Part(file, tuple(run), before)] if parts else [Part(file)]


def columns_of(file: Path) -> dict[str, str]:
    """Lower-case column name -> the name in the file.

    Raises:
        InputError: the file cannot be read, or has two columns of one name.
    """
    if _form(file) == ".parquet":
        with _opened(file) as opened:
            names = opened.schema_arrow.names
    else:
        names = csv_columns(file, csv_separator(file))
    columns: dict[str, str] = {}
    for name in names:
        if columns.setdefault(name.strip().lower(), name) != name or names.count(name) > 1:
            raise InputError(f"{file} has two columns called {name.strip().lower()}: rename or drop one.")
    return columns


def read_chunks(part: Part, kinds: Mapping[str, Kind]) -> Iterator[pa.RecordBatch]:
    """Read some columns in batches of at most `CHUNK_ROWS` rows.

    Args:
        part: what to read.
        kinds: lower-case column name -> what it holds: `integer` comes as int64, exactly; `number` as
            float64; `text` as string; `time` (timestamps, dates, ISO text or YYYYMMDD) as timestamp in
            microseconds without a zone. A column that the file has not is all null.

    Raises:
        InputError: the file is cut short, a row has too many or too few fields, text is not UTF-8, or a
            value is not what its column should hold; the message names file, column and row.
    """
    columns = columns_of(part.file)
    present = {name: columns[name] for name in kinds if name in columns}
    # Without any of the columns, some column tells how many rows there are.
    names = list(present.values()) or list(columns.values())[:1]
    if _form(part.file) == ".parquet":
        pieces = _read_parquet(part, names)
    else:
        pieces = read_csv(part.file, names, separator=csv_separator(part.file))
    for piece in pieces:
        arrays = [
            cast_column(piece, present[name], kind)
            if name in present
            else pa.nulls(piece.table.num_rows, ARROW_TYPES[kind])
            for name, kind in kinds.items()
        ]
        yield pa.RecordBatch.from_arrays(arrays, names=list(kinds))


def _opened(file: Path) -> pq.ParquetFile:
    try:
        # Pages come one by one, so that a file of one huge row group needs little memory.
        return pq.ParquetFile(file, buffer_size=1 << 20, pre_buffer=False)
    except (pa.ArrowException, OSError) as error:
        raise _unreadable(file) from error


def _read_parquet(part: Part, columns: list[str]) -> Iterator[Piece]:
    rows = part.first_row
    with _opened(part.file) as opened:
        try:
            for batch in opened.iter_batches(_BATCH_ROWS, part.row_groups, columns):
                yield Piece(part.file, rows + 1, pa.Table.from_batches([batch]))
                rows += batch.num_rows
        except (pa.ArrowException, OSError) as error:
            raise _unreadable(part.file, rows) from error


def _unreadable(file: Path, rows: int | None = None) -> InputError:
    where = "" if rows is None else f" after row {rows}"
    return InputError(
        f"{file} is no readable Parquet file{where} (cut short, or another format): write or copy it again."
    )
