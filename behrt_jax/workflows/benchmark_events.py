"""Made-up events for benchmarks, as MEDS shards.

Each event is a pure function of its place in the table, so a table of any size is written in bounded
memory, and the same rows come sorted or shuffled.
"""

import os
import shutil
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from behrt_jax.data.events import BIRTH_CODE, EVENT_SCHEMA
from behrt_jax.data.sources.source import CHUNK_ROWS

Order = Literal["sorted", "shuffled"]
_DAY = 86_400_000_000
_KINDS = ("DIAGNOSIS", "MEDICATION", "PROCEDURE")
_EVENTS_A_VISIT = 4
_ROW_GROUP = 1 << 18


def write_events(folder: Path, events: int, subjects: int, codes: int, order: Order) -> None:
    """Write the made-up events as MEDS shards of about ``CHUNK_ROWS`` rows; ``folder`` appears when whole.

    A subject's first event is the birth; the others come in visits of four, a month apart at most, up to
    the age of 80. The same rows, whatever the order; if sorted, a subject is in one shard. Memory is
    bounded by a shard and three numbers for each subject.
    """
    offsets = _offsets(events, subjects)
    unfinished = folder.with_name(f".{folder.name}.unfinished-{os.getpid()}")
    (unfinished / "data").mkdir(parents=True)
    names = pa.array([BIRTH_CODE, *(f"{_KINDS[code % 3]}//{code:06d}" for code in range(codes))])
    places = _sorted_places(offsets) if order == "sorted" else _shuffled_places(events)
    try:
        for shard, place in enumerate(places):
            table = _events_at(place, offsets, codes, names)
            # Without Arrow's own schema the codes are plain strings, as other writers leave them.
            pq.write_table(
                table, unfinished / f"data/{shard:04d}.parquet", row_group_size=_ROW_GROUP, store_schema=False
            )
        unfinished.replace(folder)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def _offsets(events: int, subjects: int) -> np.ndarray:
    """Subject i has the events from ``offsets[i]`` to ``offsets[i + 1]``: int64 ``[subjects + 1]``."""
    weights = np.random.default_rng(0).lognormal(sigma=0.9, size=subjects)
    # Two events for each; the others by weight.
    return np.round(
        np.concatenate([[0], np.cumsum(weights) / weights.sum()]) * (events - 2 * subjects)
    ).astype(np.int64) + 2 * np.arange(subjects + 1)


def _sorted_places(offsets: np.ndarray) -> Iterator[np.ndarray]:
    """Runs of places that hold whole subjects, about ``CHUNK_ROWS`` each."""
    cuts = offsets[np.searchsorted(offsets, np.arange(0, offsets[-1], CHUNK_ROWS))]
    cuts = np.unique(np.append(cuts, offsets[-1]))
    for start, end in pairwise(cuts):
        yield np.arange(start, end)


def _shuffled_places(events: int) -> Iterator[np.ndarray]:
    """Every place once, in an order that looks random: int64 arrays of up to ``CHUNK_ROWS``.

    Odd multiples and xor-shifts permute the numbers of a fixed width, and dropping those that are too
    large leaves a permutation of the rest.
    """
    bits = max(events - 1, 1).bit_length()
    mask, half = np.uint64((1 << bits) - 1), np.uint64(bits // 2 + 1)
    for start in range(0, 1 << bits, CHUNK_ROWS):
        place = np.arange(start, min(start + CHUNK_ROWS, 1 << bits), dtype=np.uint64)
        for odd in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB):
            place = (place * np.uint64(odd)) & mask
            place ^= place >> half
        place = place[place < events].astype(np.int64)
        if len(place):
            yield place


def _events_at(place: np.ndarray, offsets: np.ndarray, codes: int, names: pa.Array) -> pa.Table:
    """The events at some places, int64 ``[N]``, of the sorted table."""
    subject = np.searchsorted(offsets, place, side="right") - 1  # [N]
    ordinal = place - offsets[subject]  # [N], 0 is the birth
    visits = (offsets[subject + 1] - offsets[subject]) // _EVENTS_A_VISIT + 1
    days = np.minimum(30, 60 * 365 // visits)  # between visits
    birth = -20_000 + (subject * 7919) % 14_000  # days since 1970
    random = _random(place)  # [N]
    moment = (ordinal % _EVENTS_A_VISIT + random) * 3_600_000_000  # later events of a visit in later hours
    time = (birth + 20 * 365 + ordinal // _EVENTS_A_VISIT * np.maximum(days, 1)) * _DAY + moment.astype(
        np.int64
    )
    # Zipf's law: code k of n has the range from log(k) to log(k + 1) of log(n + 1).
    code = np.minimum((codes + 1.0) ** _random(place + (1 << 40)), codes).astype(np.int32)  # 1 .. codes
    born = ordinal == 0
    columns = {
        "subject_id": subject,
        "time": pa.array(np.where(born, birth * _DAY, time), pa.timestamp("us")),
        "code": pa.DictionaryArray.from_arrays(np.where(born, 0, code).astype(np.int32), names),
    }
    return pa.table(columns, schema=pa.schema([EVENT_SCHEMA.field(name) for name in columns]))


def _random(keys: np.ndarray) -> np.ndarray:
    """Numbers in [0, 1), float64 ``[N]``, one for each key, int64 ``[N]``."""
    words = keys.astype(np.uint64) + np.uint64(0x9E3779B97F4A7C15)
    words = (words ^ (words >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    words = (words ^ (words >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return ((words ^ (words >> np.uint64(31))) >> np.uint64(11)).astype(np.float64) * 2.0**-53
