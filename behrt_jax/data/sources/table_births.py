"""Births from a column of a plain table, which says them again in each of a subject's rows."""

# pyarrow.compute makes its functions on import, where pyright does not see them.
# pyright: reportAttributeAccessIssue=false

from collections.abc import Iterable, Iterator

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from behrt_jax.data.events import BIRTH_CODE, EVENT_SCHEMA, VISIT_FIELD, EventCounts
from behrt_jax.data.sources.source import CHUNK_ROWS

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
