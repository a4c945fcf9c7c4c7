"""Miniature OMOP folders for tests."""

import csv
import gzip
import io
from collections.abc import Iterable, Mapping, Sequence
from datetime import date, datetime
from decimal import Decimal
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq

from behrt_jax.data.events import EVENT_SCHEMA, VISIT_FIELD, EventCounts
from behrt_jax.records.sources.omop import OmopSource

Form = Literal["csv", "csv.gz", "parquet"]
Tables = Mapping[str, Sequence[Mapping[str, Any]]]


def _stem(name: str, time: str, more: Iterable[str] = ()) -> list[str]:
    stem = name.split("_")[0]
    return [
        f"{name}_id",
        "person_id",
        f"{stem}_concept_id",
        f"{time}_date",
        f"{time}_datetime",
        "visit_occurrence_id",
        f"{stem}_source_value",
        f"{stem}_source_concept_id",
        *more,
    ]


COLUMNS: dict[str, list[str]] = {
    "person": [
        *("person_id", "year_of_birth", "month_of_birth", "day_of_birth", "birth_datetime"),
        *(
            f"{fact}_{what}"
            for fact in ("gender", "race", "ethnicity")
            for what in ("concept_id", "source_value")
        ),
    ],
    "visit_occurrence": [
        *("visit_occurrence_id", "person_id", "visit_concept_id", "visit_start_date", "visit_start_datetime"),
        *("visit_end_date", "visit_source_value", "visit_source_concept_id", "discharged_to_concept_id"),
    ],
    "condition_occurrence": _stem("condition_occurrence", "condition_start"),
    "drug_exposure": _stem("drug_exposure", "drug_exposure_start", ["quantity", "sig"]),
    "procedure_occurrence": _stem("procedure_occurrence", "procedure"),
    "measurement": _stem("measurement", "measurement", ["value_as_number"]),
    "observation": _stem("observation", "observation", ["value_as_number", "value_as_string"]),
    "device_exposure": _stem("device_exposure", "device_exposure_start"),
    "death": ["person_id", "death_date", "death_datetime"],
    "observation_period": ["person_id", "observation_period_start_date", "observation_period_end_date"],
    "concept": ["concept_id", "concept_name", "domain_id", "vocabulary_id", "concept_code"],
    "concept_ancestor": ["ancestor_concept_id", "descendant_concept_id", "min_levels_of_separation"],
}
"""Some of the standard's columns of each table, and all that are read."""


def write_omop(
    folder: Path, tables: Tables, *, form: Form = "csv", upper: bool = False, small_ids: bool = False
) -> Path:
    """Write tables and return the folder, which is made if it is not there.

    Args:
        folder: where to.
        tables: name -> rows, each with the values of some columns; a row's other values are null.
        form: of all files.
        upper: file and column names in capitals.
        small_ids: Parquet integers as int32, as some exports have them.
    """
    for name, rows in tables.items():
        file = f"{name}.{form}"
        write_table(folder / (file.upper() if upper else file), name, rows, upper=upper, small_ids=small_ids)
    return folder


def write_table(
    file: Path, table: str, rows: Sequence[Mapping[str, Any]], *, upper: bool = False, small_ids: bool = False
) -> None:
    """Write one file of a table in the form that its name ends in."""
    columns = COLUMNS[table]
    for row in rows:
        assert set(row) <= set(columns), f"{table} has no {set(row) - set(columns)}"
    names = [column.upper() for column in columns] if upper else columns
    file.parent.mkdir(parents=True, exist_ok=True)
    if file.name.lower().endswith(".parquet"):
        kinds = [_kind(column, small_ids) for column in columns]
        arrays = [pa.array([row.get(c) for row in rows], k) for c, k in zip(columns, kinds, strict=True)]
        pq.write_table(pa.table(arrays, names=names), file, row_group_size=3)
        return
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerows([names, *([row.get(column) for column in columns] for row in rows)])
    data = text.getvalue().encode()
    file.write_bytes(gzip.compress(data) if file.name.lower().endswith(".gz") else data)


def _kind(column: str, small_ids: bool) -> pa.DataType:
    if column.endswith("_datetime"):
        return pa.timestamp("us")
    if column.endswith("_date"):
        return pa.date32()
    if column.endswith(("_id", "_of_birth", "_separation")) and column not in ("domain_id", "vocabulary_id"):
        return pa.int32() if small_ids else pa.int64()
    return pa.decimal128(18, 3) if column in ("quantity", "value_as_number") else pa.string()


def row(**values: Any) -> dict[str, Any]:
    """A row; its dates and times may be given as ISO text."""
    parsed: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, str) and name.endswith("_datetime"):
            value = datetime.fromisoformat(value)
        elif isinstance(value, str) and name.endswith("_date"):
            value = date.fromisoformat(value)
        elif name in ("quantity", "value_as_number") and value is not None:
            value = Decimal(str(value))
        parsed[name] = value
    return parsed


def person(person_id: int, **values: Any) -> dict[str, Any]:
    """A woman born on 1950-02-03, unless other values are given."""
    born = {"year_of_birth": 1950, "month_of_birth": 2, "day_of_birth": 3, "gender_concept_id": 8532}
    return row(**({"person_id": person_id} | born | values))


def condition(
    person_id: int | None, concept: int | None, day: str | None = "2000-01-01", **values: Any
) -> dict:
    """A row of condition_occurrence."""
    fixed = {"person_id": person_id, "condition_concept_id": concept, "condition_start_date": day}
    return row(**(fixed | values))


def visit(visit_id: int, person_id: int, day: str = "2000-01-01", **values: Any) -> dict[str, Any]:
    """A row of visit_occurrence."""
    fixed = {"visit_occurrence_id": visit_id, "person_id": person_id, "visit_concept_id": 9201}
    return row(**(fixed | {"visit_start_date": day} | values))


def concept(concept_id: int, code: str, domain: str = "Condition", **values: Any) -> dict[str, Any]:
    """A row of concept."""
    fixed = {"concept_id": concept_id, "concept_code": code, "domain_id": domain, "vocabulary_id": "SNOMED"}
    return fixed | {"concept_name": f"Name of {code}"} | values


HISTORY = {
    "person": [
        person(-5, race_concept_id=8527),
        person(7, year_of_birth=1960, birth_datetime="1960-05-06 07:08:09"),
    ],
    "visit_occurrence": [visit(-11, -5, visit_start_datetime="2000-01-01 10:00:00")],
    "condition_occurrence": [condition(-5, 101, condition_start_datetime="2000-01-01 11:12:13")],
    "drug_exposure": [
        row(
            person_id=7, drug_concept_id=201, drug_exposure_start_date="2001-01-01", sig='one, "twice"\na day'
        )
    ],
    "procedure_occurrence": [row(person_id=7, procedure_concept_id=301, procedure_date="2001-01-02")],
    "measurement": [
        row(person_id=7, measurement_concept_id=401, measurement_date="2001-01-03", value_as_number="1.125")
    ],
    "observation": [row(person_id=7, observation_concept_id=501, observation_date="2001-01-04")],
    "device_exposure": [row(person_id=7, device_concept_id=601, device_exposure_start_date="2001-01-05")],
    "death": [row(person_id=7, death_date="2001-01-06", death_datetime="2001-01-06 12:00:00")],
    "observation_period": [
        row(
            person_id=7,
            observation_period_start_date="1999-01-01",
            observation_period_end_date="2001-01-06",
        )
    ],
    "concept": [concept(101, "38341003"), concept(8532, "F", "Gender", vocabulary_id="Gender")],
}
"""Two persons and a row or two of every table."""


def read_all(source: OmopSource) -> tuple[pa.Table, EventCounts]:
    """All events of a source; their schema and their counts are checked."""
    counts = EventCounts()
    tables = [table for unit in range(source.units()) for table in source.read(unit, counts)]
    assert all(table.schema == pa.schema([*EVENT_SCHEMA, VISIT_FIELD]) for table in tables)
    events = pa.concat_tables(tables)
    assert counts.read == events.num_rows + sum(counts.dropped.values())
    return events, counts


def rows_of(events: pa.Table, prefix: str = "CONDITION") -> list[tuple]:
    """(subject, time, code, value, visit) of the events whose code starts so, in their order."""
    rows = [tuple(event.values()) for event in events.to_pylist()]
    return [event for event in rows if event[2].startswith(prefix)]


def codes_of(events: pa.Table, prefix: str) -> list[str]:
    """The codes that start so."""
    return [event[2] for event in rows_of(events, prefix)]
