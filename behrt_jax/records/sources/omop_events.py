"""Rows of OMOP tables turned into events: the rules that drop or change one, each counted."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from behrt_jax.data.events import BIRTH_CODE, DAY, EVENT_SCHEMA, VISIT_FIELD, EventCounts
from behrt_jax.errors import InputError
from behrt_jax.records.sources.cdm import Kind, Part, read_chunks
from behrt_jax.records.sources.omop_tables import (
    BIRTH_KINDS,
    PERSON_FACTS,
    VISITS,
    ConceptColumns,
    Concepts,
    EventTable,
    RowConcepts,
    encode_codes,
    integers,
    places,
    row_concepts,
)

# Persons and visits of an OMOP data set: who there is, born when, and which visits began when.

# pyarrow.compute makes its functions on import, where pyright does not see them.
# pyright: reportAttributeAccessIssue=false


NO_TIME = np.iinfo(np.int64).min
"""Stands for a null time."""


@dataclass(frozen=True, eq=False)
class Births:
    """Births of the persons of a batch; all ``[rows]``."""

    times: np.ndarray  # int64 microseconds since 1970, NO_TIME where unknown
    filled: np.ndarray  # bool: month or day was filled in


@dataclass(frozen=True, eq=False)
class Persons:
    """All persons, ids ascending; both ``[persons]``."""

    ids: np.ndarray  # int64
    births: np.ndarray  # int64 microseconds since 1970, NO_TIME where unknown

    def births_of(self, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Birth of each id (NO_TIME where unknown), and whether there is such a person."""
        if not len(self.ids):
            return np.full(len(ids), NO_TIME), np.zeros(len(ids), bool)
        place, found = places(self.ids, ids)
        return np.where(found, self.births[place], NO_TIME), found


@dataclass(frozen=True, eq=False)
class Visits:
    """All visits, ids ascending; all ``[visits]``."""

    ids: np.ndarray  # int64
    persons: np.ndarray  # int64
    starts: np.ndarray  # int64 microseconds since 1970, NO_TIME where unknown

    def starts_of(self, ids: np.ndarray, persons: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Start of each visit (NO_TIME where unknown), and whether it is there and that person's."""
        if not len(self.ids):
            return np.full(len(ids), NO_TIME), np.zeros(len(ids), bool)
        place, found = places(self.ids, ids)
        found &= self.persons[place] == persons
        return np.where(found, self.starts[place], NO_TIME), found


def times_of(batch: pa.RecordBatch, datetime: str | None, date: str) -> np.ndarray:
    """The datetime where there is one, else the date: int64 microseconds ``[rows]``, or NO_TIME."""
    times = (
        batch.column(date) if datetime is None else pc.coalesce(batch.column(datetime), batch.column(date))
    )
    return times.cast(pa.int64()).fill_null(NO_TIME).to_numpy(zero_copy_only=False)


def births_of(batch: pa.RecordBatch) -> Births:
    """Birth of each row: birth_datetime, else midnight of year, month and day of birth.

    A month that is missing (or no month) becomes January, a day that is missing (or not in that month)
    the 1st; without the month the day is not known either.
    """
    exact = batch.column("birth_datetime").cast(pa.int64()).fill_null(NO_TIME).to_numpy(zero_copy_only=False)
    year, month, day = (integers(batch, f"{part}_of_birth") for part in ("year", "month", "day"))
    known = (year >= 1) & (year <= 9999)
    month_given = (month >= 1) & (month <= 12)
    months = (np.where(known, year, 1970) - 1970) * 12 + np.where(month_given, month, 1) - 1
    first = months.astype("datetime64[M]").astype("datetime64[D]")
    length = ((months + 1).astype("datetime64[M]").astype("datetime64[D]") - first).astype(np.int64)
    day_given = month_given & (day >= 1) & (day <= length)
    date = (first.astype(np.int64) + np.where(day_given, day, 1) - 1) * DAY
    times = np.where(exact != NO_TIME, exact, np.where(known, date, NO_TIME))
    return Births(times, (exact == NO_TIME) & known & ~day_given)


def load_persons(parts: Iterable[Part]) -> Persons:
    """Read the ids and births of all persons.

    Raises:
        InputError: a row has no person_id.
    """
    ids, births = [np.empty(0, np.int64)], [np.empty(0, np.int64)]
    for part in parts:
        rows = 0
        for batch in read_chunks(part, BIRTH_KINDS):
            column = batch.column("person_id")
            if column.null_count:
                row = rows + int(np.argmax(column.is_null().to_numpy(zero_copy_only=False))) + 1
                raise InputError(
                    f"{part.file} has no person_id in row {row} (counted from 1 after any header): fill "
                    "it in or leave the row out."
                )
            ids.append(integers(batch, "person_id"))
            births.append(births_of(batch).times)
            rows += batch.num_rows
    distinct, first = np.unique(np.concatenate(ids), return_index=True)
    return Persons(distinct, np.concatenate(births)[first])


def load_visits(parts: Iterable[Part]) -> Visits:
    """Read the ids, persons and starts of all visits; rows without an id are left out."""
    kinds: dict[str, Kind] = {name: kind for name, kind in VISITS.kinds().items() if name in _VISIT_COLUMNS}
    columns = [np.empty((3, 0), np.int64)]
    for part in parts:
        for batch in read_chunks(part, kinds):
            batch = batch.filter(batch.column("visit_occurrence_id").is_valid())
            starts = times_of(batch, VISITS.datetime, VISITS.date)
            columns.append(
                np.stack([integers(batch, "visit_occurrence_id"), integers(batch, "person_id"), starts])
            )
    ids, persons, starts = np.concatenate(columns, axis=1)
    distinct, first = np.unique(ids, return_index=True)
    return Visits(distinct, persons[first], starts[first])


_VISIT_COLUMNS = ("visit_occurrence_id", "person_id", VISITS.date, VISITS.datetime)

_SCHEMA = pa.schema([*EVENT_SCHEMA, VISIT_FIELD])
Seen = set[tuple[str, int]]
"""Prefixes and concept ids of codes."""


@dataclass(frozen=True, eq=False)
class Lookup:
    """What rows of event tables are looked up in."""

    persons: Persons
    visits: Visits
    concepts: Concepts
    ancestors: tuple[np.ndarray, np.ndarray] | None
    """Of `omop_concepts.load_ancestors`; None for no roll-up."""


def person_events(
    batch: pa.RecordBatch, concepts: Concepts, counts: EventCounts, seen: Seen
) -> Iterator[pa.Table]:
    """Births, then the facts without a time, of persons ``[rows]``; each row counts as four events."""
    ids, births = integers(batch, "person_id"), births_of(batch)
    counts.read += len(ids) * (1 + len(PERSON_FACTS))
    known = births.times != NO_TIME
    counts.drop("no year of birth", _count(~known))
    counts.change("birth month or day filled in", _count(births.filled))
    yield _events(ids[known], births.times[known], _constant(BIRTH_CODE, _count(known)))
    for fact in PERSON_FACTS:
        rows = row_concepts(batch, fact, None)
        keep = rows.named()
        counts.drop("no concept", _count(~keep))
        codes = _codes(rows, keep, concepts, counts, seen)
        yield _events(ids[keep], np.full(len(codes), NO_TIME), codes)


def table_events(
    batch: pa.RecordBatch, table: EventTable, lookup: Lookup, counts: EventCounts, seen: Seen
) -> pa.Table:
    """One event for each row that has a subject, a time and, where the table has concepts, a concept."""
    persons, times = integers(batch, "person_id"), times_of(batch, table.datetime, table.date)  # [N]
    concepts = (
        row_concepts(batch, table.what, lookup.ancestors) if isinstance(table.what, ConceptColumns) else None
    )
    births, known = lookup.persons.births_of(persons)
    keep = np.ones(len(persons), bool)
    counts.read += len(persons)
    for rule, right in (
        ("unknown subject", known & _valid(batch, "person_id")),
        ("null time", times != NO_TIME),
        ("no concept", keep if concepts is None else concepts.named()),
    ):
        counts.drop(rule, _count(keep & ~right))
        keep = keep & right
    persons, times, batch = persons[keep], times[keep], batch.filter(pa.array(keep))  # [K]
    if concepts is None:
        codes = _constant(str(table.what), len(persons))
    else:
        codes = _codes(concepts, keep, lookup.concepts, counts, seen)

    earliest, visits = births[keep], None
    if table.in_visit:
        ids = integers(batch, "visit_occurrence_id")
        starts, found = lookup.visits.starts_of(ids, persons)
        found &= _valid(batch, "visit_occurrence_id")
        counts.change("unknown visit", _count(~found))
        visits = pa.array(ids, mask=~found)
        same_day = found & (starts // DAY == times // DAY)
        earliest = np.where(same_day, np.maximum(earliest, starts), earliest)
    early = (times % DAY == 0) & (earliest // DAY == times // DAY) & (earliest > times)
    counts.change("no time of day, put at the start of its visit or at birth", _count(early))
    values = batch.column(table.value).cast(pa.float32()) if table.value else None
    return _events(persons, np.where(early, earliest, times), codes, values, visits)


def _codes(
    rows: RowConcepts, keep: np.ndarray, concepts: Concepts, counts: EventCounts, seen: Seen
) -> pa.Array:
    counts.change("concept 0, source concept taken", _count(rows.from_source & keep))
    counts.change("concept 0, source value taken", _count(rows.valued() & keep))
    counts.change("concept replaced by an ancestor", _count(rows.rolled_up & keep))
    codes, used = encode_codes(rows, keep, concepts)
    seen |= {(rows.prefix, concept) for concept in used.tolist()}
    return codes


def _count(rows: np.ndarray) -> int:
    return int(np.count_nonzero(rows))


def _valid(batch: pa.RecordBatch, column: str) -> np.ndarray:
    return batch.column(column).is_valid().to_numpy(zero_copy_only=False)


def _constant(code: str, rows: int) -> pa.Array:
    return pa.DictionaryArray.from_arrays(pa.array(np.zeros(rows, np.int32)), pa.array([code]))


def _events(
    subjects: np.ndarray,
    times: np.ndarray,
    codes: pa.Array,
    values: pa.Array | None = None,
    visits: pa.Array | None = None,
) -> pa.Table:
    rows = len(subjects)
    columns = [
        pa.array(subjects),
        pa.array(times, mask=times == NO_TIME).cast(pa.timestamp("us")),
        codes,
        pa.nulls(rows, pa.float32()) if values is None else values,
        pa.nulls(rows, pa.int64()) if visits is None else visits,
    ]
    return pa.table(columns, schema=_SCHEMA)
