"""A source of events as the preparation reads it: independent units, read in bounded pieces."""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import pyarrow as pa

from behrt_jax.data.event_rules import BIRTHS_FROM
from behrt_jax.data.events import EVENT_SCHEMA, VISIT_FIELD, EventCounts
from behrt_jax.files import JsonObject


class Source(ABC):
    """A stored data set, opened: its metadata is checked, its events are not read yet.

    Opening raises `InputError` for whatever can be told without reading all events: missing files
    and columns, splits that overlap. Reading raises it for the rest.
    """

    name: str
    """meds, omop, synthea or table."""
    births_from: str = BIRTHS_FROM
    """Where births come from in this kind of source, as the error of a data set without any says it."""
    default_codes: tuple[str, ...] = ()
    """Patterns of the codes that are selected where the user gives none: diagnoses, medications and
    procedures as the source names them; none for all codes."""
    static_codes: tuple[str, ...] = ()
    """Patterns of codes of facts, beside those of the options, that the user has asked the source for."""

    @abstractmethod
    def files(self) -> list[Path]:
        """Every input file, in a fixed order: what the data set's fingerprint covers."""

    @abstractmethod
    def units(self) -> int:
        """Number of parts that can be read independently of each other (a shard, a table, a file of one)."""

    @abstractmethod
    def read(self, unit: int, counts: EventCounts) -> Iterator[pa.Table]:
        """Events of one unit in tables of at most `CHUNK_ROWS` rows, in any order.

        Columns and types are those of `events.EVENT_SCHEMA`, with `visit_id` where the source knows
        visits. Births and deaths are events with the codes MEDS_BIRTH and MEDS_DEATH. `counts.read`
        grows by every row read; rows that cannot become events are dropped and counted there (null
        code, no subject of that id, ...), changed ones too (month of birth filled in, ...).
        """

    @abstractmethod
    def sample_subjects(self) -> np.ndarray:
        """int64 ids of some or all subjects (repeats allowed), spread as the events are: they only
        decide how the work is cut, never what comes out.
        """

    def options(self) -> JsonObject:
        """The options of this kind of source that decide what is read, as the manifest has them."""
        return {}

    def subject_ranges(self) -> np.ndarray | None:
        """Smallest and largest subject id of each unit, int64 ``[units, 2]``, where the source knows them
        without reading; else None. Where units do not overlap, nothing has to be sorted by subject.
        """
        return None

    def splits(self) -> dict[str, np.ndarray]:
        """Split name -> int64 subject ids, where the source has splits; else empty."""
        return {}

    def descriptions(self) -> dict[str, str]:
        """Code -> text, for whatever codes the source has texts of. Called after reading."""
        return {}

    def learned(self) -> JsonObject:
        """All that reading has taught this object that `descriptions` needs, ready for JSON."""
        return {}

    def learn(self, learned: JsonObject) -> None:  # noqa: B027
        """Take over what another object of the same source has `learned`, which read other units."""


# Events as sources yield them, and the rules by which rows do not become any.


def events_table(
    subjects: pa.Array | np.ndarray,
    times: pa.Array,
    codes: pa.DictionaryArray,
    values: pa.Array | None = None,
    visits: pa.Array | None = None,
) -> pa.Table:
    """An events table of some columns, all ``[rows]``; values and visits are null where not given."""
    values = pa.nulls(len(codes), pa.float32()) if values is None else values
    visits = pa.nulls(len(codes), pa.int64()) if visits is None else visits
    return pa.table([subjects, times, codes, values, visits], schema=pa.schema([*EVENT_SCHEMA, VISIT_FIELD]))


def one_code(code: str, rows: int) -> pa.DictionaryArray:
    """The same code in all of some rows."""
    return pa.DictionaryArray.from_arrays(pa.array(np.zeros(rows, np.int32)), pa.array([code]))


def keep_rows(fits: Mapping[str, np.ndarray], counts: EventCounts) -> np.ndarray:
    """The rows that break no rule, bool ``[rows]``; any other is counted as dropped by the first it breaks.

    Args:
        fits: rule -> bool ``[rows]``, whether a row keeps it; one at least.
        counts: is filled.
    """
    keep = np.ones(len(next(iter(fits.values()))), bool)
    for rule, right in fits.items():
        counts.drop(rule, count(keep & ~right))
        keep &= right
    return keep


def valid(column: pa.Array) -> np.ndarray:
    """Rows that are not null, bool ``[rows]``."""
    return column.is_valid().to_numpy(zero_copy_only=False)


def count(rows: np.ndarray) -> int:
    """Number of bool ``[rows]`` that are true."""
    return int(np.count_nonzero(rows))
