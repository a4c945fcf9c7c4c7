r"""CSV and Parquet files read in bounded pieces.

CSV files are UTF-8 (with or without a byte order mark), commas between columns, quotes where a value holds a
comma, a quote or a line break (RFC 4180), plain or compressed by gzip. Files separated by tabs, as OHDSI
hands out vocabularies, have no quoting: a quote is a character like any other. Empty values, ``NULL``,
``null`` and ``\N`` are null. Every column is text; what it means is parsed afterwards.
"""

import csv
import gzip
import io
import re
import zlib
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Literal, NamedTuple, cast

import pyarrow as pa
import pyarrow.csv as pa_csv
import pyarrow.parquet as pq

from behrt_jax.data.parquet import CHUNK_ROWS, check_rows, open_whole, readable, sound
from behrt_jax.errors import InputError

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
        value = self.table[name][row].as_py() if name in self.table.column_names else None
        if isinstance(value, str) and value.strip().lower() == name.strip().lower():
            problem = "the column's own name: the header comes again as a row of data; remove that row."
        return InputError(f"{self.file} has in the column {name}, data row {self.first_row + row}, {problem}")


def refuse_absent(option: str, folder: Path, named: Sequence[str], there: Collection[str]) -> None:
    """Refuse an option that names a table, in any case, which the folder does not hold."""
    absent = [name for name in named if name.lower() not in there]
    if absent:
        raise InputError(
            f"--{option} names {', '.join(absent)}, which is no table of {folder} that can be left "
            "out: correct the name."
        )


_OTHER_FORMS = re.compile(r".*\.(tsv|psv|xlsx?|zip|bz2|xz|zst|7z|parquet|pq|orc|avro|feather|arrow|jsonl?)")


def refuse_other_form(file: Path, forms: Sequence[str], skip: str) -> None:
    """Refuse the file of a table in a form of data that is not read; what is no data (notes, ...) passes.

    ``skip`` is the option that leaves it out.
    """
    if _OTHER_FORMS.fullmatch(file.name.lower()):
        raise InputError(
            f"{file} is not read: write it as {' or '.join(forms)}, move it away, or leave the table out by "
            f"--{skip}."
        )


# CSV.


def is_csv(file: Path) -> bool:
    """The name ends in .csv or .csv.gz, in any case."""
    return file.name.lower().endswith((".csv", ".csv.gz"))


def csv_separator(file: Path) -> Separator:
    """The separator of the columns: a tab where the header has one and no comma, else a comma.

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
    if "\0" in line:
        raise InputError(f"{file} is no text in UTF-8 (another encoding or format): save it as CSV in UTF-8.")
    if len(names) == 1 and (other := next((sign for sign in ";\t|" if sign in names[0]), None)):
        named = "tabs" if other == "\t" else other
        raise InputError(
            f"{file} has one column, whose name holds {named}: separate the columns by commas, and write "
            "numbers with a decimal point."
        )
    return names


def is_empty(file: Path) -> bool:
    """A file holds no line, or as Parquet no row: writers leave such parts of a table beside full ones."""
    if is_csv(file):
        return not _header(file)
    with open_parquet(file) as opened:
        return not opened.metadata.num_rows


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
        raise _explained(file, header, str(error), block_bytes) from error


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


def _explained(file: Path, header: list[str], message: str, block_bytes: int) -> InputError:
    """The parser's error in our words: its own would quote the row."""
    if ragged := re.search(r"Row #(\d+): Expected (\d+) columns, got (\d+)", message):
        row, expected, found = map(int, ragged.groups())
        return InputError(
            f"{file} has {found} values in data row {row - 1}, but its header has {expected} columns: mend "
            "the row (a comma within a value needs quotes)."
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


# Parquet, in parts of whole row groups that are read by themselves.

Damage = Callable[[Path, int | None], str]
"""Says what to do about a damaged file, given the rows read so far; None where it cannot even be opened."""


@dataclass(frozen=True)
class Part:
    """A piece of work that can be read by itself: a whole file, or some row groups of a Parquet file."""

    file: Path
    row_groups: tuple[int, ...] = ()
    """None for the whole file, of whatever format."""
    first_row: int = 0
    """Rows of the file before this part."""
    rows: int = 0
    """Of the row groups."""


def cut_parts(file: Path, metadata: pq.FileMetaData, rows: int, beyond: bool = False) -> list[Part]:
    """Cut a file into runs of row groups, each of at most ``rows`` rows, or of one group where it has more.

    With ``beyond`` a run is full once it has that many rows, so that its last group may pass them.
    """
    runs: list[list[int]] = []
    sizes, held = row_counts(metadata), 0
    for group, size in enumerate(sizes):
        if not runs or (held >= rows if beyond else held + size > rows):
            runs.append([])
            held = 0
        runs[-1].append(group)
        held += size
    return [Part(file, tuple(run), sum(sizes[: run[0]]), sum(sizes[group] for group in run)) for run in runs]


def row_counts(metadata: pq.FileMetaData) -> list[int]:
    """Rows of each row group."""
    return [metadata.row_group(group).num_rows for group in range(metadata.num_row_groups)]


def column_ranges(opened: pq.ParquetFile, parts: Sequence[Part], column: str) -> list[tuple[int, int]]:
    """Smallest and largest int64 of a column in each part; none where the footer does not tell all.

    Raises:
        InputError: the file is damaged.
    """
    metadata, ranges = opened.metadata, []
    paths = [metadata.schema.column(place).path for place in range(metadata.num_columns)]
    for part in parts if column in paths else ():
        found = []
        for group in part.row_groups:
            with readable(part.file):
                # A damaged footer is an error where a column is read, but where it is asked for the column
                # by itself it ends the process.
                next(opened.iter_batches(1, [group], [column]), None)
                statistics = metadata.row_group(group).column(paths.index(column)).statistics
                if statistics is None or not statistics.has_min_max or not isinstance(statistics.min, int):
                    return []
                found += [statistics.min, statistics.max]
        ranges.append((min(found), max(found)))
    return ranges if all(most < 1 << 63 for _, most in ranges) else []  # reading refuses larger ids


def open_parquet(file: Path, texts: list[str] | None = None, damage: Damage | None = None) -> pq.ParquetFile:
    """Open a file; the columns ``texts`` come as dictionaries.

    Raises:
        InputError: cut short, or no Parquet file; ``damage`` makes another message of it.
    """
    with readable(file, damage and damage(file, None)):
        # Pages come one by one, so that a file of one huge row group needs little memory.
        return open_whole(file, read_dictionary=texts, buffer_size=1 << 20, pre_buffer=False)


def read_part(
    opened: pq.ParquetFile, part: Part, columns: list[str], rows: int, damage: Damage | None = None
) -> Iterator[Piece]:
    """Columns of a part in pieces of at most ``rows`` rows.

    Raises:
        InputError: the file is damaged, or a text is not UTF-8.
    """
    row, batches = part.first_row, opened.iter_batches(rows, part.row_groups or None, columns)
    while True:
        with readable(part.file, damage and damage(part.file, row)):
            batch = next(batches, None)
            if batch is None:
                groups = part.row_groups or range(opened.metadata.num_row_groups)
                counts = row_counts(opened.metadata)
                check_rows(row - part.first_row, sum(counts[group] for group in groups))
                return
            table = sound(part.file, pa.Table.from_batches([batch]), row + 1)
        yield Piece(part.file, row + 1, table)
        row += batch.num_rows
