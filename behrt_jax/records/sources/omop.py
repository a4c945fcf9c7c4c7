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

Times are ``*_datetime`` where not null, else ``*_date``. One rule for events known by the day alone (no
datetime, or one at midnight, which is how the model writes an unknown time of day): such an event is at
midnight, but if its visit or its subject's life began later on the same day, at that moment, so that it
does not come before either.

A visit id that is null, or no visit of that person, is left out: such an event's visit is its calendar day.

Memory: a batch of rows, 16 bytes a person, 24 a visit, and the concept table without its names; names are
read for the concepts that were seen.
"""

from collections.abc import Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from behrt_jax.data.events import EventCounts
from behrt_jax.records.sources.cdm import Kind, Part, parts_of, read_chunks
from behrt_jax.records.sources.omop_events import (
    Lookup,
    Persons,
    Seen,
    Visits,
    load_persons,
    load_visits,
    person_events,
    table_events,
)
from behrt_jax.records.sources.omop_tables import (
    BIRTH_KINDS,
    EVENT_TABLES,
    PERSON_FACTS,
    ConceptColumns,
    Concepts,
    EventTable,
    load_ancestors,
    load_concepts,
    load_names,
    omop_files,
    row_concepts,
)

DEFAULT_CODES = ("CONDITION//", "DRUG//", "PROCEDURE//")
"""Patterns of the codes that BEHRT reads where nothing else is asked for."""


def open_omop(path: Path, ancestors: bool = False) -> "OmopSource":
    """Open an OMOP folder: find its tables and check that their columns are there.

    Args:
        path: the folder of the tables, each one file (``PERSON.csv``), several (``person_0.parquet``) or a
            folder; file and column names in any case.
        ancestors: replace each concept by its most general ancestor of the same domain at most two levels
            up (`omop_concepts.load_ancestors`).

    Raises:
        InputError: a table or a column that is needed is missing, is there twice, or cannot be read.
    """
    return OmopSource(omop_files(Path(path), ancestors), ancestors)


class OmopSource:
    """An OMOP data set, opened: a `source.Source`.

    Persons, visits and concepts are read when they are first needed.
    """

    name = "omop"

    def __init__(self, tables: dict[str, list[Path]], ancestors: bool) -> None:
        """Use `open_omop`, which checks the tables."""
        self._tables = tables
        self._roll_up = ancestors
        kinds = [None, *EVENT_TABLES]
        self._units = [
            (kind, part) for kind in kinds for part in self._parts(kind.name if kind else "person")
        ]
        self._seen: dict[int, Seen] = {}

    def _parts(self, table: str) -> list[Part]:
        return [part for file in self._tables.get(table, []) for part in parts_of(file)]

    def files(self) -> list[Path]:
        """Every file that is read."""
        return [file for name in sorted(self._tables) for file in self._tables[name]]

    def units(self) -> int:
        """Files of event tables (person first), large Parquet files in parts."""
        return len(self._units)

    def subject_ranges(self) -> None:
        """Not known: a subject is in several tables."""

    def splits(self) -> dict[str, np.ndarray]:
        """None: OMOP knows no splits."""
        return {}

    def sample_subjects(self) -> np.ndarray:
        """int64: every person once and once more for each visit."""
        return np.concatenate([self._persons.ids, self._visits.persons])

    @cached_property
    def _persons(self) -> Persons:
        return load_persons(self._parts("person"))

    @cached_property
    def _visits(self) -> Visits:
        return load_visits(self._parts("visit_occurrence"))

    @cached_property
    def _concept_files(self) -> list[Path]:
        # The standard's own table first: of a concept that is there twice, the first row counts.
        names = sorted((name for name in self._tables if name.endswith("concept")), key=len)
        return [file for name in names for file in self._tables[name]]

    @cached_property
    def _concepts(self) -> Concepts:
        return load_concepts(self._concept_files)

    @cached_property
    def _ancestors(self) -> tuple[np.ndarray, np.ndarray] | None:
        return (
            load_ancestors(self._tables.get("concept_ancestor", []), self._concepts)
            if self._roll_up
            else None
        )

    def read(self, unit: int, counts: EventCounts) -> Iterator[pa.Table]:
        """Events of one unit; see `source.Source.read` and the rules above.

        A person counts as four events read: birth, gender, race, ethnicity; an observation period as two.

        Raises:
            InputError: a row or value that cannot be read; the message names file, column and row.
        """
        table, part = self._units[unit]
        seen: Seen = set()
        persons = self._persons  # a person without an id ends here
        for batch in read_chunks(part, _kinds(table)):
            if table is None:
                yield from person_events(batch, self._concepts, counts, seen)
            else:
                lookup = Lookup(persons, self._visits, self._concepts, self._ancestors)
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
        names = load_names(self._concept_files, {concept for _, concept in seen})
        described = sorted((prefix, concept) for prefix, concept in seen if concept in names)
        texts = self._concepts.texts(np.array([concept for _, concept in described], np.int64))
        pairs = zip(described, texts, strict=True)
        return {f"{prefix}//{text}": names[concept] for (prefix, concept), text in pairs}

    def learned(self) -> dict[str, Any]:
        """Unit -> prefixes and concept ids of its events."""
        return {str(unit): sorted(seen) for unit, seen in self._seen.items()}

    def learn(self, learned: Mapping[str, Any]) -> None:
        """Take over the concepts of other units."""
        for unit, seen in learned.items():
            self._seen[int(unit)] = {(prefix, concept) for prefix, concept in seen}

    def _concepts_of(self, unit: int) -> Seen:
        """Prefixes and concept ids of a unit's events (and perhaps of rows that became none)."""
        if unit not in self._seen:
            table, part = self._units[unit]
            whats = PERSON_FACTS if table is None else (table.what,)
            columns = [what for what in whats if isinstance(what, ConceptColumns)]
            kinds: dict[str, Kind] = {}
            for what in columns:
                kinds |= what.kinds()
            seen: Seen = set()
            for batch in read_chunks(part, kinds) if kinds else ():
                for what in columns:
                    rows = row_concepts(batch, what, None if table is None else self._ancestors)
                    seen |= {(what.prefix, concept) for concept in np.unique(rows.ids).tolist()}
            self._seen[unit] = seen
        return self._seen[unit]


def _kinds(table: EventTable | None) -> dict[str, Kind]:
    if table is not None:
        return table.kinds()
    kinds = dict(BIRTH_KINDS)
    for fact in PERSON_FACTS:
        kinds |= fact.kinds()
    return kinds
