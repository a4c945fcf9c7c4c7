"""What a prepared data set tells of its subjects beside their events: static facts, births and deaths.

``{split}/static.parquet`` (subject_id, code) has each event without a time whose code is chosen by
``static_codes`` once, ``{split}/deaths.parquet`` (subject_id, time) the earliest death of each subject.
Both are sorted, and have the subjects without any event left too. Of these alone, ``{split}/births.parquet``
(subject_id, time) has the birth, where it is known: there is no first event to tell it. No token is made of
them.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from behrt_jax.data.event_columns import Births, EventColumns
from behrt_jax.data.events import DEATH_CODE, SPLITS

STATIC = pa.schema([("subject_id", pa.int64()), ("code", pa.string())])
DEATHS = pa.schema([("subject_id", pa.int64()), ("time", pa.timestamp("us"))])
BIRTHS = DEATHS
_ROWS = 1 << 20  # of a row group


@dataclass(frozen=True, eq=False)
class SubjectFacts:
    """Those of some subjects, ascending."""

    static_ids: np.ndarray
    """int64 ``[facts]``, subject ids."""
    static_codes: np.ndarray
    """object ``[facts]``, strings."""
    death_ids: np.ndarray
    """int64 ``[deaths]``, subject ids, distinct."""
    deaths: np.ndarray
    """int64 ``[deaths]``, microseconds since 1970."""
    births: Births
    """Of those without any event left."""


def subject_facts(
    events: EventColumns,
    static: np.ndarray,
    births: Births,
    split_of: Callable[[np.ndarray], np.ndarray],
) -> dict[str, SubjectFacts]:
    """Split -> the facts of its subjects.

    Args:
        events: all events of whole subjects.
        static: bool ``[names]``, codes that are static facts where they have no time.
        births: of those without any event left.
        split_of: from subject ids, ascending, to the places of their splits in `events.SPLITS`.
    """
    names = np.array(events.names, object)
    rows = np.zeros(0, np.int64)
    if events.timed is not None:
        rows = np.flatnonzero(~events.timed & static[events.codes])
    facts = np.unique(np.stack([events.subject_ids[rows], events.codes[rows]]), axis=1)  # [2, facts]
    died = events.codes == (events.names.index(DEATH_CODE) if DEATH_CODE in events.names else -1)
    if events.timed is not None:
        died &= events.timed
    ids, times = events.subject_ids[died], events.times[died]
    order = np.lexsort([times, ids])
    dead, first = np.unique(ids[order], return_index=True)
    times = times[order][first]
    split, split_of_dead, split_of_births = map(split_of, (facts[0], dead, births.subject_ids))
    return {
        name: SubjectFacts(
            facts[0][split == index],
            names[facts[1][split == index]],
            dead[split_of_dead == index],
            times[split_of_dead == index],
            Births(births.subject_ids[split_of_births == index], births.times[split_of_births == index]),
        )
        for index, name in enumerate(SPLITS)
    }


class FactWriter:
    """Writes the facts of one split, subjects ascending; row groups do not depend on how they come."""

    def __init__(self, folder: Path):
        folder.mkdir(parents=True, exist_ok=True)
        schemas = {"static": STATIC, "deaths": DEATHS, "births": BIRTHS}
        self._tables = [_Rows(folder / f"{name}.parquet", schema) for name, schema in schemas.items()]
        self.subjects = 0
        """Subjects with a static fact."""

    def append(self, facts: SubjectFacts) -> None:
        """Add the facts of further subjects."""
        self.subjects += len(np.unique(facts.static_ids))
        columns = [
            (facts.static_ids, facts.static_codes),
            (facts.death_ids, facts.deaths.astype("datetime64[us]")),
            (facts.births.subject_ids, facts.births.times.astype("datetime64[us]")),
        ]
        for rows, (ids, values) in zip(self._tables, columns, strict=True):
            if len(ids):
                columns = [pa.array(ids), pa.array(values, rows.schema.field(1).type)]
                rows.append(pa.table(columns, schema=rows.schema))

    def counts(self) -> dict[str, int]:
        """Static facts, subjects with any, deaths, and births of subjects without any event left."""
        static, deaths, births = (table.rows for table in self._tables)
        return {
            "facts": static,
            "subjects": self.subjects,
            "deaths": deaths,
            "births_without_events": births,
        }

    def __enter__(self) -> "FactWriter":
        return self

    def __exit__(self, *error: object) -> None:
        for rows in self._tables:
            rows.close()


class _Rows:
    """A Parquet file, written in row groups of `_ROWS`."""

    def __init__(self, file: Path, schema: pa.Schema):
        self.schema, self.rows = schema, 0
        self._writer = pq.ParquetWriter(file, schema)
        self._held: list[pa.Table] = []

    def append(self, table: pa.Table) -> None:
        before, self.rows = self.rows, self.rows + table.num_rows
        self._held.append(table)
        if before // _ROWS < self.rows // _ROWS:
            held = pa.concat_tables(self._held)
            whole = held.num_rows // _ROWS * _ROWS
            self._write(held.slice(0, whole))
            self._held = [held.slice(whole).combine_chunks()]

    def close(self) -> None:
        if self.rows % _ROWS:
            self._write(pa.concat_tables(self._held))
        self._writer.close()

    def _write(self, table: pa.Table) -> None:
        self._writer.write_table(table.combine_chunks(), row_group_size=_ROWS)
