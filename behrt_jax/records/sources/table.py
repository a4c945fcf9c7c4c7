"""Events from one plain table, CSV or Parquet, whose columns are named by option.

Subject and visit ids may be integers, kept exactly, or text: a text that is a plain integer is that integer,
any other gets `hashed_id`. Codes stay as they are, integers as their digits, without blanks around them. A
null time is a static fact. Births come from a column, or as events with the code MEDS_BIRTH.
"""

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict
from functools import cached_property
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.types as pt

from behrt_jax.config.data import TableColumns
from behrt_jax.data.event_rules import matches
from behrt_jax.data.events import BIRTH_CODE, EVENT_SCHEMA, EventCounts
from behrt_jax.data.lives import birth_ranks, births_of_ranks
from behrt_jax.data.parquet import CHUNK_ROWS, whole_numbers
from behrt_jax.data.sorting import leads, sort_rows
from behrt_jax.errors import InputError
from behrt_jax.files import JsonObject, refuse_versions
from behrt_jax.records.sources import files as reading
from behrt_jax.records.sources.columns import (
    TextIds,
    cast_column,
    encode_text,
    extremes,
    find,
    finite,
    integer_or_hashed_ids,
    is_number,
    is_text,
    is_time,
    is_whole,
    parse_numbers,
    prefixed,
    text_ids,
)
from behrt_jax.records.sources.source import Source, count, events_table, one_code, valid

# pyarrow.compute makes its functions on import, where pyright does not see them.
# pyright: reportAttributeAccessIssue=false

UNIT_ROWS = 4 * CHUNK_ROWS
"""Rows of a Parquet file's unit, about: whole row groups, one at least."""
_SAMPLED_GROUPS = 32


def open_table(path: Path, columns: TableColumns) -> "TableSource":
    """Open a .csv, .csv.gz or .parquet file.

    Raises:
        InputError: the file is not there, not readable or of another kind, or has no column of a name
            given, or one of a type that cannot be meant.
    """
    path = Path(path)
    refuse_versions(path.parent)
    if not path.is_file():
        raise InputError(f"{path} is no file: give one .csv, .csv.gz or .parquet file.")
    parts, ranges = [reading.Part(path)], []
    if reading.is_csv(path):
        names, schema = reading.csv_columns(path), None
    elif path.suffix.lower() in (".parquet", ".pq"):
        with reading.open_parquet(path) as file:
            schema = file.schema_arrow
            names = schema.names
            parts = reading.cut_parts(path, file.metadata, UNIT_ROWS, beyond=True)
            ranges = reading.column_ranges(file, parts, columns.subject)
    else:
        raise InputError(f"{path} is neither .csv, .csv.gz nor .parquet: write it as one of them.")
    for option, name in named_columns(columns):
        if names.count(name) != 1:
            what = "has no column" if name not in names else "has more than one column"
            raise InputError(
                f"{path} {what} {name}, which table.{option} names: choose from {', '.join(names)}."
            )
    if schema is not None:
        check_types(path, schema, columns)
    return TableSource(path, columns, parts, ranges)


class TableSource(Source):
    """An opened table.

    A CSV file is one unit, a Parquet file one for each run of row groups with `UNIT_ROWS` rows or more.
    With a column of births there is one more unit before them, which reads each subject's birth; with columns
    of facts one more, which reads each subject's facts. They hold 24 bytes for each subject (and fact), and
    all units hold 16 for each of their subjects with an id in text.
    """

    name = "table"
    births_from = "a column by --table.birth, or rows of the code MEDS_BIRTH"

    def __init__(
        self, path: Path, columns: TableColumns, parts: list[reading.Part], ranges: list[tuple[int, int]]
    ) -> None:
        """Use `open_table`, which checks the columns."""
        self._path, self._columns, self._parts = path, columns, parts
        alone = columns.birth is None and not columns.static  # else some units have all subjects
        self._ranges = np.array(ranges, np.int64) if ranges and alone else None
        self.static_codes = tuple(f"{re.escape(fact_prefix(name))}//" for name in columns.static)

    def files(self) -> list[Path]:
        """The one file."""
        return [self._path]

    def options(self) -> JsonObject:
        """The names of the columns; those of facts, which came later, where there are any."""
        names = asdict(self._columns)
        if not self._columns.static:
            del names["static"]
        return {"table": names}

    def units(self) -> int:
        """Runs of row groups, with the units of births and of facts."""
        return self._first_rows + len(self._parts)

    def subject_ranges(self) -> np.ndarray | None:
        """As a Parquet file's footer has them, where subjects are integers and births events."""
        return self._ranges

    def sample_subjects(self) -> np.ndarray:
        """int64 ids of every 64th row (of all rows, if there are few), from up to 32 row groups."""
        groups = self._groups
        if len(groups) > _SAMPLED_GROUPS:
            groups = [groups[i] for i in np.linspace(0, len(groups) - 1, _SAMPLED_GROUPS).astype(int)]
        ids, sampled = TextIds(self._path, integer_or_hashed_ids), [np.empty(0, np.int64)]
        for piece in self._pieces([self._columns.subject], groups):
            step = 64 if len(piece.table) >= 4096 else 1
            piece = piece._replace(table=piece.table.take(np.arange(0, len(piece.table), step)))
            sampled.append(read_ids(piece, self._columns.subject, ids).drop_null().to_numpy())
        return np.concatenate(sampled)

    def read(self, unit: int, counts: EventCounts) -> Iterator[pa.Table]:
        """Events of one unit.

        Each row counts as one event, each subject with a birth in the births' column as one more, and so does
        each fact of a subject.
        Dropped: ``null subject``, ``null code``. Changed: ``unknown visit`` (a null one, where visits
        are given), ``value is not finite``, ``births differ`` (a subject with several in the births'
        column: see `birth_events`).

        Raises:
            InputError: the file cannot be read, or a value cannot be what its column means; the message
                names the column and the row.
        """
        before = [self._read_births] if self._columns.birth is not None else []
        before += [self._read_facts] if self._columns.static else []
        if unit < len(before):
            return before[unit](counts)
        return self._read_rows(self._parts[unit - self._first_rows], counts)

    @property
    def _first_rows(self) -> int:
        return (self._columns.birth is not None) + bool(self._columns.static)

    @property
    def _groups(self) -> list[int]:
        return [group for part in self._parts for group in part.row_groups]

    def _read_rows(self, part: reading.Part, counts: EventCounts) -> Iterator[pa.Table]:
        columns = self._columns
        names = [columns.subject, columns.time, columns.code, columns.value, columns.visit]
        ids = TextIds(self._path, integer_or_hashed_ids)
        for piece in self._pieces([name for name in names if name], part.row_groups):
            counts.read += piece.table.num_rows
            subject, code = read_ids(piece, columns.subject, ids), encode_text(read_text(piece, columns.code))
            time = cast_column(piece, columns.time, "time")
            there = pc.and_(subject.is_valid(), code.is_valid())
            counts.drop("null subject", subject.null_count)
            counts.drop("null code", there.false_count - subject.null_count)
            values = visits = None
            if columns.value:
                values, lost = read_numbers(piece, columns.value)
                counts.change("value is not finite", pc.and_(lost, there).true_count)
            if columns.visit:
                visits = read_ids(piece, columns.visit, integer_or_hashed_ids)
            events = events_table(subject, time, code, values, visits).filter(there)
            if columns.visit:
                counts.change("unknown visit", events["visit_id"].null_count)
            yield events

    def _read_births(self, counts: EventCounts) -> Iterator[pa.Table]:
        columns, ids = self._columns, TextIds(self._path, integer_or_hashed_ids)
        births = (
            (read_ids(piece, columns.subject, ids), cast_column(piece, columns.birth or "", "time"))
            for piece in self._pieces([columns.subject, columns.birth or ""], self._groups)
        )
        return birth_events(births, counts)

    def _read_facts(self, counts: EventCounts) -> Iterator[pa.Table]:
        static, ids = self._columns.static, TextIds(self._path, integer_or_hashed_ids)
        names: dict[str, int] = {}  # code -> its number
        found = [np.empty(0, np.int64), np.empty(0, np.int64)]  # subjects and their facts, none twice
        for piece in self._pieces([self._columns.subject, *static], self._groups):
            subject = read_ids(piece, self._columns.subject, ids)
            for column in static:
                codes = prefixed(fact_prefix(column), encode_text(read_text(piece, column)))
                there = pc.and_(subject.is_valid(), codes.is_valid())
                codes = codes.filter(there)
                number = [names.setdefault(name, len(names)) for name in codes.dictionary.to_pylist()]
                numbers = np.array(number, np.int64)[codes.indices.to_numpy()]
                further = subject.filter(there).to_numpy(), numbers
                found = sort_rows([np.concatenate(pair) for pair in zip(found, further, strict=True)])
                new = leads(found)
                found = [column[new] for column in found]
        counts.read += len(found[0])
        for start in range(0, len(found[0]), CHUNK_ROWS):
            subjects, numbers = (column[start : start + CHUNK_ROWS] for column in found)
            codes = pa.DictionaryArray.from_arrays(pa.array(numbers.astype(np.int32)), list(names))
            yield events_table(subjects, pa.nulls(len(subjects), pa.timestamp("us")), codes)

    def _pieces(self, names: list[str], groups: Sequence[int]) -> Iterator[reading.Piece]:
        """Columns, of some row groups where the file has such."""
        names = list(dict.fromkeys(names))
        if reading.is_csv(self._path):
            yield from reading.read_csv(self._path, names)
            return
        with reading.open_parquet(self._path, [self._columns.code]) as opened:
            sizes = reading.row_counts(opened.metadata)
            for group in groups:
                part = reading.Part(self._path, (group,), sum(sizes[:group]))
                yield from reading.read_part(opened, part, names, CHUNK_ROWS)


def fact_prefix(column: str) -> str:
    """What the code of a fact begins with that stands in a column: its name in capitals."""
    return column.upper()


def birth_events(pieces: Iterable[tuple[pa.Array, pa.Array]], counts: EventCounts) -> Iterator[pa.Table]:
    """One event for each subject with a birth, at the one to take where there are several.

    That is the earliest that is no placeholder, as for any source (`lives.births_of`). It holds 24 bytes for
    each subject. Pieces are subject ids (int64) and births (timestamps) of some rows, either may be null.
    Counted are the events, and as changed ``births differ``.
    """
    born, first, last = (np.empty(0, np.int64) for _ in range(3))  # [S]
    for subject, birth in pieces:
        there = pc.and_(subject.is_valid(), birth.is_valid())
        days = birth_ranks(birth.filter(there).cast(pa.int64()).to_numpy())
        every = np.concatenate([born, subject.filter(there).to_numpy()])
        born, first, last = extremes(every, np.concatenate([first, days]), np.concatenate([last, days]))
    counts.read += len(born)
    counts.change("births differ", count(first != last))
    for start in range(0, len(born), CHUNK_ROWS):
        part = slice(start, start + CHUNK_ROWS)
        time = pa.array(births_of_ranks(first[part])).cast(pa.timestamp("us"))
        yield events_table(born[part], time, one_code(BIRTH_CODE, len(time)))


_YEAR = re.compile(r"(\d{4})$")


class WithBirths(Source):
    """A source whose births are, in part or all, those of a table of births or of events of other codes.

    It holds 8 bytes for each subject of the table.
    """

    def __init__(self, source: Source, births: Path | None, codes: tuple[str, ...]) -> None:
        """Open the table ``births``, where there is one; ``codes`` are patterns of codes that are births.

        Raises:
            InputError: the table is not readable or lacks a column, or a pattern is no regular expression.
        """
        self._source, self._births, self._codes = source, None, codes
        self.name, self.births_from = source.name, source.births_from
        self.default_codes, self.static_codes = source.default_codes, source.static_codes
        matches([], codes, "--birth_codes")
        if births is not None:
            columns = TableColumns(time="birth", code="subject_id", birth="birth")
            try:
                self._births = open_table(births, columns)
            except InputError as error:
                needs = "--births needs a table with the columns subject_id and birth"
                raise InputError(f"{needs}: {error}") from None

    def files(self) -> list[Path]:
        """Those of the source, then the table of births."""
        return [*self._source.files(), *(self._births.files() if self._births else [])]

    def units(self) -> int:
        """Those of the source, then the table of births."""
        return self._source.units() + (self._births is not None)

    def options(self) -> JsonObject:
        """Those of the source, that there is a table of births, and the codes."""
        return {**self._source.options(), "births": self._births is not None, "birth_codes": self._codes}

    def subject_ranges(self) -> np.ndarray | None:
        """Those of the source; none with a table of births, whose subjects are those of other units."""
        return self._source.subject_ranges() if self._births is None else None

    def sample_subjects(self) -> np.ndarray:
        """Those of the source."""
        return self._source.sample_subjects()

    def splits(self) -> dict[str, np.ndarray]:
        """Those of the source."""
        return self._source.splits()

    def descriptions(self) -> dict[str, str]:
        """Those of the source."""
        return self._source.descriptions()

    def learned(self) -> JsonObject:
        """That of the source."""
        return self._source.learned()

    def learn(self, learned: JsonObject) -> None:
        """Let the source take it over."""
        self._source.learn(learned)

    def read(self, unit: int, counts: EventCounts) -> Iterator[pa.Table]:
        """Events of one unit, with the births changed.

        Dropped: ``birth, another given by --births``. Changed: ``code of births -> MEDS_BIRTH``. Births of
        subjects without any event come out too.
        """
        if unit == self._source.units() and self._births is not None:
            yield from self._births.read(0, counts)
            return
        for table in self._source.read(unit, counts):
            table = self._with_coded_births(table, counts) if self._codes else table
            if self._births is not None and table.num_rows:
                known = find(self._born, table["subject_id"].to_numpy()) >= 0
                born = pc.equal(table["code"], BIRTH_CODE).to_numpy() & known
                table = table.filter(pa.array(~born))
                counts.drop("birth, another given by --births", count(born))
            yield table

    @cached_property
    def _born(self) -> np.ndarray:
        """int64 ids of the table's subjects with a birth, ascending."""
        assert self._births is not None
        ids = [table["subject_id"].to_numpy() for table in self._births.read(0, EventCounts())]
        return np.concatenate([np.empty(0, np.int64), *ids])

    def _with_coded_births(self, table: pa.Table, counts: EventCounts) -> pa.Table:
        code = table["code"].combine_chunks()
        names = code.dictionary.to_pylist()
        of_birth = matches(names, self._codes, "--birth_codes")
        if not of_birth.any():
            return table
        at_end = [found[1] if (found := _YEAR.search(name)) else None for name in names]
        years = pc.coalesce(
            table["numeric_value"].combine_chunks().cast(pa.float64()),
            pc.take(pa.array(at_end, pa.string()).cast(pa.float64()), code.indices),
        )
        year = years.fill_null(np.nan).to_numpy(zero_copy_only=False)
        possible = (year >= 1) & (year <= 9999)
        first = (np.where(possible, year, 1970).astype(np.int64) - 1970).astype("datetime64[Y]")
        days = pa.array(first.astype("datetime64[us]"), mask=~possible)
        times = pc.coalesce(table["time"].combine_chunks(), days)
        births = pa.array(of_birth[code.indices.to_numpy()] & valid(times))
        counts.change(f"code of births -> {BIRTH_CODE}", births.true_count)
        codes = pc.if_else(births, BIRTH_CODE, code.cast(pa.string())).dictionary_encode()
        table = table.set_column(1, EVENT_SCHEMA.field("time"), pc.if_else(births, times, table["time"]))
        return table.set_column(2, EVENT_SCHEMA.field("code"), codes)


# The columns of a table, in whatever types they come.

_ID = ((is_number, is_text), "integers or text")
_TIME = ((is_time, is_text), "timestamps, dates or ISO text")
_MEANT = {
    "subject": _ID,
    "visit": _ID,
    "time": _TIME,
    "birth": _TIME,
    "code": ((is_whole, is_text), "text or integers"),
    "value": ((is_number, pt.is_null), "numbers"),
    "static": ((is_whole, is_text, pt.is_boolean), "text, integers or yes and no"),
}


def named_columns(columns: TableColumns) -> Iterator[tuple[str, str]]:
    """Option and name of each column that is given."""
    for option, given in vars(columns).items():
        for name in given if isinstance(given, tuple) else (given,):
            if name is not None:
                yield option, name


def check_types(path: Path, schema: pa.Schema, columns: TableColumns) -> None:
    """Refuse columns of a Parquet file whose type cannot be meant."""
    for option, name in named_columns(columns):
        fits, meant = _MEANT[option]
        if not any(fit(schema.field(name).type) for fit in fits):
            raise InputError(
                f"{path} has {schema.field(name).type} in the column {name}, which table.{option} names: "
                f"write it as {meant}."
            )


def read_text(piece: reading.Piece, name: str) -> pa.Array:
    """Text, or integers as their digits; a dictionary stays one."""
    values = piece.column(name)
    return values if pt.is_dictionary(values.type) else values.cast(pa.string())


def read_ids(piece: reading.Piece, name: str, ids_of: Callable[[pa.Array], np.ndarray]) -> pa.Array:
    """Ids as int64: whole numbers exactly, distinct texts by ``ids_of``.

    Raises:
        InputError: a number is not whole, has more than 64 bits, or more digits than its float holds.
    """
    values = piece.column(name)
    if is_text(values.type):
        return text_ids(values, ids_of)
    try:
        return whole_numbers(values)
    except pa.ArrowInvalid as error:
        raise InputError(
            f"{piece.file} has ids in the column {name} that do not fit into a signed 64-bit integer exactly "
            f"({values.type}): write them as integers or text."
        ) from error


def read_numbers(piece: reading.Piece, name: str) -> tuple[pa.Array, pa.Array]:
    """Numbers as float32, and whether each is lost (null now) since float32 has no finite number for it.

    Raises:
        InputError: a text is no number.
    """
    values = piece.column(name)
    if not is_text(values.type):
        numbers = finite(values.cast(pa.float64()))
        return numbers, pc.and_(values.is_valid(), numbers.is_null())
    numbers, wrong = parse_numbers(piece, name)
    for row in np.flatnonzero(wrong)[:1]:
        problem = "text that is no finite number: empty it, or leave the option table.value out."
        raise piece.error(name, int(row), problem)
    return numbers, pa.array(wrong)
