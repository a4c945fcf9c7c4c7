"""Events from a folder in the OMOP Common Data Model, version 5.3 or 5.4, as CSV, CSV.gz or Parquet.

A row of condition_occurrence, drug_exposure, procedure_occurrence, measurement, observation or
device_exposure becomes the event ``CONDITION//<code>``, ``DRUG//<code>`` and so on at its start; a visit
``VISIT//<code>`` at its start; an observation period OBSERVATION_PERIOD//START and .../END; a death
MEDS_DEATH. A person becomes MEDS_BIRTH and the facts without a time GENDER, RACE and ETHNICITY. How a
visit ended (``discharge_to_*`` in 5.3, ``discharged_to_*`` in 5.4) is not taken.

``<code>`` is ``vocabulary_id/concept_code`` where the concept table has the concept, else the concept id.
Where the concept is 0 or null it is made of the source concept, else ``SOURCE/`` and the source's own value
without the blanks around it; a row with none of the three is dropped. Tables whose names end in
``_concept``, such as a site's own, count as parts of the concept table.

Times are ``*_datetime`` where not null, else ``*_date``, which the model requires: a datetime more than a day
from its date, further than a zone explains, gives way to it, and so does a birth_datetime to the year of
birth. One rule for events known by the day alone (no datetime, or one at midnight, which is how the
model writes an unknown time of day): such an event is at midnight, but if its visit or its subject's life
began later on the same day, at that moment, so that it does not come before either. Where a datetime is on
the day before birth or after death, and its date is not, as where one is UTC and the other local, it is moved
to the beginning or end of that date.

A visit id that is null, or no visit of that person, is left out: such an event's visit is its calendar day.

Memory: a batch of rows, 16 bytes a person, 24 a visit, and the concept table without its names; names are
read for the concepts that were seen.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import pyarrow as pa

from behrt_jax.data.events import BIRTH_CODE, DAY, EventCounts
from behrt_jax.errors import InputError
from behrt_jax.files import JsonObject
from behrt_jax.records.sources import omop_tables as cdm
from behrt_jax.records.sources.columns import Kind, find
from behrt_jax.records.sources.files import Part
from behrt_jax.records.sources.source import Source, count, events_table, keep_rows, one_code, valid

# pyarrow.compute makes its functions on import, where pyright does not see them.
# pyright: reportAttributeAccessIssue=false

NO_TIME = np.iinfo(np.int64).min
"""Stands for a null time."""
Seen = set[tuple[str, int]]
"""Prefixes and concept ids of codes."""


def open_omop(path: Path, ancestors: bool = False, skip: Sequence[str] = ()) -> "OmopSource":
    """Open an OMOP folder: find its tables and check that their columns are there.

    Args:
        path: the folder of the tables, each one file (``PERSON.csv``), several (``person_0.parquet``) or a
            folder; file and column names in any case.
        ancestors: replace each concept by its most general ancestor of the same domain at most two levels
            up (`omop_tables.load_ancestors`).
        skip: names of tables to pass over, in any case; without visit_occurrence all visits are unknown.

    Raises:
        InputError: a table or a column that is needed is missing, is there twice, or cannot be read; a table
            to skip is not there, or is person.
    """
    return OmopSource(cdm.omop_files(Path(path), ancestors, skip), ancestors, skip)


class OmopSource(Source):
    """An OMOP data set, opened; persons, visits and concepts are read when they are first needed."""

    name = "omop"
    births_from = "year_of_birth or birth_datetime in the table person"
    default_codes = ("CONDITION//", "DRUG//", "PROCEDURE//")

    def __init__(self, tables: dict[str, list[Path]], ancestors: bool, skip: Sequence[str] = ()) -> None:
        """Use `open_omop`, which checks the tables."""
        self._tables = tables
        self._skipped = sorted(name.lower() for name in skip)
        self._roll_up = ancestors
        kinds = [None, *cdm.EVENT_TABLES]
        self._units = [
            (kind, part) for kind in kinds for part in self._parts(kind.name if kind else "person")
        ]
        self._seen: dict[int, Seen] = {}

    def _parts(self, table: str) -> list[Part]:
        return [part for file in self._tables.get(table, []) for part in cdm.parts_of(file)]

    def files(self) -> list[Path]:
        """Every file that is read."""
        return [file for name in sorted(self._tables) for file in self._tables[name]]

    def units(self) -> int:
        """Files of event tables (person first), large Parquet files in parts."""
        return len(self._units)

    def options(self) -> JsonObject:
        """The choice to replace concepts by ancestors, and the tables that are passed over, if any."""
        return {"ancestors": self._roll_up} | ({"skip": self._skipped} if self._skipped else {})

    def sample_subjects(self) -> np.ndarray:
        """int64: every person once and once more for each visit."""
        return np.concatenate([self._persons.ids, self._visits.persons[:-1]])

    @cached_property
    def _persons(self) -> "Persons":
        return load_persons(self._parts("person"))

    @cached_property
    def _deaths(self) -> np.ndarray:
        return load_deaths(self._parts("death"), self._persons)

    @cached_property
    def _visits(self) -> "VisitStarts":
        return load_visits(self._parts("visit_occurrence"))

    @cached_property
    def _concept_files(self) -> list[Path]:
        # The standard's own table first: of a concept that is there twice, the first row counts.
        names = sorted((name for name in self._tables if name.endswith("concept")), key=len)
        return [file for name in names for file in self._tables[name]]

    @cached_property
    def _concepts(self) -> cdm.Concepts:
        return cdm.load_concepts(self._concept_files)

    @cached_property
    def _ancestors(self) -> tuple[np.ndarray, np.ndarray] | None:
        if self._roll_up:
            return cdm.load_ancestors(self._tables.get("concept_ancestor", []), self._concepts)
        return None

    def read(self, unit: int, counts: EventCounts) -> Iterator[pa.Table]:
        """Events of one unit; see `source.Source.read` and the rules above.

        A person counts as four events read: birth, gender, race, ethnicity; an observation period as two.

        Raises:
            InputError: a row or value that cannot be read; the message names file, column and row.
        """
        table, part = self._units[unit]
        seen: Seen = set()
        persons = self._persons  # a person without an id ends here
        for batch in cdm.read_chunks(part, _kinds(table)):
            if table is None:
                yield from person_events(batch, self._concepts, counts, seen)
            else:
                lookup = Lookup(persons, self._deaths, self._visits, self._concepts, self._ancestors)
                yield table_events(batch, table, lookup, counts, seen)
        self._seen[unit] = seen

    def descriptions(self) -> dict[str, str]:
        """Code -> concept_name, of the concepts that events have.

        Of units that this object has not read to the end, nor learnt of, the columns of concepts are
        read again.
        """
        if not self._concept_files:
            return {}
        seen: Seen = set().union(*(self._concepts_of(unit) for unit in range(self.units())))
        names = cdm.load_names(self._concept_files, {concept for _, concept in seen})
        described = sorted((prefix, concept) for prefix, concept in seen if concept in names)
        texts = self._concepts.texts(np.array([concept for _, concept in described], np.int64))
        pairs = zip(described, texts, strict=True)
        return {f"{prefix}//{text}": names[concept] for (prefix, concept), text in pairs}

    def learned(self) -> JsonObject:
        """Unit -> prefixes and concept ids of its events."""
        return {str(unit): sorted(seen) for unit, seen in self._seen.items()}

    def learn(self, learned: JsonObject) -> None:
        """Take over the concepts of other units."""
        for unit, seen in learned.items():
            self._seen[int(unit)] = {(prefix, concept) for prefix, concept in seen}

    def _concepts_of(self, unit: int) -> Seen:
        """Prefixes and concept ids of a unit's events (and perhaps of rows that became none)."""
        if unit not in self._seen:
            table, part = self._units[unit]
            whats = cdm.PERSON_FACTS if table is None else (table.what,)
            columns = [what for what in whats if isinstance(what, cdm.ConceptColumns)]
            kinds = dict[str, Kind](pair for what in columns for pair in what.kinds().items())
            seen: Seen = set()
            for batch in cdm.read_chunks(part, kinds) if kinds else ():
                for what in columns:
                    rows = cdm.row_concepts(batch, what, None if table is None else self._ancestors)
                    seen |= {(what.prefix, concept) for concept in np.unique(rows.ids).tolist()}
            self._seen[unit] = seen
        return self._seen[unit]


def _kinds(table: cdm.EventTable | None) -> dict[str, Kind]:
    if table is not None:
        return table.kinds()
    return cdm.BIRTH_KINDS | dict(pair for fact in cdm.PERSON_FACTS for pair in fact.kinds().items())


# Persons and visits: who there is, born when, and which visits began when.


@dataclass(frozen=True, eq=False)
class Persons:
    """All persons."""

    ids: np.ndarray
    """int64 ``[persons]``, ascending."""
    births: np.ndarray
    """int64 ``[persons + 1]``, microseconds since 1970, `NO_TIME` where unknown; the last is nobody's."""


@dataclass(frozen=True, eq=False)
class VisitStarts:
    """Persons and starts of all visits."""

    ids: np.ndarray
    """int64 ``[visits]``, ascending."""
    persons: np.ndarray
    """int64 ``[visits + 1]``; the last is no visit."""
    starts: np.ndarray
    """int64 ``[visits + 1]``, microseconds since 1970, `NO_TIME` where unknown, as for the last."""

    def starts_of(self, ids: np.ndarray, persons: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Start of each visit (`NO_TIME` where unknown), and whether it is there and that person's."""
        place = find(self.ids, ids)
        found = (place >= 0) & (self.persons[place] == persons)
        return np.where(found, self.starts[place], NO_TIME), found


@dataclass(frozen=True, eq=False)
class RowTimes:
    """Times of rows; int64 microseconds ``[rows]``, `NO_TIME` where null."""

    times: np.ndarray
    """The datetime, else the date."""
    days: np.ndarray
    """Midnight of the date; of the datetime where there is no date."""
    wrong: np.ndarray
    """bool: a datetime too far from its date, which was taken."""


def times_of(batch: pa.RecordBatch, datetime: str | None, date: str) -> RowTimes:
    """The times of rows, by the rule of this module's docstring."""
    dates = _micros(batch, date)
    exact = np.full(len(dates), NO_TIME) if datetime is None else _micros(batch, datetime)
    both = (exact != NO_TIME) & (dates != NO_TIME)
    wrong = both & (np.abs(exact // DAY - dates // DAY) > 1)
    times = np.where((exact == NO_TIME) | wrong, dates, exact)
    return RowTimes(times, np.where(dates == NO_TIME, times, dates) // DAY * DAY, wrong)


def _micros(batch: pa.RecordBatch, column: str) -> np.ndarray:
    return batch.column(column).cast(pa.int64()).fill_null(NO_TIME).to_numpy(zero_copy_only=False)


def births_of(batch: pa.RecordBatch) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Birth of each row (int64, `NO_TIME` where unknown), and by which rule it was changed (bool each).

    It is birth_datetime, unless that is more than a day outside of the year of birth, else midnight of year,
    month and day of birth. A month that is missing (or no month) becomes January, a day that is missing (or
    not in that month) the 1st; without the month the day is not known either. The rules are that month or
    day was filled in, and that birth_datetime gave way.
    """
    exact = _micros(batch, "birth_datetime")
    year, month, day = (cdm.integers(batch, f"{part}_of_birth") for part in ("year", "month", "day"))
    known = (year >= 1) & (year <= 9999)
    month_given = (month >= 1) & (month <= 12)
    months = (np.where(known, year, 1970) - 1970) * 12 + np.where(month_given, month, 1) - 1
    first = months.astype("datetime64[M]").astype("datetime64[D]")
    length = ((months + 1).astype("datetime64[M]").astype("datetime64[D]") - first).astype(np.int64)
    day_given = month_given & (day >= 1) & (day <= length)
    date = (first.astype(np.int64) + np.where(day_given, day, 1) - 1) * DAY
    near = [((exact + off) // DAY).astype("datetime64[D]").astype("datetime64[Y]") for off in (-DAY, 0, DAY)]
    wrong = known & (exact != NO_TIME) & ~np.any([years.astype(np.int64) == year - 1970 for years in near], 0)
    unused = (exact == NO_TIME) | wrong
    times = np.where(unused, np.where(known, date, NO_TIME), exact)
    return times, unused & known & ~day_given, wrong


def load_persons(parts: Iterable[Part]) -> Persons:
    """Read the ids and births of all persons.

    Raises:
        InputError: a row has no person_id.
    """
    ids, births = [np.empty(0, np.int64)], [np.empty(0, np.int64)]
    for part in parts:
        rows = 0
        for batch in cdm.read_chunks(part, cdm.BIRTH_KINDS):
            column = batch.column("person_id")
            if column.null_count:
                row = rows + int(np.argmax(column.is_null().to_numpy(zero_copy_only=False))) + 1
                raise InputError(
                    f"{part.file} has no person_id in row {row} (counted from 1 after any header): fill "
                    "it in or leave the row out."
                )
            ids.append(cdm.integers(batch, "person_id"))
            births.append(births_of(batch)[0])
            rows += batch.num_rows
    distinct, first = np.unique(np.concatenate(ids), return_index=True)
    return Persons(distinct, np.append(np.concatenate(births)[first], NO_TIME))


def load_deaths(parts: Iterable[Part], persons: Persons) -> np.ndarray:
    """Last death of each person: int64 ``[persons + 1]``, the largest number where none is known."""
    last = np.full(len(persons.births), NO_TIME)
    for part in parts:
        for batch in cdm.read_chunks(part, cdm.DEATHS.kinds()):
            dead = times_of(batch, cdm.DEATHS.datetime, cdm.DEATHS.date).times
            np.maximum.at(last, find(persons.ids, cdm.integers(batch, "person_id")), dead)
    last[-1] = NO_TIME  # of persons that are not there
    return np.where(last == NO_TIME, np.iinfo(np.int64).max, last)


def load_visits(parts: Iterable[Part]) -> VisitStarts:
    """Read the ids, persons and starts of all visits; rows without an id are left out."""
    wanted = ("visit_occurrence_id", "person_id", cdm.VISITS.date, cdm.VISITS.datetime)
    kinds: dict[str, Kind] = {name: kind for name, kind in cdm.VISITS.kinds().items() if name in wanted}
    columns = [np.empty((3, 0), np.int64)]
    for part in parts:
        for batch in cdm.read_chunks(part, kinds):
            batch = batch.filter(batch.column("visit_occurrence_id").is_valid())
            starts = times_of(batch, cdm.VISITS.datetime, cdm.VISITS.date).times
            visit, person = cdm.integers(batch, "visit_occurrence_id"), cdm.integers(batch, "person_id")
            columns.append(np.stack([visit, person, starts]))
    ids, persons, starts = np.concatenate(columns, axis=1)
    distinct, first = np.unique(ids, return_index=True)
    return VisitStarts(distinct, np.append(persons[first], 0), np.append(starts[first], NO_TIME))


# Rows turned into events, by rules that drop or change one, each counted.


@dataclass(frozen=True, eq=False)
class Lookup:
    """The tables that rows of event tables are looked up in."""

    persons: Persons
    deaths: np.ndarray
    """Of `load_deaths`."""
    visits: VisitStarts
    concepts: cdm.Concepts
    ancestors: tuple[np.ndarray, np.ndarray] | None
    """Of `omop_tables.load_ancestors`; None for no roll-up."""


def person_events(
    batch: pa.RecordBatch, concepts: cdm.Concepts, counts: EventCounts, seen: Seen
) -> Iterator[pa.Table]:
    """Births, then the facts without a time, of persons ``[rows]``; each row counts as four events."""
    ids, (births, filled, wrong) = cdm.integers(batch, "person_id"), births_of(batch)
    counts.read += len(ids) * (1 + len(cdm.PERSON_FACTS))
    known = births != NO_TIME
    counts.drop("no year of birth", count(~known))
    counts.change("birth month or day filled in", count(filled))
    counts.change("birth_datetime outside of the year of birth, which was taken", count(wrong))
    yield events_table(ids[known], _times(births[known]), one_code(BIRTH_CODE, count(known)))
    for fact in cdm.PERSON_FACTS:
        rows = cdm.row_concepts(batch, fact, None)
        keep = rows.named()
        counts.drop("no concept", count(~keep))
        codes = _codes(rows, keep, concepts, counts, seen)
        yield events_table(ids[keep], pa.nulls(len(codes), pa.timestamp("us")), codes)


def table_events(
    batch: pa.RecordBatch, table: cdm.EventTable, lookup: Lookup, counts: EventCounts, seen: Seen
) -> pa.Table:
    """One event for each row that has a subject, a time and, where the table has concepts, a concept."""
    persons, rows = cdm.integers(batch, "person_id"), times_of(batch, table.datetime, table.date)  # [N]
    concepts = None
    if isinstance(table.what, cdm.ConceptColumns):
        concepts = cdm.row_concepts(batch, table.what, lookup.ancestors)
    place = find(lookup.persons.ids, persons)
    counts.read += len(persons)
    known = (place >= 0) & valid(batch.column("person_id"))
    rules = {"unknown subject": known, "null time": rows.times != NO_TIME}
    if concepts is not None:
        rules["no concept"] = concepts.named()
    keep = keep_rows(rules, counts)
    counts.change("datetime far from its date, which was taken", count(rows.wrong & keep))
    persons, place, batch = persons[keep], place[keep], batch.filter(pa.array(keep))  # [K]
    earliest, latest = lookup.persons.births[place], lookup.deaths[place]
    times, moved = within_life(rows.times[keep], rows.days[keep], earliest, latest)
    counts.change("datetime outside of life on a date within, moved to that date", count(moved))
    if concepts is None:
        codes = one_code(str(table.what), len(persons))
    else:
        codes = _codes(concepts, keep, lookup.concepts, counts, seen)

    visits = None
    if table.in_visit:
        ids = cdm.integers(batch, "visit_occurrence_id")
        starts, found = lookup.visits.starts_of(ids, persons)
        found &= valid(batch.column("visit_occurrence_id"))
        counts.change("unknown visit", count(~found))
        visits = pa.array(ids, mask=~found)
        same_day = found & (starts // DAY == times // DAY)
        earliest = np.where(same_day, np.maximum(earliest, starts), earliest)
    early = (times % DAY == 0) & (earliest // DAY == times // DAY) & (earliest > times)
    counts.change("no time of day, put at the start of its visit or at birth", count(early))
    values = batch.column(table.value).cast(pa.float32()) if table.value else None
    return events_table(persons, _times(np.where(early, earliest, times)), codes, values, visits)


def within_life(
    times: np.ndarray, days: np.ndarray, births: np.ndarray, deaths: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Times on the day before birth or after death, moved to their date where that is within life.

    All are int64 microseconds ``[rows]``; with the times comes which were moved, bool.
    """
    early = (times < births) & (times < days) & (days >= births // DAY * DAY)
    late = (times >= days + DAY) & (times // DAY > deaths // DAY) & (days <= deaths)
    moved = np.where(early, np.maximum(days, births), np.where(late, days + DAY - 1, times))
    return moved, early | late


def _codes(
    rows: cdm.RowConcepts, keep: np.ndarray, concepts: cdm.Concepts, counts: EventCounts, seen: Seen
) -> pa.DictionaryArray:
    counts.change("concept 0, source concept taken", count(rows.from_source & keep))
    counts.change("concept 0, source value taken", count(rows.valued() & keep))
    counts.change("concept replaced by an ancestor", count(rows.rolled_up & keep))
    codes, used = cdm.encode_codes(rows, keep, concepts)
    seen |= {(rows.prefix, concept) for concept in used.tolist()}
    return codes


def _times(times: np.ndarray) -> pa.Array:
    return pa.array(times, mask=times == NO_TIME).cast(pa.timestamp("us"))
