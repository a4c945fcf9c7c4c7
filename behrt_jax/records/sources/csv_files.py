r"""CSV files in bounded pieces, every column as text; what the text means is parsed afterwards.

Files are UTF-8 (with or without a byte order mark), commas between columns, quotes where a value holds a
comma, a quote or a line break (RFC 4180), plain or compressed by gzip. Files separated by tabs, as OHDSI
hands out vocabularies, have no quoting: a quote is a character like any other. Empty values, ``NULL``,
``null`` and ``\N`` are null.
"""

import csv
import gzip
import io
import re
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Literal, NamedTuple, cast

import pyarrow as pa
import pyarrow.csv as pa_csv

from behrt_jax.data.parquet import CHUNK_ROWS
from behrt_jax.errors import InputError

# Quotes that a CSV file opens and never closes, which parsers take for one value up to the file's end.


class QuoteCounter(io.RawIOBase):
    """A stream that counts the quotes in what is read from it: where all are closed, they are even."""

    def __init__(self, stream: IO[bytes]) -> None:
        self._stream = stream
        self.quotes = 0

    def readable(self) -> bool:
        return True

    def read(self, size: int = -1) -> bytes:
        data = self._stream.read(size)
        self.quotes += data.count(b'"')
        return data

    def close(self) -> None:
        self._stream.close()
        super().close()


def open_quote(stream: IO[bytes]) -> int:
    """The data row (from 1) in which a file ends, if it ends within a quoted value; else 0.

    Reads the stream from its start and closes it.
    """
    row = 0
    with io.TextIOWrapper(stream, "utf-8-sig", errors="replace", newline="") as lines:
        try:
            for line in csv.reader(lines, strict=True):
                row += bool(line)
        except csv.Error as error:
            # A value beyond csv's limit has swallowed many rows.
            open_to_the_end = "unexpected end of data" in str(error) or "field limit" in str(error)
            return row if open_to_the_end else 0
    return 0


BLOCK_BYTES = 1 << 22
"""Bytes of a file that are parsed at once, unless a caller says otherwise; no row may be longer.

The reader holds up to about 32 blocks that it has read ahead.
"""
NULLS = ("", "NULL", "null", "\\N")
Separator = Literal[",", "\t"]


class Piece(NamedTuple):
    """Some consecutive rows of a file."""

    file: Path
    first_row: int
    """Number of the piece's first row in the file, counted from 1 (a header does not count)."""
    table: pa.Table

    def column(self, name: str) -> pa.Array:
        """One column, in one chunk."""
        return self.table[name].combine_chunks()

    def error(self, name: str, row: int, problem: str) -> InputError:
        """The error for the value of column ``name`` in row ``row`` (from 0) of this piece."""
        return InputError(f"{self.file} has in the column {name}, data row {self.first_row + row}, {problem}")


def is_csv(file: Path) -> bool:
    """Whether the name ends in .csv or .csv.gz, in any case."""
    return file.name.lower().endswith((".csv", ".csv.gz"))


def csv_separator(file: Path) -> Separator:
    """What separates the columns: a tab where the header has one and no comma, else a comma.

    Raises:
        InputError: the file cannot be read.
    """
    header = _header(file)
    return "\t" if b"\t" in header and b"," not in header else ","


def csv_columns(file: Path, separator: Separator = ",") -> list[str]:
    """Names of the columns, as the header has them.

    Raises:
        InputError: the file cannot be read, is empty, or its header is not UTF-8.
    """
    quoting = csv.QUOTE_MINIMAL if separator == "," else csv.QUOTE_NONE
    try:
        line = _header(file).decode("utf-8-sig")
        names = next(csv.reader([line], delimiter=separator, quoting=quoting))
    except UnicodeDecodeError as error:
        raise InputError(f"{file} has a header that is not UTF-8: save the file as UTF-8.") from error
    except csv.Error as error:
        raise InputError(f"{file} has a header that is no CSV: write the file again as CSV.") from error
    if not names:
        raise InputError(f"{file} is empty: give it a header with the names of its columns, or leave it out.")
    return names


def read_csv(
    file: Path, columns: Sequence[str], block_bytes: int = BLOCK_BYTES, *, separator: Separator = ","
) -> Iterator[Piece]:
    """Read some columns piece by piece, as strings with nulls.

    Args:
        file: .csv or .csv.gz.
        columns: names as the header has them, at least one; a piece's table has these, in this order.
        block_bytes: bytes of text in a piece, about; at most `CHUNK_ROWS` rows in any case.
        separator: a comma, for a file with quotes, or a tab, for one without.

    Raises:
        InputError: the file cannot be read; a row has too few or too many values; a value of these
            columns is not UTF-8; a quote is never closed; a name is not in the header, or twice. The message
            names the row.
    """
    header = csv_columns(file, separator)
    for name in columns:
        if header.count(name) != 1:
            raise InputError(f"{file} has {header.count(name)} columns called {name}: it must have one.")
    ragged: list[pa_csv.InvalidRow] = []

    def refuse(row: pa_csv.InvalidRow) -> str:
        ragged.append(row)
        return "error"

    quoted = separator == ","
    first_row = 1
    try:
        with (
            QuoteCounter(_open_bytes(file)) as stream,
            pa_csv.open_csv(
                stream,
                # With threads the parser does not know the numbers of the rows it refuses.
                read_options=pa_csv.ReadOptions(use_threads=False, block_size=block_bytes),
                parse_options=pa_csv.ParseOptions(
                    delimiter=separator,
                    quote_char='"' if quoted else False,
                    newlines_in_values=quoted,
                    invalid_row_handler=refuse,
                ),
                convert_options=pa_csv.ConvertOptions(
                    include_columns=list(columns),
                    column_types=dict.fromkeys(columns, pa.string()),
                    null_values=list(NULLS),
                    strings_can_be_null=True,
                ),
            ) as reader,
        ):
            for batch in reader:
                for start in range(0, batch.num_rows, CHUNK_ROWS):
                    table = pa.Table.from_batches([batch.slice(start, CHUNK_ROWS)])
                    yield Piece(file, first_row + start, table)
                first_row += batch.num_rows
            quotes = stream.quotes
        # The parser takes the end of the file for the end of a quoted value.
        if quoted and quotes % 2 and (row := open_quote(_open_bytes(file))):
            raise InputError(
                f"{file} opens a quote in data row {row} and never closes it, so all that follows would be "
                "one value: close it."
            )
    except (pa.ArrowException, EOFError, OSError, zlib.error) as error:
        if "Empty CSV file" in str(error):  # a header without a line end, and nothing after it
            return
        raise _explained(file, header, ragged, str(error), block_bytes) from error


def _header(file: Path) -> bytes:
    """The first line that is not blank."""
    try:
        with _open_bytes(file) as stream:
            line = b"\n"
            while line and not line.strip():
                line = stream.readline(BLOCK_BYTES)
        return b"".join(line.splitlines()[:1])
    except (EOFError, OSError, zlib.error) as error:
        raise _unreadable(file) from error


def _open_bytes(file: Path) -> IO[bytes]:
    return cast(IO[bytes], gzip.open(file)) if file.name.lower().endswith(".gz") else file.open("rb")


def _explained(
    file: Path, header: list[str], ragged: list[pa_csv.InvalidRow], message: str, block_bytes: int
) -> InputError:
    """The parser's error in our words: its own would quote the row."""
    if ragged:
        row = ragged[0]
        return InputError(
            f"{file} has {row.actual_columns} values in data row {(row.number or 0) - 1}, but its header "
            f"has {row.expected_columns} columns: mend the row (a comma within a value needs quotes)."
        )
    encoding = re.match(r"In CSV column #(\d+): Row #(\d+): .*invalid UTF8", message)
    if encoding:
        column, row = header[int(encoding[1])], int(encoding[2]) - 1
        return InputError(f"{file} is not UTF-8 in the column {column}, data row {row}: save it as UTF-8.")
    if "straddl" in message:
        return InputError(
            f"{file} has a row of more than {block_bytes >> 20} MiB: most likely a quote is opened and "
            "never closed; close it."
        )
    return _unreadable(file)


def _unreadable(file: Path) -> InputError:
    form = "gzip" if file.name.lower().endswith(".gz") else "CSV"
    return InputError(
        f"{file} is no readable {form} file (not there, cut short, or another format): mend it."
    )
