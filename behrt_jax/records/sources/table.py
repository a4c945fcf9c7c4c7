"""Events from one plain table, CSV or Parquet, whose columns are named by option.

Subject and visit ids may be integers, kept exactly, or text: a text that is a plain integer is that integer,
any other gets `hashed_id`. Codes stay as they are, integers as their digits, without blanks around them. A
null time is a static fact. Births come from a column, or as events with the code MEDS_BIRTH.
"""

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from behrt_jax.config import TableColumns
from behrt_jax.data.events import BIRTH_CODE, EVENT_SCHEMA, VISIT_FIELD, EventCounts
from behrt_jax.data.parquet import CHUNK_ROWS
from behrt_jax.errors import InputError
from behrt_jax.records.sources.csv_files import Piece, csv_columns, is_csv, read_csv
from behrt_jax.records.sources.parquet import column_range, cut_runs, open_parquet, read_groups
from behrt_jax.records.sources.table_columns import (
    TextIds,
    check_types,
    encode_text,
    integer_or_hashed_ids,
    read_ids,
    read_numbers,
    read_text,
    read_times,
)

# Births from a column of a plain table, which says them again in each of a subject's rows.

# pyarrow.compute makes its functions on import, where pyright does not see them.
# pyright: reportAttributeAccessIssue=false


_SCHEMA = pa.schema([*EVENT_SCHEMA, VISIT_FIELD])


def birth_events(pieces: Iterable[tuple[pa.Array, pa.Array]], counts: EventCounts) -> Iterator[pa.Table]:
    """One event for each subject with a birth, at the earliest where there are several.

    It holds 24 bytes for each subject.

    Args:
        pieces: subject ids (int64) and births (timestamps) of some rows, either may be null.
        counts: gets the events, and as changed ``births differ``.
    """
    born, first, last = (np.empty(0, np.int64) for _ in range(3))  # [S]
    for subject, birth in pieces:
        there = pc.and_(subject.is_valid(), birth.is_valid())
        days = birth.filter(there).cast(pa.int64()).to_numpy()
        every = np.concatenate([born, subject.filter(there).to_numpy()])
        born, place = np.unique(every, return_inverse=True)
        earliest = np.full(len(born), np.iinfo(np.int64).max)
        latest = np.full(len(born), np.iinfo(np.int64).min)
        np.minimum.at(earliest, place, np.concatenate([first, days]))
        np.maximum.at(latest, place, np.concatenate([last, days]))
        first, last = earliest, latest
    counts.read += len(born)
    counts.change("births differ", int(np.count_nonzero(first != last)))
    for start in range(0, len(born), CHUNK_ROWS):
        part = slice(start, start + CHUNK_ROWS)
        rows = len(born[part])
        code = pa.DictionaryArray.from_arrays(pa.array(np.zeros(rows, np.int32)), pa.array([BIRTH_CODE]))
        time = pa.array(first[part]).cast(pa.timestamp("us"))
        nulls = pa.nulls(rows, pa.float32()), pa.nulls(rows, pa.int64())
        yield pa.table([pa.array(born[part]), time, code, *nulls], schema=_SCHEMA)


# pyarrow.compute makes its functions on import, where pyright does not see them.
# pyright: reportAttributeAccessIssue=false


DEFAULT_CODES: tuple[str, ...] = ()
"""All codes."""
_SAMPLED_GROUPS = 32


def open_table(path: Path, columns: TableColumns) -> "TableSource":
    """Open a .csv, .csv.gz or .parquet file.

    Raises:
        InputError: the file is not there, not readable or of another kind, or has no column of a name
            given, or one of a type that cannot be meant.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(f"{path} is no file: give one .csv, .csv.gz or .parquet file.")
    runs: list[list[int]] = []
    ranges: list[tuple[int, int] | None] = []
    if is_csv(path):
        names, schema = csv_columns(path), None
    elif path.suffix.lower() in (".parquet", ".pq"):
        with open_parquet(path) as file:
            schema = file.schema_arrow
            names = schema.names
            runs = cut_runs(
                [file.metadata.row_group(i).num_rows for i in range(file.metadata.num_row_groups)]
            )
            ranges = [column_range(file.metadata, run, columns.subject) for run in runs]
    else:
        raise InputError(f"{path} is neither .csv, .csv.gz nor .parquet: write it as one of them.")
    for option, name in vars(columns).items():
        if name is not None and names.count(name) != 1:
            what = "has no column" if name not in names else "has more than one column"
            raise InputError(
                f"{path} {what} {name}, which table.{option} names: choose from {', '.join(names)}."
            )
    if schema is not None:
        check_types(path, schema, columns)
    return TableSource(path, columns, runs, ranges)


class TableSource:
    """An opened table. Implements `source.Source`.

    A CSV file is one unit, a Parquet file one for each run of row groups with `UNIT_ROWS` rows or more.
    With a column of births there is one more unit before them, which reads each subject's birth; it holds
    24 bytes for each subject, and all units hold 16 for each of their subjects with an id in text.
    """

    name = "table"

    def __init__(
        self,
        path: Path,
        columns: TableColumns,
        runs: list[list[int]],
        ranges: list[tuple[int, int] | None],
    ) -> None:
        self._path = path
        self._columns = columns
        known = bool(ranges) and None not in ranges and columns.birth is None
        self._ranges = np.array(ranges, np.int64) if known else None
        self._runs = runs  # row groups of each unit; none for CSV

    def files(self) -> list[Path]:
        """The one file."""
        return [self._path]

    def units(self) -> int:
        """Runs of row groups, with the unit of births."""
        return self._first_rows + (1 if is_csv(self._path) else len(self._runs))

    def subject_ranges(self) -> np.ndarray | None:
        """As a Parquet file's footer has them, where subjects are integers and births events."""
        return self._ranges

    def splits(self) -> dict[str, np.ndarray]:
        """None: a table has no splits."""
        return {}

    def descriptions(self) -> dict[str, str]:
        """None."""
        return {}

    def learned(self) -> dict[str, Any]:
        """Nothing: descriptions do not depend on reading."""
        return {}

    def learn(self, learned: Mapping[str, Any]) -> None:
        """Nothing."""

    def sample_subjects(self) -> np.ndarray:
        """int64 ids of every 64th row (of all rows, if there are few), from up to 32 row groups."""
        groups = [group for run in self._runs for group in run]
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

        Each row counts as one event, and each subject with a birth in the births' column as one more.
        Dropped: ``null subject``, ``null code``. Changed: ``unknown visit`` (a null one, where visits
        are given), ``value is not finite``, ``births differ`` (a subject with several in the births'
        column: the earliest is taken).

        Raises:
            InputError: the file cannot be read, or a value cannot be what its column means; the message
                names the column and the row.
        """
        if unit < self._first_rows:
            return self._read_births(counts)
        return self._read_rows(unit - self._first_rows, counts)

    @property
    def _first_rows(self) -> int:
        return int(self._columns.birth is not None)

    def _read_rows(self, run: int, counts: EventCounts) -> Iterator[pa.Table]:
        columns = self._columns
        names = [columns.subject, columns.time, columns.code, columns.value, columns.visit]
        ids = TextIds(self._path, integer_or_hashed_ids)
        for piece in self._pieces([name for name in names if name], self._runs[run] if self._runs else []):
            counts.read += piece.table.num_rows
            subject, code = read_ids(piece, columns.subject, ids), encode_text(read_text(piece, columns.code))
            time = read_times(piece, columns.time)
            there = pc.and_(subject.is_valid(), code.is_valid())
            counts.drop("null subject", subject.null_count)
            counts.drop("null code", there.false_count - subject.null_count)
            values, visits = pa.nulls(len(time), pa.float32()), pa.nulls(len(time), pa.int64())
            if columns.value:
                values, lost = read_numbers(piece, columns.value)
                counts.change("value is not finite", pc.and_(lost, there).true_count)
            if columns.visit:
                visits = read_ids(piece, columns.visit, integer_or_hashed_ids)
            events = pa.table([subject, time, code, values, visits], names=_SCHEMA.names).filter(there)
            if columns.visit:
                counts.change("unknown visit", events["visit_id"].null_count)
            yield events.cast(_SCHEMA)

    def _read_births(self, counts: EventCounts) -> Iterator[pa.Table]:
        columns, ids = self._columns, TextIds(self._path, integer_or_hashed_ids)
        groups = [group for run in self._runs for group in run]
        pieces = self._pieces([columns.subject, columns.birth or ""], groups)
        births = (
            (read_ids(piece, columns.subject, ids), read_times(piece, columns.birth or ""))
            for piece in pieces
        )
        return birth_events(births, counts)

    def _pieces(self, names: list[str], groups: list[int]) -> Iterator[Piece]:
        names = list(dict.fromkeys(names))
        if is_csv(self._path):
            yield from read_csv(self._path, names)
            return
        yield from read_groups(self._path, groups, names, self._columns.code)
