"""Persons and visits of an OMOP data set: who there is, born when, and which visits began when."""

# pyarrow.compute makes its functions on import, where pyright does not see them.
# pyright: reportAttributeAccessIssue=false

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from behrt_jax.data.sources.cdm_files import Part, read_chunks
from behrt_jax.data.sources.cdm_values import Kind
from behrt_jax.data.sources.omop_concepts import integers, places
from behrt_jax.data.sources.omop_tables import BIRTH_KINDS, VISITS
from behrt_jax.errors import InputError

DAY = 86_400_000_000
"""Microseconds in a day."""
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
