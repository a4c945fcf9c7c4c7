"""Rows of OMOP tables turned into events: the rules that drop or change one, each counted."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from behrt_jax.data.events import BIRTH_CODE, EVENT_SCHEMA, VISIT_FIELD, EventCounts
from behrt_jax.data.sources.omop_concepts import Concepts, RowConcepts, encode_codes, integers, row_concepts
from behrt_jax.data.sources.omop_subjects import DAY, NO_TIME, Persons, Visits, births_of, times_of
from behrt_jax.data.sources.omop_tables import PERSON_FACTS, ConceptColumns, EventTable

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
