"""Spill files read back in partitions: runs of neighbouring buckets, chosen when their sizes are known."""

from collections.abc import Sequence

import numpy as np
import pyarrow as pa

from behrt_jax.data.event_columns import EventColumns
from behrt_jax.data.spill import Spill

PARTITION_EVENTS = 262_144
"""Selected events of a partition, unless a single bucket has more; so few that its columns stay in the
processor's cache, which is faster than fewer, larger partitions."""


def choose_partitions(spills: Sequence[Spill], most: int = PARTITION_EVENTS) -> list[range]:
    """Join neighbouring buckets into partitions of at most ``most`` events, or of one bucket."""
    sizes = np.sum([spill.bucket_events for spill in spills], axis=0).tolist()
    partitions, start, held = [], 0, 0
    for bucket, size in enumerate(sizes):
        if held and held + size > most:
            partitions.append(range(start, bucket))
            start, held = bucket, 0
        held += size
    return [*partitions, range(start, len(sizes))]


def code_lookups(spills: Sequence[Spill], names: Sequence[str]) -> list[np.ndarray]:
    """Place in ``names`` of each code of each shard, int32 ``[codes]``."""
    place = {name: index for index, name in enumerate(names)}
    return [np.array([place[name] for name in spill.codes], np.int32) for spill in spills]


def load_partition(
    spills: Sequence[Spill],
    buckets: range,
    names: Sequence[str],
    lookups: Sequence[np.ndarray] | None = None,
) -> tuple[EventColumns, np.ndarray | None]:
    """Read the events of a partition back.

    Args:
        spills: all shards.
        buckets: those of the partition.
        names: all codes of all shards, ascending.
        lookups: what :func:`code_lookups` gives for these; to compute it once for all partitions.

    Returns:
        The events, and their numeric values (float32, NaN where null), where they were kept.
    """
    lookups = code_lookups(spills, names) if lookups is None else lookups
    parts: list[tuple[pa.Table, np.ndarray]] = []
    for spill, lookup in zip(spills, lookups, strict=True):
        for bucket in buckets:
            for file in (f"{bucket:04}.arrow", f"{bucket:04}-visits.arrow"):
                if (spill.folder / file).exists():
                    with pa.memory_map(str(spill.folder / file)) as mapped:
                        parts.append((pa.ipc.open_stream(mapped).read_all(), lookup))
    return columns_of(parts, names)


def columns_of(
    parts: Sequence[tuple[pa.Table, np.ndarray]], names: Sequence[str]
) -> tuple[EventColumns, np.ndarray | None]:
    """Events as columns.

    Args:
        parts: tables as `routing.select_rows` gives them, with the place in ``names`` of each of their
            numbers of codes, int32.
        names: codes, ascending.

    Returns:
        The events of all parts, and their numeric values (float32, NaN where null), where there are any.
    """
    tables = [table for table, _ in parts]
    timed = visits = named = values = None
    if any(table["time"].null_count for table in tables):
        timed = _joined([_valid(table, "time") for table in tables], bool)
    if any("visit_id" in table.column_names for table in tables):
        named = _joined([_valid(table, "visit_id") for table in tables], bool)
        visits = _joined([_filled(table, "visit_id") for table in tables], np.int64)
    if tables and "numeric_value" in tables[0].column_names:
        values = _joined([table["numeric_value"].to_numpy() for table in tables], np.float32)
    codes = [lookup[chunk.to_numpy()] for table, lookup in parts for chunk in table["code"].chunks]
    events = EventColumns(
        subject_ids=_joined([table["subject_id"].to_numpy() for table in tables], np.int64),
        codes=_joined(codes, np.int32),
        times=_joined([_filled(table, "time") for table in tables], np.int64),
        names=names,
        timed=timed,
        visits=visits,
        named=named,
    )
    return events, values


def _joined(arrays: Sequence[np.ndarray], dtype: type) -> np.ndarray:
    """End to end; a single one as it is."""
    return arrays[0] if len(arrays) == 1 else np.concatenate([np.empty(0, dtype), *arrays])


def _valid(table: pa.Table, name: str) -> np.ndarray:
    if name not in table.column_names:
        return np.zeros(table.num_rows, bool)
    if not table[name].null_count:
        return np.ones(table.num_rows, bool)
    return table[name].is_valid().to_numpy()


def _filled(table: pa.Table, name: str) -> np.ndarray:
    """int64 ``[rows]``, 0 where null."""
    if name not in table.column_names:
        return np.zeros(table.num_rows, np.int64)
    return (table[name].fill_null(0) if table[name].null_count else table[name]).to_numpy()
